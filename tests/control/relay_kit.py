"""A TCP relay that stands for a bad network: it holds bytes back, or lets them through one kB a second."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

PIECE_S = 0.05


@dataclass
class BadNetwork:
    """up, down: bytes that pass freely towards the server and back, on each connection; what follows goes at `per_s`
    bytes a second (0: never). `first` connections pass as they are."""

    target: tuple[str, int]
    up: int = 2**60
    down: int = 2**60
    per_s: int = 0
    first: int = 0
    port: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _sockets: list[socket.socket] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[BadNetwork]:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        threads = [threading.Thread(target=self._accept, args=(listener, []), daemon=True)]
        threads[0].start()
        try:
            yield self
        finally:
            self._stop.set()
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()

    def _accept(self, listener: socket.socket, made: list[int]) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self.target)
                self._sockets += [near, far]
                made.append(1)
                free = len(made) <= self.first
                for source, sink, limit in ((near, far, self.up), (far, near, self.down)):
                    threading.Thread(target=self._pump, args=(source, sink, 2**60 if free else limit), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, free: int) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data[:free])
                data, free = data[free:], max(0, free - len(data))
                while data:
                    if self._stop.wait(PIECE_S):
                        return
                    size = int(self.per_s * PIECE_S)
                    sink.sendall(data[:size])
                    data = data[size:]
            sink.shutdown(socket.SHUT_WR)
