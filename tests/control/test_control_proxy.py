"""Through an HTTP CONNECT proxy, as hospitals have them: it sees where to, and nothing else."""

from __future__ import annotations

import base64
import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from control_kit import HOST, Running, World, running

from fl_client.control_channel import Address
from privacy.errors import Refused, Unreachable, UsageError

ROBERT = base64.b64encode(b"robert:tables;").decode()


@dataclass
class Proxy:
    """answer: status of every CONNECT. target: where to connect whatever was asked for. asked: (target, credentials)."""

    answer: int = 200
    target: tuple[str, int] | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)
    port: int = 0

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_CONNECT(self) -> None:
                outer.asked.append((self.path, self.headers.get("Proxy-Authorization", "")))
                self.send_response(outer.answer)
                self.end_headers()
                if outer.answer != 200:
                    return
                host, port = self.path.rsplit(":", 1)
                with socket.create_connection(outer.target or (host, int(port))) as far:
                    back = threading.Thread(target=pump, args=(far, self.connection), daemon=True)
                    back.start()
                    pump(self.connection, far)
                    back.join(5)

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with suppress(OSError):
                while data := source.recv(2**16):
                    sink.sendall(data)
            with suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            self.port = server.server_address[1]
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join(5)


@pytest.fixture(autouse=True)
def no_proxies_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "http_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("way", ["option", "HTTPS_PROXY", "https_proxy"])
def test_both_connections_go_through_the_proxy(control: Running, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    with Proxy().running() as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        if way != "option":
            monkeypatch.setenv(way, url)
        client = control.client("clinic-a", proxy=url if way == "option" else None)
        assert client.contracts() == [control.world.contract.digest]
    assert proxy.asked == [(f"{HOST}:{control.server.port}", "")] * 2


def test_no_proxy_and_the_option_win_over_the_environment(control: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy().running() as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        monkeypatch.setenv("HTTPS_PROXY", url)
        control.client("clinic-a", proxy="").contracts()
        monkeypatch.setenv("NO_PROXY", "localhost,example.org")
        control.client("clinic-a").contracts()
        control.client("clinic-a", proxy=url).contracts()
    assert proxy.asked == []


def test_proxy_with_a_password(control: Running) -> None:
    with Proxy().running() as proxy:
        control.client("clinic-a", proxy=f"http://robert:tables%3B@127.0.0.1:{proxy.port}").contracts()
    assert [credentials for _, credentials in proxy.asked] == [f"Basic {ROBERT}"] * 2


def test_proxy_that_refuses(control: Running) -> None:
    with Proxy(answer=407).running() as proxy, pytest.raises(Unreachable) as caught:
        control.client("clinic-a", proxy=f"http://robert:secret-7@127.0.0.1:{proxy.port}").contracts()
    assert caught.value.code == "control.unreachable" and "secret-7" not in str(caught.value)


def test_attack_proxy_that_opens_tls(world: World, control: Running, tmp_path: Path) -> None:
    """It leads to a server of its own, with a certificate for the right host name."""
    with running(world, tmp_path, key=world.keys("clinic-b") / "tls.key",
                 certificate=world.issued("clinic-b") / "tls.pem") as opened, \
            Proxy(target=(HOST, opened.server.port)).running() as proxy, pytest.raises(Refused) as caught:
        control.client("clinic-a", proxy=f"http://127.0.0.1:{proxy.port}").contracts()
    assert caught.value.code == "control.untrusted" and len(proxy.asked) == 1


@pytest.mark.parametrize("url", ["http://h:1", "https://", "h:1", "https://h:1/x", "https://u:p@h:1", "https://h:99999", ""])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match=r"control\.url"):
        Address.parse(url, "")


def test_proxies_that_are_none() -> None:
    for proxy in ("https://p:1", "p:1", "socks5://p:1"):
        with pytest.raises(UsageError, match=r"control\.url"):
            Address.parse("https://h:1", proxy)
    assert Address.parse("https://h", "") == Address("h", 443)
    assert Address.parse("https://[::1]:5", "").target == "[::1]:5"
