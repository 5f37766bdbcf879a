"""A TCP forwarder that can be a bad network: `python forward.py FROM_HOST FROM_PORT TO_HOST TO_PORT` is a good one, until
its stdin ends."""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import suppress

PIECE_S = 0.05


class Forwarder:
    """Listens at `here` (port 0: a free one, see `port`) and forwards each connection to `there`.

    per_s: bytes a second and direction, of each connection; 0: as many as come. delay_s: before each piece. half: what comes
    in then goes on up to its middle, and no further: that way is closed, the way back stays open and silent.
    """

    def __init__(self, there: tuple[str, int], here: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.there, self.per_s, self.delay_s, self.half = there, 0, 0.0, False
        self._listener = socket.create_server(here)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._connect, args=self._listener.accept()[:1], daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with suppress(OSError), near, socket.create_connection(self.there, timeout=5) as far:
            far.settimeout(None)
            back = threading.Thread(target=self._pump, args=(far, near), daemon=True)
            back.start()
            self._pump(near, far, halved=True)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, halved: bool = False) -> None:
        with suppress(OSError):
            while data := source.recv(max(1, int(self.per_s * PIECE_S)) if self.per_s else 65536):
                time.sleep(PIECE_S if self.per_s else self.delay_s)
                if self.half and halved:
                    sink.sendall(data[:len(data) // 2])
                    sink.shutdown(socket.SHUT_WR)
                    while source.recv(65536):
                        pass
                    return
                sink.sendall(data)
        if not self.half:
            with suppress(OSError):
                sink.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    host, port, to_host, to_port = sys.argv[1:]
    forwarder = Forwarder((to_host, int(to_port)), (host, int(port)))
    print("ready", flush=True)
    sys.stdin.read()
