"""What the measurements of `fl-simulate bench` share.

Each result is one JSON object that carries its versions, cores, seed and raw samples. CPU seconds are those of the whole
process (`time.process_time`: user and system, every thread), so a thread more never looks like work less.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec, TypeVar

from privacy.errors import Unreachable

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Samples:
    """(CPU seconds, wall seconds) of every call, by name."""

    taken: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def take(self, name: str, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call and measure. Arguments are evaluated before the clocks start."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = work(*args, **kwargs)
        self.taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        return result

    def cpu(self, name: str) -> float:
        """Median CPU seconds of one call."""
        return median(cpu for cpu, _ in self.taken[name])

    def wall(self, name: str) -> float:
        """Median wall seconds of one call."""
        return median(wall for _, wall in self.taken[name])

    def total(self, *names: str) -> tuple[float, float]:
        """(CPU, wall) seconds of all calls of these names together."""
        every = [sample for name in names for sample in self.taken[name]]
        return sum(cpu for cpu, _ in every), sum(wall for _, wall in every)


class Runs:
    """Runs that are done, by what they were given; with a file of JSON lines they outlive this process."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.runs: list[dict[str, Any]] = (
            [json.loads(line) for line in file.read_text().splitlines()] if file and file.is_file() else [])

    def once(self, key: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], say: Callable[[str], None]
             ) -> dict[str, Any]:
        """`key` and what work() found for it, now or earlier."""
        for one in self.runs:
            if one.items() >= key.items():
                return one
        self.runs.append({**key, **work()})
        line = json.dumps(self.runs[-1])
        say(line)
        if self._file:
            with self._file.open("a") as f:
                f.write(line + "\n")
        return self.runs[-1]


def environment(*packages: str) -> dict[str, Any]:
    """What figures depend on: usable cores, load (processes that want one, last minute), and installed versions."""
    installed = {d.name.lower(): d.version for d in metadata.distributions()}
    return {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "load": os.getloadavg()[0], "machine": platform.machine(), "python": platform.python_version(),
            "versions": {name: installed.get(name) for name in packages}}


def rounded(value: Any) -> Any:
    """The same structure with six significant digits in every float."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def process(module: str, *job: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python process of this module, with the job as JSON in its first argument, and pipes for stdin and stdout."""
    variables = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    with subprocess.Popen([sys.executable, "-P", "-m", module, json.dumps(job)], env=variables,
                          text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        try:
            yield running
        except BaseException:
            running.kill()
            raise


def finished(module: str, *job: Any) -> dict[str, Any]:
    """What a process of this module, given this job, wrote to stdout. Raises Unreachable `bench.process`."""
    with process(module, *job) as running:
        found, _ = running.communicate()
    if running.returncode:
        raise Unreachable("bench.process", "A process of the bench failed.", "Its error is above.")
    return dict(json.loads(found))
