"""Frames between the agent and its trainer: a JSON header and one vector, over a pipe. No pickle, no shared objects."""

from __future__ import annotations

import os
import select
import struct
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.canonical import canonical, parse
from privacy.errors import Unreachable

_SIZES = struct.Struct("<IQ")
MAX_HEADER = 2**20
MAX_VECTOR = 2**32
NO_VECTOR: NDArray[np.float32] = np.zeros(0, np.float32)


def write_frame(fd: int, header: dict[str, Any], vector: NDArray[np.float32] = NO_VECTOR) -> None:
    text, raw = canonical(header), np.ascontiguousarray(vector, "<f4").tobytes()
    data = memoryview(_SIZES.pack(len(text), len(raw)) + text + raw)
    while data:
        data = data[os.write(fd, data):]


def read_frame(fd: int, *, timeout_s: float | None = None) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Raises Unreachable `trainer.gone` (the other end closed), `trainer.timeout`."""
    end = None if timeout_s is None else time.monotonic() + timeout_s
    header_size, vector_size = _SIZES.unpack(_read(fd, _SIZES.size, end))
    if header_size > MAX_HEADER or vector_size > MAX_VECTOR:
        raise Unreachable("trainer.gone", "The trainer's pipe holds something else.", "Restart the agent.")
    header = parse(_read(fd, header_size, end))
    return header, np.frombuffer(_read(fd, vector_size, end), "<f4").astype(np.float32)


def _read(fd: int, n: int, end: float | None) -> bytes:
    parts = []
    while n:
        if end is not None and not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
            raise Unreachable("trainer.timeout", "The trainer took too long.", "Raise the limit, or use a smaller model.")
        part = os.read(fd, min(n, 2**20))
        if not part:
            raise Unreachable("trainer.gone", "The trainer process ended.", "See the agent's log on this machine.")
        parts.append(part)
        n -= len(part)
    return b"".join(parts)
