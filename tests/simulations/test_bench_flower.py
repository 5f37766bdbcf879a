"""Stock Flower in `bench round`: what is counted, what is told, and that no process of it is left, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from privacy import cli_edge
from simulations import bench_flower
from simulations.bench_flower import COMMANDS, Stock, _carriers, _cpu_s, _lines, end_all
from simulations.cli import app

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Flower's processes are found by /proc")

# Stand-ins: a SuperLink that listens and detaches a child as Flower does, nodes that wait, and rounds that are written down.
WAIT = "import signal; signal.pause()"
SUPERLINK = f"""import socket, subprocess, sys
subprocess.Popen([sys.executable, "-S", "-c", "{WAIT}"], start_new_session=True)
listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
{WAIT}"""
FLWR = """import json, re, sys
rounds, marks = re.fullmatch('rounds=([0-9]+) marks="(.+)"', sys.argv[-1]).groups()
with open(marks, "w") as file:
    for round_no in range(int(rounds)):
        file.write(json.dumps([float(round_no), ERROR]) + chr(10))"""
STAND_INS = dict.fromkeys(COMMANDS, WAIT) | {"flower-superlink": SUPERLINK, "flwr": FLWR.replace("ERROR", "1e-8")}


def _stock(tmp_path: Path, **changed: str) -> Stock:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (STAND_INS | changed).items():
        (commands / name).write_text(f"#!{sys.executable} -S\n{text}\n")
        (commands / name).chmod(0o755)
    return Stock(tmp_path / "flower", sites=2, dim=3, certificate=tmp_path, key=tmp_path, roots=tmp_path, commands=commands)


def _left(tmp_path: Path) -> list[int]:
    return _carriers(str(tmp_path / "flower" / "home"))


def test_the_first_round_of_each_run_is_not_counted(tmp_path: Path) -> None:
    with _stock(tmp_path) as stock:
        stock.play(2)
        stock.play(0)
        stock.play(1)
        assert len(_left(tmp_path)) >= 4  # SuperLink, its detached child, two nodes
    assert (stock.wall, len(stock.cpu), stock.why) == ([1.0, 2.0, 1.0], 3, None)
    assert _left(tmp_path) == []


def test_commands_that_are_missing_are_named_and_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stock = _stock(tmp_path)
    (tmp_path / "commands" / "flower-superlink").unlink()
    with stock:
        stock.play(1)
    assert (stock.why, stock.wall, (tmp_path / "flower").exists()) == ("not installed: flower-superlink", [], False)


@pytest.mark.parametrize(("changed", "why"), [
    ({"flower-superlink": "raise SystemExit('no such option')"}, "superlink ended with 1: no such option"),
    ({"flwr": "raise SystemExit('refused')"}, "run-1 ended with 1: refused"),
    ({"flwr": FLWR.replace("ERROR", "0.3")}, "the mean of round 1 is off by 0.3"),
])
def test_what_keeps_flower_from_running_is_told_and_ends_it(tmp_path: Path, changed: dict[str, str], why: str) -> None:
    with _stock(tmp_path, **changed) as stock:
        stock.play(1)
        stock.play(1)
    assert (stock.why, stock.wall, _left(tmp_path)) == (why, [], [])


def test_a_round_that_does_not_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_flower, "ROUND_S", 0.0)
    with _stock(tmp_path, flwr="") as stock:
        stock.play(1)
    assert stock.why == "round 1 doesn't end within 0 s: no output"
    assert _left(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    stock = _stock(tmp_path)
    with pytest.raises(KeyboardInterrupt), stock:
        raise KeyboardInterrupt
    assert _left(tmp_path) == []


def test_an_interrupt_while_it_starts_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(port: int) -> bool:
        assert _left(tmp_path)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_flower, "_listens", interrupted)
    with pytest.raises(KeyboardInterrupt), _stock(tmp_path):
        pass
    assert _left(tmp_path) == []


def test_a_bench_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    _stock(tmp_path)
    script = f"""
import sys, time
from pathlib import Path
from simulations.bench_flower import Stock
at = Path({str(tmp_path)!r})
with Stock(at / "flower", sites=2, dim=3, certificate=at, key=at, roots=at, commands=at / "commands"):
    print("up", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bench:
        assert bench.stdout and bench.stdout.readline() == b"up\n"
        assert _left(tmp_path)
        bench.kill()
        assert bench.stdout.read() == b""  # the guard holds it until it is done
    assert _left(tmp_path) == []


def test_only_carriers_of_this_home_are_ended(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE,
                          env={**os.environ, "FLWR_HOME": f"{tmp_path}2"}) as other:
        with subprocess.Popen([sys.executable, "-S", "-c", WAIT], env={**os.environ, "FLWR_HOME": str(tmp_path)}) as ours:
            end_all(str(tmp_path))
        other.communicate(b"\n")
    assert (ours.returncode, other.returncode) == (-signal.SIGKILL, 0)


def test_cpu_seconds_are_those_of_the_whole_tree() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    script = f"""
import subprocess, sys
subprocess.run([sys.executable, "-S", "-c", {burn!r}])
alive = subprocess.Popen([sys.executable, "-S", "-c", {burn!r} + "\\nprint(flush=True)\\ninput()"], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, start_new_session=True)
alive.stdout.readline()
print(flush=True)
input()
alive.communicate(b"\\n")
"""
    with subprocess.Popen([sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as root:
        assert root.stdout and root.stdout.readline()
        spent = _cpu_s([root.pid])
        root.communicate(b"\n")
    assert spent >= 0.38  # a tick is lost at each rounding


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    assert _lines(marks) == []
    marks.write_text("[1.0, 0.0]\n[2.0")
    assert _lines(marks) == ["[1.0, 0.0]"]


@pytest.mark.long
def test_stock_flower_really_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    homes, start = list[str](), Stock._start

    def noted(stock: Stock) -> None:
        homes.append(str(stock._home))
        start(stock)

    monkeypatch.setattr(Stock, "_start", noted)
    code = cli_edge.run(app, ["bench", "round", "--sites", "3", "--dim", "10", "--rounds", "2", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (code, found["ratio_stock_flower_why"]) == (0, None)
    assert found["ratio_stock_flower"] > 0
    assert len(found["samples"]["wall"]["stock_flower"]) == len(found["samples"]["cpu"]["stock_flower"]) == 2
    assert [_carriers(home) for home in homes] == [[]]
