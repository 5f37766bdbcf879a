"""`fl-simulate bench growth`: a whole run is looked at after each round, curves come from what was measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from privacy import cli_edge
from privacy.errors import UsageError
from simulations import bench_growth
from simulations.bench_growth import FILES, Sizes, play
from simulations.bench_growth_plot import figure
from simulations.bench_scale import ROUNDS
from simulations.cli import app

MIB = 2**20


@pytest.fixture(scope="module")
def played() -> dict[str, Any]:
    return play(3, 4)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, played: dict[str, Any]) -> dict[str, Any]:
    """Coordinators of 100 MiB, 2 MiB more for a site of a group and 12 bytes for a value."""
    said = {"exact": True, "rounds": played}

    def measured(sites: int, dim: int, network: bool) -> dict[str, Any]:
        assert not network
        return {"peak_bytes": 100 * MIB + 2 * MIB * min(sites, 64) + 12 * dim, "idle_bytes": 0, "wall_s": 1.0,
                "cpu_s": 0.02 * sites * ROUNDS, "exact": said["exact"]}

    monkeypatch.setattr(bench_growth, "measured", measured)
    monkeypatch.setattr(bench_growth, "finished", lambda module, sites, rounds: said["rounds"])
    return said


def test_a_run_is_looked_at_after_each_round(played: dict[str, Any]) -> None:
    points = played["points"]
    assert played["complete"]
    assert [point["round"] for point in points] == [1, 2, 3, 4]
    assert all(point["cpu_s"] > 0 and point["site_cpu_s"] > 0 for point in points)
    for what in FILES:
        sizes = [point["bytes"][what] for point in points]
        assert sizes[0] > 0
        assert sizes == sorted(sizes)
        if what != "newest adapters":  # three are kept
            assert len(set(sizes)) == len(sizes)
            assert played["bytes_per_round"][what] == (sizes[3] - sizes[2]) / 1
    assert points[3]["bytes"]["newest adapters"] == points[2]["bytes"]["newest adapters"]


def test_ratios_and_slopes_are_those_of_the_points(told: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_edge.run(app, ["bench", "growth", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = Sizes()
    assert [one["sites"] for one in found["sites"]] == list(sizes.sites)
    assert [one["dim"] for one in found["parameters"]] == list(sizes.dims)
    assert found["memory_bytes_per_value"] == pytest.approx(12, rel=1e-4)
    ratio = (228 * MIB + 12 * sizes.dim) / (116 * MIB + 12 * sizes.dim)
    assert found["memory_ratio_sites"] == pytest.approx(ratio, rel=1e-4)
    assert not found["goals"]["memory_ratio_sites"]["met"]
    assert found["goals"]["memory_ratio_rounds"]["met"]
    assert found["sites"][0]["cpu_s_per_site"] == pytest.approx(0.02)


@pytest.mark.parametrize("wrong", ["mean", "run"])
def test_a_wrong_mean_or_a_run_that_stops_early_fails_it(wrong: str, told: dict[str, Any],
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    told |= {"exact": False} if wrong == "mean" else {"rounds": {**told["rounds"], "complete": False}}
    assert cli_edge.run(app, ["bench", "growth", "--quick"]) == 1
    assert "NO" in capsys.readouterr().out


def test_the_figure_repeats_byte_by_byte_and_needs_its_own_result(told: dict[str, Any]) -> None:
    found = bench_growth.run(Sizes())
    drawn = figure(found)
    assert drawn == figure(json.loads(json.dumps(found)))
    assert all(f">{what}<" in drawn for what in FILES)
    assert drawn != figure({**found, "sites": found["sites"][:3]})
    with pytest.raises(UsageError, match="growth"):
        figure({"bench": "scale"})
