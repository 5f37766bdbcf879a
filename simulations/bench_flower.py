"""Stock Flower for `fl-simulate bench round`: its own SuperLink, SuperNodes, app bundle and FedAvg, over TLS on loopback.

Every process carries FLWR_HOME, a folder of this run alone, so all of them are found and ended by pid, those that Flower
detaches included. A guard process does that once its stdin ends, so none outlives this process, however that ends.
Nothing is installed, and only loopback is used. What keeps Flower from running is kept in `Stock.why`, not raised: our
own figures stand without it. Linux only (/proc).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

COMMANDS = ("flwr", "flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp")
START_S, ROUND_S = 120.0, 180.0  # a machine may be busy
POLL_S = 0.1
VARIABLES = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
             "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}

PROJECT = """\
[project]
name = "bench"
version = "1.0.0"
description = "Rounds without training"
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"

[tool.flwr.app.config]
sites = {sites}
dim = {dim}
rounds = 1
marks = ""
"""
# What evaluate() does after its first line belongs to no round: it checks the mean and writes it down.
APP = '''\
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


def drawn(site, round_no, dim):
    return np.random.default_rng((site, round_no)).random(dim, np.float32) * 2 - 1


@client.train()
def train(message, context):
    update = drawn(context.node_config["site"], message.content["config"]["server-round"], context.run_config["dim"])
    reply = {"arrays": ArrayRecord([update]), "metrics": MetricRecord({"num-examples": 100})}
    return Message(RecordDict(reply), reply_to=message)


@server.main()
def main(grid, context):
    config, start = context.run_config, 0.0
    sites, dim = config["sites"], config["dim"]

    def evaluate(round_no, arrays):
        nonlocal start
        end = time.perf_counter()
        if round_no:
            mean = arrays.to_numpy_ndarrays()[0]
            truth = np.mean([drawn(site, round_no, dim) for site in range(sites)], 0, np.float64)
            with Path(config["marks"]).open("a") as marks:
                marks.write(json.dumps([end - start, float(np.abs(mean - truth).max())]) + "\\n")
        start = time.perf_counter()

    FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites).start(
        grid, ArrayRecord([np.zeros(dim, np.float32)]), num_rounds=config["rounds"], evaluate_fn=evaluate)
'''


class _NotMeasured(Exception):
    """Flower can't be started, or a round doesn't end."""


class Stock:
    """A SuperLink and its SuperNodes, from `__enter__` to `__exit__`. They idle (poll) unless `play` is at work.

    `wall`, `cpu`: seconds of each counted round; cpu is user and system time of all its processes. `why`: what kept
    Flower from running or from the right means, or None.
    """

    def __init__(self, folder: Path, *, sites: int, dim: int, certificate: Path, key: Path, roots: Path,
                 commands: Path = Path(sys.executable).parent) -> None:
        """folder: doesn't exist. certificate, key: PEM of the SuperLink, for 127.0.0.1. roots: PEM of its CAs.

        commands: where Flower's commands are looked for before PATH.
        """
        self.wall, self.cpu = list[float](), list[float]()
        self.why: str | None = None
        self._folder, self._home, self._sites, self._dim = folder, folder / "home", sites, dim
        self._certificate, self._key, self._roots = certificate, key, roots
        self._variables = {**os.environ, **VARIABLES, "FLWR_HOME": str(self._home),
                           "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', '')}"}
        self._processes = dict[str, subprocess.Popen[bytes]]()
        self._guard: subprocess.Popen[bytes] | None = None
        self._runs = 0

    def __enter__(self) -> Stock:
        try:
            self._start()
        except _NotMeasured as e:
            self.why = str(e)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._guard and self._guard.stdin:
            self._guard.stdin.close()
            self._guard.wait()
        for process in self._processes.values():
            process.wait()

    def play(self, rounds: int) -> None:
        """A run of rounds + 1 rounds, one straight after the other; the first isn't counted. Nothing once `why` is set."""
        if self.why is None and rounds:
            try:
                self._play(rounds)
            except _NotMeasured as e:
                self.why = str(e)

    def _start(self) -> None:
        if missing := [name for name in COMMANDS if not shutil.which(name, path=self._variables["PATH"])]:
            raise _NotMeasured(f"not installed: {', '.join(missing)}")
        if sys.platform != "linux":
            raise _NotMeasured("its processes can be found on Linux only")
        self._home.mkdir(parents=True)
        self._guard = subprocess.Popen([sys.executable, "-P", "-m", "simulations.bench_flower", str(self._home)],
                                       stdin=subprocess.PIPE, start_new_session=True)
        port, *runtime_ports = _free_ports(1 + self._sites)
        (self._folder / "app").mkdir()
        (self._folder / "app" / "pyproject.toml").write_text(PROJECT.format(sites=self._sites, dim=self._dim))
        (self._folder / "app" / "app.py").write_text(APP)
        (self._home / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{self._roots}"\n')
        self._launch("superlink", "flower-superlink", "--port", port, "--ssl-certfile", self._certificate,
                     "--ssl-keyfile", self._key, "--ssl-ca-certfile", self._roots)
        self._until(lambda: _listens(port), START_S, "the SuperLink doesn't listen")
        for site, runtime_port in enumerate(runtime_ports):
            self._launch(f"supernode-{site}", "flower-supernode", "--superlink", f"127.0.0.1:{port}", "--root-certificates",
                         self._roots, "--port", runtime_port, "--node-config", f"site={site}")

    def _play(self, rounds: int) -> None:
        self._runs += 1
        marks = self._folder / f"rounds-{self._runs}.jsonl"
        submit = self._launch(f"run-{self._runs}", "flwr", "run", self._folder / "app", "bench", "--run-config",
                              f'rounds={rounds + 1} marks="{marks}"')
        self._until(lambda: submit.poll() is not None, START_S, "`flwr run` doesn't end")
        before = 0.0
        for round_no in range(1, rounds + 2):
            self._until(partial(_has, marks, round_no), ROUND_S, f"round {round_no} doesn't end")
            spent = _cpu_s([process.pid for process in self._processes.values()])
            seconds, error = json.loads(_lines(marks)[round_no - 1])
            if error > self._sites * 2**-23:  # a float32 sum of values below 1; a lost site is off by far more
                raise _NotMeasured(f"the mean of round {round_no} is off by {error}")
            if round_no > 1:
                self.wall.append(seconds)
                self.cpu.append(spent - before)
            before = spent

    def _launch(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [str(each) for each in command], cwd=self._folder, env=self._variables, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        return self._processes[name]

    def _until(self, done: Callable[[], bool], seconds: float, late: str) -> None:
        """Raises _NotMeasured when it takes longer, or when a process has failed."""
        deadline = time.monotonic() + seconds
        while not done():
            for name, process in self._processes.items():
                if process.poll() not in (None, 0):
                    raise _NotMeasured(f"{name} ended with {process.returncode}: {_last_line(self._folder / f'{name}.log')}")
            if time.monotonic() > deadline:
                raise _NotMeasured(f"{late} within {seconds:.0f} s: {_last_line(self._folder / 'superlink.log')}")
            time.sleep(POLL_S)


def _has(path: Path, lines: int) -> bool:
    return len(_lines(path)) >= lines


def _lines(path: Path) -> list[str]:
    """Complete lines only; none without the file."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip() or "no output").splitlines()[-1].strip()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def _cpu_s(roots: Iterable[int]) -> float:
    """User and system seconds of these processes and all below them, ended children that were waited for included."""
    children, ticks = dict[int, list[int]](), dict[int, int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()  # proc_pid_stat(5), from field 3 on
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
            ticks[int(stat.parent.name)] = sum(map(int, fields[11:15]))
    found = list(roots)
    for pid in found:
        found += children.get(pid, [])
    return sum(ticks.get(pid, 0) for pid in found) / os.sysconf("SC_CLK_TCK")


def _carriers(home: str) -> list[int]:
    """Processes that were started with this FLWR_HOME; none that has ended."""
    mark, found = f"FLWR_HOME={home}".encode(), []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's, or it has just ended
            if mark in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


def end_all(home: str) -> None:
    """End every process that carries this FLWR_HOME, also those that are started meanwhile."""
    while pids := _carriers(home):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    sys.stdin.read()
    end_all(sys.argv[1])
