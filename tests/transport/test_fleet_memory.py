"""What each connection and each handler may hold at the coordinator. Memory itself: docs/benchmarks.md, `bench scale`."""

from __future__ import annotations

import threading
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from transport_kit import Pki, link_to, server

from fl_server.fleet_guard import WORKERS


def test_a_connections_buffer_is_small_and_handlers_are_few(pki: Pki) -> None:
    seen: dict[str, Any] = {}
    with server(pki) as fleet, link_to(fleet, pki, "a") as link:
        link.connect()
        done = threading.Event()

        def look() -> None:
            seen["workers"] = current_default_thread_limiter().total_tokens
            seen["buffers"] = [len(connection.transport._ssl_protocol._ssl_buffer)
                               for connection in fleet._server.server_state.connections]
            done.set()

        fleet._guard.call_soon(look)
        assert done.wait(10)
    assert seen["workers"] == WORKERS < 40
    assert seen["buffers"] == [32 * 1024]
