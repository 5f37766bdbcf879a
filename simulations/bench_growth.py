"""`fl-simulate bench growth`: how the coordinator's memory, CPU and files grow with sites, parameters and rounds.

Sites and parameters: each size is measured as by `bench scale` over a pipe, in a process of its own. Rounds: one whole run
of the product's coordinator (journal, transparency log, statements, evidence) and of its sites (ledgers, journals) in one
process over the in-process grid, with a tiny adapter and no training; what the sites do is timed apart. Looked at after
each round. docs/benchmarks.md documents every field.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fl_server.exchange import Exchange
from simulations.bench import environment, finished
from simulations.bench_memory import resident
from simulations.bench_scale import GROUP, RATIO, ROUNDS, measured
from simulations.chaos_parts import COORDINATOR, LARGEST, Consortium, Job, cheap_coordinator, spec_of
from simulations.inprocess import InProcessGrid

MODULE = "simulations.bench_growth"
FILES = {"coordinator's journal": ("coordinator/journal.jsonl",), "evidence": ("coordinator/evidence",),
         "transparency log": ("log",), "newest adapters": ("coordinator/rounds",),
         "a site's journal": ("site-a/rounds.jsonl",), "a site's ledger": ("site-a/ledger.jsonl",)}


@dataclass(frozen=True)
class Sizes:
    """What is measured. sites: each with `dim` values. dims: each with `few` sites. rounds: of one run with `few` sites."""

    sites: tuple[int, ...] = (8, 16, 32, 64, 128)
    dim: int = 10_000
    dims: tuple[int, ...] = (10_000, 100_000, 1_000_000, 4_000_000)
    few: int = 8
    rounds: int = 60


QUICK = Sizes(sites=(3,), dim=100, dims=(100,), few=3, rounds=3)


def run(sizes: Sizes) -> dict[str, Any]:
    """All figures of docs/benchmarks.md, `bench growth`. Raises Unreachable `bench.process`."""
    at_start, known = environment("numpy", "cryptography", "flwr"), dict[tuple[int, int], dict[str, Any]]()

    def point(sites: int, dim: int) -> dict[str, Any]:
        if (sites, dim) not in known:
            known[sites, dim] = measured(sites, dim, False)
        got = known[sites, dim]
        return {"sites": sites, "dim": dim, "peak_rss_mib": _mib(got["peak_bytes"]), "exact": got["exact"],
                "cpu_s_per_site": got["cpu_s"] / sites / ROUNDS, "wall_s": got["wall_s"] / ROUNDS}

    by_sites, by_dim = [point(n, sizes.dim) for n in sizes.sites], [point(sizes.few, dim) for dim in sizes.dims]
    by_round = finished(MODULE, sizes.few, sizes.rounds)
    found: dict[str, Any] = {"bench": "growth", "environment": at_start, "group": GROUP, "dtype": "uint32",
             "sites": by_sites, "parameters": by_dim, "rounds": by_round,
             "exact": all(one["exact"] for one in (*by_sites, *by_dim)) and by_round["complete"],
             "memory_ratio_sites": _ratio(by_sites), "memory_bytes_per_value": _slope(by_dim),
             "memory_ratio_rounds": _ratio(by_round["points"][len(by_round["points"]) // 6:])}
    found["goals"] = {name: {"value": found[name], "limit": RATIO, "met": found[name] <= RATIO}
                      for name in ("memory_ratio_sites", "memory_ratio_rounds") if found[name] is not None}
    return found


def _ratio(points: Sequence[dict[str, Any]]) -> float | None:
    """Memory of the last point to the first."""
    first, last = points[0]["peak_rss_mib"], points[-1]["peak_rss_mib"]
    return None if first is None or last is None else float(last / first)


def _slope(points: Sequence[dict[str, Any]]) -> float | None:
    """Peak bytes for each value more, from the smallest to the largest size; None with one size."""
    first, last = points[0], points[-1]
    if first["peak_rss_mib"] is None or first["dim"] == last["dim"]:
        return None
    return float((last["peak_rss_mib"] - first["peak_rss_mib"]) * 2**20 / (last["dim"] - first["dim"]))


def _mib(value: int | None) -> float | None:
    return None if value is None else value / 2**20


class TimedGrid(InProcessGrid):
    """site_s: CPU seconds of this process while a site handled a message."""

    site_s = 0.0

    def _handle(self, message: Any) -> Any | None:
        start = time.process_time()
        try:
            return super()._handle(message)
        finally:
            self.site_s += time.process_time() - start


def play(sites: int, rounds: int) -> dict[str, Any]:
    """One run of so many rounds, looked at after each."""
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="consilo-") as name, cheap_coordinator(lambda adapter: None):
        folder = Path(name)
        made = Consortium(folder / "trust", sites)
        settings = made.settings(f"privacy.rounds={rounds}", "privacy.sigma=20.0", f"server.out={folder / COORDINATOR}",
                                 f"server.log={folder / 'log'}")
        job = Job.make("growth", made, settings, cap=100.0)
        apps = {}
        for node, site in enumerate(made.sites, 1):
            state = folder / site
            state.mkdir(mode=0o700)
            job.approve(made, site, state)
            apps[node] = job.agent(made, site, state, _drawn(node, spec_of(job.contract).dim), lambda handlers: handlers)[0]
        grid, start, wall = TimedGrid(apps), 0.0, time.perf_counter()

        def look(event: dict[str, Any]) -> None:
            nonlocal start, wall
            if event["event"] == "round":
                points.append({"round": event["round"], "rss_mib": _mib(resident("VmRSS")),
                               "peak_rss_mib": _mib(resident("VmHWM")),
                               "cpu_s": time.process_time() - start - grid.site_s, "site_cpu_s": grid.site_s / sites,
                               "wall_s": time.perf_counter() - wall,
                               "bytes": {what: sum(map(_size, (folder / one for one in paths)))
                                         for what, paths in FILES.items()}})
            grid.site_s, start, wall = 0.0, time.process_time(), time.perf_counter()

        job.coordinator(made, Exchange(grid, {site: node for node, site in enumerate(made.sites, 1)}), look).run()
    return {"sites": sites, "dim": spec_of(job.contract).dim, "points": points,
            "complete": [point["round"] for point in points] == list(range(1, rounds + 1)),
            "bytes_per_round": _per_round(points)}


def _drawn(node: int, dim: int) -> Any:
    return lambda no: np.random.default_rng((node, no)).uniform(-LARGEST, LARGEST, dim).astype(np.float32)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    if path.is_dir():
        return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    return path.stat().st_size if path.is_file() else 0


def _per_round(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bytes that a round adds, over the second half of the run."""
    first, last = points[len(points) // 2 - (len(points) == 1)], points[-1]
    span = max(1, last["round"] - first["round"])
    return {what: (last["bytes"][what] - first["bytes"][what]) / span for what in FILES}


def render(found: dict[str, Any]) -> str:
    """The same for people."""
    def memory(value: float | None) -> str:
        return f"{'unknown':>12}" if value is None else f"{value:>12.1f}"

    lines = [f"means right, run complete: {'yes' if found['exact'] else 'NO'}", "",
             f"{'sites':>8}{'values':>10}{'peak MiB':>12}{'CPU ms a site and round':>26}"]
    lines += [f"{one['sites']:>8}{one['dim']:>10}{memory(one['peak_rss_mib'])}{1e3 * one['cpu_s_per_site']:>26.2f}"
              for one in (*found["sites"], *found["parameters"])]
    points, run_ = found["rounds"]["points"], found["rounds"]
    lines += ["", f"{'round':>8}{'':>10}{'peak MiB':>12}{'CPU ms a site and round':>26}"]
    lines += [f"{one['round']:>8}{'':>10}{memory(one['peak_rss_mib'])}{1e3 * one['cpu_s'] / run_['sites']:>26.2f}"
              for one in points[::max(1, len(points) // 6)]]
    lines += ["", "bytes that a round adds"]
    lines += [f"{what:<24}{value:>10.0f}" for what, value in run_["bytes_per_round"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(play(*json.loads(sys.argv[1]))))
