"""`fl-simulate bench dp-step`: a private LoRA step by the fused engine, beside the same step without privacy and by Opacus.

Steps take turns in one process, in rotating order; ratios are medians over the turns, of CPU seconds. The private step is
the product's whole release: draw, clip, sum on the lattice, noise, division, SGD. docs/benchmarks.md documents every field.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from privacy.engine import gradients
from simulations.bench import Samples, environment
from simulations.bench_dp_models import Step, Task, build, engine, opacus, plain
from simulations.bench_memory import peak_growth

RATIO, MEMORY, NORM_ERROR = 1.05, 1.05, 1e-5  # goals: of a plain step, of its memory; relative
# glibc gives blocks from this size on back at once: so the peak is what a step holds, and not where freed blocks lay
MMAP_THRESHOLD = 65536
FUSED, PLAIN, HOOKS, GHOST = "fused", "plain", "opacus hooks", "opacus ghost"


def run(*, model: str, batch: int, length: int, rank: int, repeats: int, threads: int, seed: int) -> dict[str, Any]:
    """All figures of docs/benchmarks.md, `bench dp-step`."""
    at_start, before = environment("torch", "opacus", "peft", "transformers", "numpy"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        task = build(model, batch, length, rank, seed)
        steps: dict[str, Step] = {
            PLAIN: plain(task.copy()), FUSED: engine("fused", task.copy()), "opacus engine": engine("opacus", task.copy()),
            HOOKS: opacus(task.copy(), ghost=False), GHOST: opacus(task.copy(), ghost=True)}
        samples, names = Samples(), list(steps)
        for step in steps.values():  # what happens once
            step()
        for turn in range(repeats):
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                samples.take(name, steps[name])
        error = norm_error(task)
    finally:
        torch.set_num_threads(before)
    memory = {name: _peak((model, batch, length, rank, seed), name, threads) for name in (PLAIN, FUSED)}
    grown, base = memory[FUSED], memory[PLAIN]
    found: dict[str, Any] = {
        "bench": "dp-step", "model": model, "batch": batch, "length": length, "rank": rank, "repeats": repeats,
        "threads": threads, "seed": seed, "dim": sum(p.numel() for p in task.parameters.values()), "environment": at_start}
    found |= {"ratio_plain": _ratio(samples, FUSED, PLAIN),
             "ratio_plain_wall": _ratio(samples, FUSED, PLAIN, wall=True),
             "ratio_opacus_hooks": _ratio(samples, FUSED, HOOKS), "ratio_opacus_ghost": _ratio(samples, FUSED, GHOST),
             "to_plain": {name: _ratio(samples, name, PLAIN) for name in names if name != PLAIN},
             "memory_ratio": grown / base if grown and base else None, "memory_bytes": memory, "max_norm_error": error,
             "step_s": {name: {"cpu_s": samples.cpu(name), "wall_s": samples.wall(name)} for name in names}}
    found["goals"] = {name: {"value": found[name], "limit": limit, "met": found[name] is not None and found[name] <= limit}
                      for name, limit in (("ratio_plain", RATIO), ("memory_ratio", MEMORY), ("max_norm_error", NORM_ERROR))}
    found["exact"] = found["goals"]["max_norm_error"]["met"]
    found["samples"] = dict(samples.taken)
    return found


def norm_error(task: Task) -> float:
    """Largest relative error of a record's norm against float32 autograd of that record alone."""
    parameters, norms = list(task.parameters.values()), []
    for record in range(task.records):
        parts = torch.autograd.grad(task.losses(np.array([record])).sum(), parameters)
        norms.append(float(torch.cat([part.ravel() for part in parts]).double().norm()))
    grads = gradients("fused", task.module, task.parameters, task.losses)
    got = np.linalg.norm(grads._chunk(np.arange(task.records)).astype(np.float64), axis=1)
    return float(np.abs(got / np.array(norms) - 1).max())


def _ratio(samples: Samples, name: str, base: str, *, wall: bool = False) -> float:
    return median(a[wall] / b[wall] for a, b in zip(samples.taken[name], samples.taken[base], strict=True))


def _peak(sizes: tuple[str, int, int, int, int], name: str, threads: int) -> int | None:
    """Most resident bytes that one step adds, in a process of its own. None where the kernel doesn't tell."""
    with (patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)}),
          ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool):
        return pool.submit(_peak_here, sizes, name, threads).result()


def _peak_here(sizes: tuple[str, int, int, int, int], name: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    task = build(*sizes)
    make = plain if name == PLAIN else lambda of: engine("fused", of)
    make(task.first(1))()  # loads what is loaded once
    return peak_growth(make(task))


def render(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{found['model']}, {found['batch']} records of {found['length']} tokens, rank {found['rank']}, "
             f"{found['dim']} trained values, {found['threads']} thread(s), {found['repeats']} repetitions", ""]
    for name, goal in found["goals"].items():
        value = "-" if goal["value"] is None else f"{goal['value']:.4g}"
        lines.append(f"{name:<20}{value:>12}   goal {goal['limit']:<10.4g} {'met' if goal['met'] else 'MISSED'}")
    lines += ["", f"{'step':<20}{'CPU ms':>12}{'wall ms':>12}{'to plain':>12}"]
    lines += [f"{name:<20}{cost['cpu_s'] * 1e3:>12.1f}{cost['wall_s'] * 1e3:>12.1f}"
              f"{found['to_plain'].get(name, 1.0):>12.3f}" for name, cost in found["step_s"].items()]
    return "\n".join(lines)
