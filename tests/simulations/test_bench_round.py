"""`fl-simulate bench round`: real processes, right means, nothing left behind. No timing is asserted."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fl_server.round import Mean, RoundDriver
from privacy import cli_edge
from simulations import bench_round
from simulations.cli import app

CONTRACT = {"overhead_s", "overhead_cpu_s", "ratio_plain_round", "ratio_stock_flower"}
SMALL = ["bench", "round", "--sites", "3", "--dim", "10", "--rounds", "1", "--json"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The site processes that a test has started."""
    found: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return found


def _json(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = cli_edge.run(app, SMALL)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def _assert_gone(started: list[subprocess.Popen[bytes]]) -> None:
    """All sites left by themselves (a killed one has a negative code), and nothing listens any more."""
    assert [process.returncode for process in started] == [0, 0, 0]
    port = json.loads(started[0].args[-1])[2]  # type: ignore[index]
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", port)) != 0


def test_masked_and_plain_rounds_alternate_and_their_means_are_right(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]) -> None:
    played, attempt = list[tuple[bool, bool, tuple[str, ...]]](), RoundDriver.attempt

    def noted(driver: RoundDriver, *args: Any) -> Mean:
        mean = attempt(driver, *args)
        played.append((driver.contract.secagg.enabled, bool(mean.transcript), mean.sites))
        return mean

    monkeypatch.setattr(RoundDriver, "attempt", noted)
    code, found = _json(capsys)
    names = ("site-0", "site-1", "site-2")
    assert played == [(True, True, names), (False, False, names)] * 2  # the first of each isn't counted
    assert (code, found["exact"]) == (0, True)
    assert found.keys() >= CONTRACT | {"plain_s", "plain_cpu_s", "environment", "goals", "samples", "ratio_stock_flower_why"}
    assert found["ratio_stock_flower"] is None
    assert 0 < found["max_error"] <= found["error_bound"] < 1.2e-7 + 3.1e-8
    wall, goal = found["samples"]["wall"], found["goals"]["overhead_s"]
    assert found["overhead_s"] == wall["masked"][0] == goal["value"]
    assert found["ratio_plain_round"] == pytest.approx(wall["masked"][0] / wall["plain"][0], rel=1e-4)
    assert goal["met"] == (goal["value"] <= goal["limit"])
    _assert_gone(started)


def test_without_its_sites_it_says_which_are_missing_and_leaves_nothing_behind(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]) -> None:
    monkeypatch.setattr(bench_round, "START_S", 0.0)
    code, found = _json(capsys)
    assert code != 0
    assert found["error"]["code"] == "run.sites_missing"
    assert "site-0, site-1, site-2" in found["error"]["cause"]
    _assert_gone(started)


@pytest.mark.parametrize("off", [0.0, 2e-7])
def test_a_mean_that_is_off_by_two_steps_is_told(tmp_path: Path, off: float) -> None:
    contracts = bench_round._contracts(tmp_path, {f"site-{i}": f"{i:064x}" for i in range(3)}, 2)
    spec = bench_round._spec(10)

    def attempt(round_no: int, _: int, adapter: Any) -> Mean:
        updates = [bench_round.Drawn(i, 10).train(adapter, round_no) for i in range(3)]
        mean = np.mean(updates, 0, np.float64)
        mean[-1] += off if round_no == 2 else 0.0
        return Mean(0, mean.astype(np.float32), (), "", "", {})

    drivers: Any = {mode: SimpleNamespace(contract=contract, attempt=attempt) for mode, contract in contracts.items()}
    assert bench_round._measure(drivers, spec, 1, [])["exact"] is (off == 0)


def test_a_wrong_mean_exits_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_round, "run", lambda **how: {"exact": False} | how)
    monkeypatch.setattr(bench_round, "render", lambda found: "")
    assert _json(capsys) == (1, {"exact": False, "sites": 3, "dim": 10, "rounds": 1})
