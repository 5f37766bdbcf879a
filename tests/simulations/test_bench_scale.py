"""`fl-simulate bench scale`: what it prints, over a pipe and over the network; a wrong mean fails it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy import cli_edge
from simulations import bench_scale
from simulations.bench_round import Drawn
from simulations.bench_scale import GROUP, ROUNDS, groups
from simulations.cli import app


def found(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    code = cli_edge.run(app, ["bench", "scale", "--sites", "3", "--dim", "500", *more, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("sites", [3, 64, 65, 1000])
def test_groups_are_few_and_even(sites: int) -> None:
    made = groups(sites)
    assert [i for group in made for i in group] == list(range(sites))
    assert len(made) == -(-sites // GROUP)
    assert max(map(len, made)) <= GROUP
    assert max(map(len, made)) - min(map(len, made)) <= 1


def test_sites_behind_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, result = found(capsys)
    assert (code, result["exact"], result["network"], result["groups"]) == (0, True, False, 1)
    assert result.keys() >= {"peak_rss_mib", "cpu_s_per_site", "environment", "samples", "dtype", "baseline"}
    assert result["cpu_s_per_site"] > 0


@pytest.mark.long
def test_sites_over_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    code, result = found(capsys, "--network", "--sites", "6")
    assert (code, result["exact"], result["network"]) == (0, True, True)


def test_a_wrong_mean_fails_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"peak_bytes": None, "idle_bytes": None, "cpu_s": 1.0, "wall_s": 1.0, "exact": False}
    monkeypatch.setattr(bench_scale, "measured", lambda sites, dim, network: measured)
    code, result = found(capsys)
    assert (code, result["exact"], result["ratio_baseline"]) == (1, False, None)


@pytest.mark.parametrize(("off", "right"), [(0.0, True), (1e-5, False)])
def test_a_mean_is_right_within_the_encodings_bound(off: float, right: bool, tmp_path: Path) -> None:
    bench_scale._write_contract(tmp_path / "group-0.json", 0, {f"site-{i}": f"{i:064x}" for i in range(3)})
    adapter = bench_scale._adapter(50, ROUNDS)
    mean = np.mean([Drawn(i, 50).train(adapter, ROUNDS) for i in range(3)], 0, np.float64).astype(np.float32)
    mean[-1] += off
    mean.tofile(tmp_path / "mean-0")
    assert bench_scale._exact(tmp_path, 0) == right
