"""`fl-simulate bench nvflare`: absent, it says so; a stand-in for its simulator shows what is made of the meter's lines."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from privacy import cli_edge
from simulations import bench_nvflare
from simulations.cli import app

STANDIN = """#!{python}
import json, sys
from pathlib import Path
if sys.argv[1] == "-c":
    print("9.9.9")
    sys.exit()
config = Path(sys.argv[3]) / "app" / "config"
args = {{c["id"]: c for c in json.loads((config / "config_fed_server.json").read_text())["components"]}}["meter"]["args"]
if not {error}:
    print("what went wrong")
with open(args["out"], "w") as f:
    for no in range({lines}):
        for event, cpu in (("started", 10 * no), ("aggregated", 10 * no + 4 * (no + 1))):
            f.write(json.dumps({{"event": event, "cpu_s": cpu, "wall_s": 2 * cpu, "peak_bytes": 2**21,
                                **({{"error": {error}}} if event == "aggregated" else {{}})}}) + "\\n")
"""


def found(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    code = cli_edge.run(app, ["bench", "nvflare", "--sites", "2", "--dim", "5", "--rounds", "3", *more, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def standin(folder: Path, *, lines: int = 3, error: float = 1e-9) -> str:
    file = folder / "python"
    file.write_text(STANDIN.format(python=sys.executable, lines=lines, error=error))
    file.chmod(0o700)
    return str(file)


def test_without_it_the_result_says_how_to_install_it(capsys: pytest.CaptureFixture[str],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_nvflare, "find_spec", lambda name: None)
    monkeypatch.delenv("NVFLARE_PYTHON", raising=False)
    code, result = found(capsys)
    assert (code, result["installed"], result["exact"]) == (0, None, None)
    assert "not installed: pip install" in result["why"]
    assert "cpu_s_per_site" not in result


def test_a_python_without_it_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, result = found(capsys, "--python", str(tmp_path / "none"))
    assert code != 0
    assert result["error"]["code"] == "bench.process"


def test_rounds_after_the_first_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, result = found(capsys, "--python", standin(tmp_path))
    assert (code, result["exact"], result["installed"]) == (0, True, "9.9.9")
    assert result["cpu_s_per_site"] == (8 + 12) / 2 / 2
    assert result["wall_s"] == 20
    assert result["peak_rss_mib"] == 2


def test_a_wrong_mean_fails_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, result = found(capsys, "--python", standin(tmp_path, error=0.1))
    assert (code, result["exact"]) == (1, False)


def test_a_simulator_that_stops_early_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, result = found(capsys, "--python", standin(tmp_path, lines=2))
    assert code != 0
    assert result["error"]["code"] == "bench.process"


def test_both_sides_draw_the_same_updates() -> None:
    """The job's file imports NVFlare, so it is compared as text."""
    tree = ast.parse(Path(inspect.getfile(bench_nvflare)).with_name("bench_nvflare_job.py").read_text())
    theirs = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "drawn")
    ours = ast.parse(inspect.getsource(bench_nvflare.drawn)).body[0]
    assert isinstance(ours, ast.FunctionDef)
    assert [ast.dump(node) for node in theirs.body[1:]] == [ast.dump(node) for node in ours.body[1:]]


@pytest.mark.long
@pytest.mark.skipif(find_spec("nvflare") is None, reason="needs NVFlare: pip install 'consilo[bench]'")
def test_its_simulator_gives_the_right_mean(capsys: pytest.CaptureFixture[str]) -> None:
    code, result = found(capsys)
    assert (code, result["exact"]) == (0, True)
