"""`fl-simulate bench strategies`: every rule on one task, at silos that hold few classes and at silos that are alike.

The task is simulations/bench_strategies_task.py. With `sweep`, the same against how few classes a silo holds, LoRA's rank
and epsilon: what docs/figures/strategies.svg shows. docs/benchmarks.md documents every field.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from simulations.bench import Runs, environment
from simulations.bench_strategies_task import LEARNING_RATE, Bench, Task
from simulations.sentences import CLASSES, load
from strategies.rules import RULES

# Rules that train fewer numbers than A and B take larger steps: the best of 0.005, 0.02 and 0.1 at label skew on seed 0.
LEARNING_RATES = {"fedsb": 0.1, "ffa": 0.02, "krum": 0.02, "trimmed_mean": 0.02, "median": 0.02}
MARGIN, ALIKE = 0.05, 0.015  # exact over fedit on skewed silos, at least; between them on silos that are alike, at most
SWEEP: dict[str, tuple[Any, ...]] = {"classes": (1, 2, 4, 8), "rank": (1, 2, 4, 8, 16), "epsilon": (None, 8.0, 1.0)}
Say = Callable[[str], None]


def run(task: Task, *, rules: Sequence[str], seeds: Sequence[int], sweep: bool = False, keep: Path | None = None,
        threads: int = 1, say: Say = lambda line: None) -> dict[str, Any]:
    """All figures of docs/benchmarks.md, `bench strategies`. keep: JSON lines of runs that are done; they aren't repeated.

    Raises as `sentences.load`, and UsageError `dp.*`.
    """
    torch.set_num_threads(threads)
    at_start, data, done = environment("numpy", "torch"), load(), Runs(keep)

    def accuracy(cell: Task, name: str, seed: int) -> float:
        def play() -> dict[str, Any]:
            start, bench = time.process_time(), Bench(data, cell, RULES[name], seed, LEARNING_RATES.get(name, LEARNING_RATE))
            return {"accuracy": bench.accuracy(), "cpu_s": time.process_time() - start}

        key = {"rule": name, "seed": seed, "learning_rate": LEARNING_RATES.get(name, LEARNING_RATE), **asdict(cell)}
        return float(done.once(key, play, say)["accuracy"])

    def table(cell: Task) -> dict[str, list[float]]:
        return {name: [accuracy(cell, name, seed) for seed in seeds] for name in rules}

    samples = {"label_skew": table(task), "iid": table(replace(task, classes=len(CLASSES)))}
    found = {"bench": "strategies", "silos": task.silos, "classes": task.classes, "rank": task.rank, "epsilon": task.epsilon,
             "rounds": task.rounds, "local_steps": task.local_steps, "seeds": list(seeds), "dtype": "float32",
             "learning_rates": {name: LEARNING_RATES.get(name, LEARNING_RATE) for name in rules}, "environment": at_start}
    found |= {name: {rule: mean(taken) for rule, taken in cells.items()} for name, cells in samples.items()}
    if {"exact", "fedit"} <= set(rules):
        found["goals"] = _goals(found)
    found["samples"] = samples
    if sweep:
        found["sweep"] = {name: [{"at": at, "accuracy": table(replace(task, **{name: at}))} for at in points]
                          for name, points in SWEEP.items()}
    return found | {"cpu_s": sum(one["cpu_s"] for one in done.runs)}


def _goals(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    skew, alike = (found[name]["exact"] - found[name]["fedit"] for name in ("label_skew", "iid"))
    return {"label_skew_exact_less_fedit": {"value": skew, "least": MARGIN, "met": skew >= MARGIN},
            "iid_exact_less_fedit": {"value": alike, "limit": ALIKE, "met": abs(alike) <= ALIKE}}


def render(found: dict[str, Any]) -> str:
    """The same for people."""
    privacy = "no DP" if found["epsilon"] is None else f"epsilon {found['epsilon']:g}"
    lines = [f"{found['silos']} silos, rank {found['rank']}, {found['rounds']} x {found['local_steps']} steps, {privacy}, "
             f"seeds {', '.join(map(str, found['seeds']))}: accuracy (least-most)", "",
             f"{'rule':<14}{found['classes']} classes each{'':<8}all classes each"]
    for rule in found["label_skew"]:
        cells = (f"{found[name][rule]:.3f} ({min(taken):.3f}-{max(taken):.3f})"
                 for name, taken in ((n, found["samples"][n][rule]) for n in ("label_skew", "iid")))
        lines.append(f"{rule:<14}" + "".join(f"{cell:<23}" for cell in cells))
    lines += ["", *(f"{name}: {100 * goal['value']:+.1f} points, goal {'met' if goal['met'] else 'MISSED'}"
                    for name, goal in found.get("goals", {}).items())]
    return "\n".join(lines)
