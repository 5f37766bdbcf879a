"""`fl-simulate bench all`: one results file and one page; what wasn't measured is a reason, never a figure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from privacy import cli_edge
from simulations import bench_all
from simulations.bench_all import LEFT_OUT, PARTS
from simulations.bench_page import page
from simulations.cli import app

ENVIRONMENT = {"cores": 2, "load": 1.5, "machine": "x", "python": "3.11", "versions": {"numpy": "2", "nvflare": None}}
SCALE = {"bench": "scale", "sites": 64, "dim": 1000, "network": True, "rounds": 2, "groups": 1, "exact": True,
         "environment": ENVIRONMENT, "peak_rss_mib": 300.0, "cpu_s_per_site": 0.2, "ratio_baseline": 2.0,
         "baseline": {"sites": 8, "peak_rss_mib": 150.0, "cpu_s_per_site": 0.125},
         "goals": {"ratio_baseline": {"value": 2.0, "limit": 1.2, "met": False}}}
NVFLARE = {"bench": "nvflare", "sites": 8, "dim": 1000, "rounds": 3, "environment": ENVIRONMENT, "installed": "2.9.0",
           "why": None, "exact": True, "peak_rss_mib": 100.0, "cpu_s_per_site": 0.0625, "wall_s": 2.0}


def done(**results: dict[str, Any] | None) -> dict[str, Any]:
    parts = [{"name": name.replace("_", " "), "title": name.title(), "command": f"fl-simulate bench {name}", "code": 0,
              "seconds": 3.0, "result": result, "why": None if result is None else result.get("why")}
             for name, result in results.items()]
    return {"format": bench_all.FORMAT, "version": "1", "quick": False, "began": "2026-01-01T00:00:00+00:00",
            "environment": ENVIRONMENT, "parts": parts}


def figures(html: str) -> list[str]:
    return re.findall(r'alt="([^"]*)"', html)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, dict[str, Any] | None]]:
    """By the first word of a bench's command, what its process would say."""
    said: dict[str, tuple[int, dict[str, Any] | None]] = {}
    monkeypatch.setattr(bench_all, "_last_line", lambda words, variables: said[words[1]])
    return said


def test_a_quick_run_makes_results_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli_edge.run(app, ["bench", "all", "--quick", "--out", str(tmp_path), "--only", "secagg", "--only", "round",
                              "--json"])
    assert (code, json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]) == (0, [])
    results = json.loads((tmp_path / "results.json").read_text())
    secagg, left_out = results["parts"]
    assert secagg["result"]["exact"]
    assert secagg["command"].endswith("--repeats 1 --json")
    assert (left_out["result"], left_out["why"], left_out["code"]) == (None, LEFT_OUT, None)
    html = (tmp_path / "index.html").read_text()
    assert html == page(results)
    assert all(name in html for name in secagg["result"]["goals"])
    assert "sums exact: yes" in html
    assert LEFT_OUT in html
    goals = secagg["result"]["goals"].values()
    assert f"{sum(goal['met'] for goal in goals)} of {len(goals)} goals met" in html
    assert len(figures(html)) == 3
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|<script""", html)


@pytest.mark.parametrize(("said", "code", "why"), [
    ((1, None), 1, "failed with exit code 1"), ((-9, None), -9, "failed with exit code -9"),
    ((4, {"error": {"code": "x", "cause": "It broke.", "mend": ""}}), 4, "It broke."), ((1, SCALE), 1, None)])
def test_a_bench_that_fails_is_said_and_fails_the_run(answers: dict[str, Any], said: tuple[int, Any], code: int,
                                                      why: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                      ) -> None:
    answers["scale"] = said
    assert cli_edge.run(app, ["bench", "all", "--out", str(tmp_path), "--only", "scale"]) == 1
    part = json.loads((tmp_path / "results.json").read_text())["parts"][0]
    assert (part["code"], part["why"]) == (code, why)
    assert f'<p class="fail">{why or "A result is wrong."}' in (tmp_path / "index.html").read_text()
    assert "not right: scale" in capsys.readouterr().out


def test_figures_are_beside_those_of_the_same_size_only() -> None:
    html = page(done(scale_network=SCALE, nvflare=NVFLARE))
    assert [name.split(",")[0] for name in figures(html)] == ["Coordinator", "Coordinator"]
    assert figures(page(done(scale_network=SCALE, nvflare={**NVFLARE, "dim": 999}))) == []
    assert figures(page(done(scale_network=SCALE))) == []


def test_a_baseline_that_is_not_there_has_a_reason_and_no_bar() -> None:
    absent = {**{name: NVFLARE[name] for name in ("bench", "sites", "dim", "rounds", "environment")}, "installed": None,
              "exact": None, "why": "NVFlare is not installed: do this."}
    html = page(done(scale_network=SCALE, nvflare=absent))
    assert "NVFlare simulator: plain: NVFlare is not installed: do this." in html
    assert html.count("<p>NVFlare is not installed: do this.</p>") == 1


def test_what_a_result_says_is_escaped() -> None:
    html = page(done(nvflare={**NVFLARE, "installed": "<script>alert(1)</script>"}))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_goals_are_counted_and_marked() -> None:
    met = {**SCALE, "goals": {"one": {"value": 1.0, "limit": 1.2, "met": True},
                              "two": {"value": 0.1, "least": 0.05, "met": True}, **SCALE["goals"]}}
    html = page(done(scale=met))
    assert "2 of 3 goals met" in html
    assert html.count('<span class="met">yes') == 2
    assert html.count('<span class="fail">no') == 1
    assert "at least 0.05" in html


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli_edge.run(app, ["bench", "all", "--out", str(tmp_path), "--only", "scael"]) == 2
    assert "scael" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_parts_have_names_of_their_own() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
