"""`fl-simulate bench dp-step`: what it prints, and that a wrong norm fails it. No timing is asserted."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from privacy import cli_edge, fused_layers
from simulations import bench_dp_step
from simulations.bench_dp_models import SHAPES, build, engine, opacus, plain
from simulations.cli import app

SMALL = ["bench", "dp-step", "--model", "llama-like", "--batch", "2", "--length", "4", "--rank", "2", "--repeats", "2"]
CONTRACT = {"ratio_plain", "ratio_opacus_hooks", "ratio_opacus_ghost", "memory_ratio", "max_norm_error", "environment",
            "samples", "goals", "to_plain", "step_s", "memory_bytes"}


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_dp_step, "_peak", lambda sizes, name, threads: {"plain": 100, "fused": 104}[name])


def _json(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = cli_edge.run(app, [*SMALL, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_result_holds_what_the_contract_names(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = _json(capsys)
    assert (code, found["exact"]) == (0, True)
    assert found.keys() >= CONTRACT
    assert found["max_norm_error"] <= 1e-5
    assert found["memory_ratio"] == 1.04
    assert all(len(taken) == found["repeats"] == 2 for taken in found["samples"].values())
    assert set(found["samples"]) == {"plain", "fused", "opacus engine", "opacus hooks", "opacus ghost"}
    for name, goal in found["goals"].items():
        assert (goal["value"], goal["met"]) == (found[name], goal["value"] <= goal["limit"])


def test_a_wrong_norm_fails_the_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fused_layers._outer
    monkeypatch.setattr(fused_layers, "_outer", lambda g, x: honest(g, x) * 1.001)
    code, found = _json(capsys)
    assert (code, found["exact"], found["goals"]["max_norm_error"]["met"]) == (1, False, False)


def test_an_unknown_model_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_edge.run(app, ["bench", "dp-step", "--model", "gpt5"]) == 2
    assert ", ".join(SHAPES) in " ".join(capsys.readouterr().err.split())


def test_every_step_moves_the_adapter_and_leaves_the_shared_base_alone() -> None:
    task = build("llama-like", 2, 4, 2, 0)
    base = {n: p.clone() for n, p in task.module.named_parameters()}
    for make in (plain, lambda of: engine("fused", of), lambda of: engine("opacus", of),
                 lambda of: opacus(of, ghost=False), lambda of: opacus(of, ghost=True)):
        own = task.copy()
        make(own)()
        assert all(not torch.equal(p, base[n]) for n, p in own.parameters.items())
    assert all(torch.equal(p, base[n]) for n, p in task.module.named_parameters())


def test_a_step_without_noise_is_plain_sgd_where_nothing_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline and the private step do the same work: equal but for the lattice."""
    monkeypatch.setattr("privacy.dpsgd.lattice_noise", lambda dim, *, sigma, clip: np.zeros(dim, np.int64))
    monkeypatch.setattr("simulations.bench_dp_models.CLIP", 8.0)
    monkeypatch.setattr("simulations.bench_dp_models.RATE", 1.0)
    task = build("llama-like", 2, 4, 2, 0)
    ours, theirs = task.copy(), task.copy()
    engine("fused", ours)()
    plain(theirs)()
    moved = [(p - task.parameters[name]).detach() for name, p in ours.parameters.items()]
    wanted = [(p - task.parameters[name]).detach() for name, p in theirs.parameters.items()]
    assert max(float(part.abs().max()) for part in wanted) > 1e-3
    for got, want in zip(moved, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=8e-6)  # of gamma, 2^-17
