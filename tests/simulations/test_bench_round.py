"""`fl-simulate bench round`: real processes, right means, nothing left behind. No timing is asserted."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from fl_server.attempt import Done, Summed
from fl_server.round import RoundDriver
from privacy import cli_edge
from simulations import bench_round
from simulations.cli import app

CONTRACT = {"overhead_s", "overhead_cpu_s", "ratio_plain_round", "ratio_stock_flower"}
SMALL = ["bench", "round", "--sites", "3", "--dim", "10", "--rounds", "1", "--json"]


class Stock:
    """Stock Flower's place: it takes 4 s a round."""

    played: ClassVar[list[int]]

    def __init__(self, folder: Path, **_: Any) -> None:
        self.wall, self.cpu, self.why = list[float](), list[float](), None
        Stock.played = []

    def __enter__(self) -> Stock:
        return self

    def __exit__(self, *_: object) -> None: ...

    def play(self, rounds: int) -> None:
        Stock.played.append(rounds)
        self.wall += [4.0] * rounds
        self.cpu += [8.0] * rounds


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_round, "Stock", Stock)


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
    stock_played = list[list[int]]()

    def noted(driver: RoundDriver, *args: Any) -> Done:
        mean = attempt(driver, *args)
        stock_played.append([*Stock.played])
        played.append((driver.contract.secagg.enabled, bool(mean.sums[0].transcript), mean.sites))
        return mean

    monkeypatch.setattr(RoundDriver, "attempt", noted)
    code, found = _json(capsys)
    names = ("site-0", "site-1", "site-2")
    assert played == [(True, True, names), (False, False, names)] * 2  # the first of each isn't counted
    assert (stock_played, Stock.played) == ([[1]] * 4, [1, 0])
    assert (code, found["exact"]) == (0, True)
    assert found.keys() >= CONTRACT | {"plain_s", "plain_cpu_s", "environment", "goals", "samples", "ratio_stock_flower_why"}
    assert 0 < found["max_error"] <= found["error_bound"] < 1.2e-7 + 3.1e-8
    wall, goal = found["samples"]["wall"], found["goals"]["overhead_s"]
    assert found["overhead_s"] == wall["masked"][0] == goal["value"]
    assert found["ratio_plain_round"] == pytest.approx(wall["masked"][0] / wall["plain"][0], rel=1e-4)
    assert found["ratio_stock_flower"] == pytest.approx(found["overhead_s"] / 4, rel=1e-4)
    assert (found["stock_flower_s"], found["stock_flower_cpu_s"], found["ratio_stock_flower_why"]) == (4, 8, None)
    assert goal["met"] == (goal["value"] <= goal["limit"])
    _assert_gone(started)


def test_stock_flower_that_cannot_be_run_is_told_and_leaves_our_figures() -> None:
    found: dict[str, Any] = {"overhead_s": 1.0, "samples": {"wall": {}, "cpu": {}}}
    absent: Any = SimpleNamespace(why="not installed: flwr", wall=[9.0], cpu=[9.0])
    bench_round._compare(found, absent)
    assert found == {"overhead_s": 1.0, "stock_flower_s": None, "stock_flower_cpu_s": None, "ratio_stock_flower": None,
                     "ratio_stock_flower_why": "not installed: flwr",
                     "samples": {"wall": {"stock_flower": [9.0]}, "cpu": {"stock_flower": [9.0]}}}


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
    spec, setup = bench_round._spec(10), SimpleNamespace(bound=lambda name: 1.0)

    def attempt(round_no: int, _: int, adapter: Any) -> Done:
        updates = [bench_round.Drawn(i, 10).train(adapter, round_no) for i in range(3)]
        mean = np.mean(updates, 0, np.float64)
        mean[-1] += off if round_no == 2 else 0.0
        return Done(0, {bench_round.UPDATE: mean.astype(np.float32)}, (), (Summed("", "", {}),))

    drivers: Any = {mode: SimpleNamespace(contract=contract, attempt=attempt, setup=setup)
                    for mode, contract in contracts.items()}
    assert bench_round._measure(drivers, spec, 1, [])["exact"] is (off == 0)


def test_a_wrong_mean_exits_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_round, "run", lambda **how: {"exact": False} | how)
    monkeypatch.setattr(bench_round, "render", lambda found: "")
    assert _json(capsys) == (1, {"exact": False, "sites": 3, "dim": 10, "rounds": 1})
