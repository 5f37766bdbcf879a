"""Frames between the agent and its trainer: a JSON header and raw bytes, over two pipes. No pickle, no shared objects.

Neither side trusts the other to read, to write or to end: sizes are bounded, and every wait has a deadline.
"""

from __future__ import annotations

import os
import select
import struct
import time
from typing import Any

from privacy.canonical import canonical, parse
from privacy.errors import Unreachable, UsageError

_SIZES = struct.Struct("<IQ")
MAX_HEADER = 2**20
MAX_PAYLOAD = 2**32


class Peer:
    """One end. source, sink: pipes, made non-blocking. gone: a pidfd, readable once the process at the other end has
    exited; a child of it that keeps the pipe open is not waited for.

    Methods raise Unreachable `trainer.gone` (the other end closed, exited or wrote something else), and
    `trainer.timeout` where `end`, in seconds of the monotonic clock, has passed.
    """

    def __init__(self, source: int, sink: int, gone: int | None = None) -> None:
        self._source, self._sink, self._gone = source, sink, gone
        for fd in (source, sink):
            os.set_blocking(fd, False)

    def send(self, header: dict[str, Any], payload: bytes = b"", *, end: float | None = None) -> None:
        text = canonical(header)
        data = memoryview(_SIZES.pack(len(text), len(payload)) + text + payload)
        try:
            while data:
                self._wait(self._sink, select.POLLOUT, end)
                data = data[os.write(self._sink, data):]
        except BrokenPipeError as e:
            raise _gone() from e

    def receive(self, *, limit: int = MAX_PAYLOAD, end: float | None = None) -> tuple[dict[str, Any], bytes]:
        """limit: most bytes of payload."""
        header_size, size = _SIZES.unpack(self._read(_SIZES.size, end))
        if header_size > MAX_HEADER or size > limit:
            raise _strange()
        try:
            header = parse(self._read(header_size, end))
        except UsageError as e:
            raise _strange() from e
        if not isinstance(header, dict):
            raise _strange()
        return header, self._read(size, end)

    def _read(self, n: int, end: float | None) -> bytes:
        parts = []
        while n:
            self._wait(self._source, select.POLLIN, end)
            part = os.read(self._source, min(n, 2**20))
            if not part:
                raise _gone()
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def _wait(self, fd: int, event: int, end: float | None) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if self._gone is not None:
            poll.register(self._gone, select.POLLIN)
        ready = {found for found, _ in poll.poll(None if end is None else 1000 * max(0.0, end - time.monotonic()))}
        if not ready:
            raise Unreachable("trainer.timeout", "The trainer took too long.", "Raise the limit, or use a smaller model.")
        if fd not in ready:
            raise _gone()


def _strange() -> Unreachable:
    return Unreachable("trainer.gone", "The trainer's pipe holds something else.", "Restart the agent.")


def _gone() -> Unreachable:
    return Unreachable("trainer.gone", "The trainer process ended.", "See the agent's log on this machine.")
