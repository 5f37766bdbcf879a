"""Peak memory of a client's data path: what is allocated (tracemalloc) and what the kernel sees (a fresh process)."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privacy.secagg import prg
from privacy.secagg.encoding import Encoding

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def traced_bytes(encoding: Encoding, update: NDArray[np.float32], neighbours: int, threads: int) -> int:
    """Most bytes alive at once in encoding and masking, input and output included."""
    tracemalloc.start()
    try:
        _encode_and_mask(encoding, update, neighbours, threads)
        return update.nbytes + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def resident_bytes(encoding: Encoding, seed: int, neighbours: int, threads: int) -> int | None:
    """The same by resident pages, in a process of its own. None where the kernel doesn't tell (it must be Linux)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_resident, encoding, seed, neighbours, threads).result()


def _resident(encoding: Encoding, seed: int, neighbours: int, threads: int) -> int | None:
    update = np.random.default_rng(seed).uniform(-1, 1, encoding.dim).astype(np.float32)
    tiny = Encoding(bits=encoding.bits, ring=encoding.ring, cohort=encoding.cohort, ranges=((1, encoding.ranges[0][1]),))
    _encode_and_mask(tiny, update[:1], neighbours, threads)  # loads what is loaded once
    grown = peak_growth(lambda: _encode_and_mask(encoding, update, neighbours, threads))
    return None if grown is None else update.nbytes + grown


def peak_growth(work: Callable[[], object]) -> int | None:
    """Most resident bytes of this process while `work` runs, less those before it. None where the kernel doesn't tell."""
    try:
        _CLEAR.write_text("5")  # proc(5): the peak starts from here
        before = status("VmRSS")
        work()
        return status("VmHWM") - before
    except (OSError, KeyError):
        return None


def _encode_and_mask(encoding: Encoding, update: NDArray[np.float32], neighbours: int, threads: int) -> None:
    y = encoding.encode(update, 1.0, consume=True)
    prg.add_masks(y, [(os.urandom(32), 1) for _ in range(neighbours + 1)], threads=threads)


def status(name: str) -> int:
    """Bytes of a field of this process' memory (VmRSS: resident now; VmHWM: at most so far). Raises OSError, KeyError."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def resident(name: str) -> int | None:
    """`status`, or None where the kernel doesn't tell."""
    try:
        return status(name)
    except (OSError, KeyError):
        return None
