"""The link through an institution's HTTP CONNECT proxy, plain or over TLS, and proxies that do something else."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from transport_kit import HOST, Pki, link_to, server

from fl_client.link import FleetLink
from privacy import ca, identity
from privacy.errors import Refused, Unreachable, UsageError
from privacy.identity import Role


@contextmanager
def connect_proxy(tls: ssl.SSLContext | None = None, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n",
                  elsewhere: int | None = None) -> Iterator[tuple[int, list[bytes]]]:
    """A CONNECT proxy on loopback; yields (port, request lines). elsewhere: the port to which it really connects."""
    lines: list[bytes] = []
    listener = socket.create_server((HOST, 0))
    listener.settimeout(0.2)
    stopping = threading.Event()

    def relay(arrived: socket.socket) -> None:
        arrived.settimeout(5)
        with tls.wrap_socket(arrived, server_side=True) if tls else arrived as client:
            head = b""
            while b"\r\n\r\n" not in head:
                part = client.recv(4096)
                if not part:
                    return
                head += part
            lines.append(head.split(b"\r\n")[0])
            client.sendall(answer)
            if b" 200 " not in answer[:20]:
                return
            host, _, port = head.split()[1].decode().rpartition(":")
            with socket.create_connection((host, elsewhere or int(port)), 5) as there:
                pair = [client, there]
                while not stopping.is_set():
                    if isinstance(client, ssl.SSLSocket) and client.pending():
                        ready = [client]
                    else:
                        ready = select.select(pair, [], [], 0.2)[0]
                    for each in ready:
                        data = each.recv(65536)
                        if not data:
                            return
                        (there if each is client else client).sendall(data)

    def serve() -> None:
        while not stopping.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=_quiet, args=(relay, client), daemon=True)
            threads.append(thread)
            thread.start()

    threads = [threading.Thread(target=serve)]
    threads[0].start()
    try:
        yield listener.getsockname()[1], lines
    finally:
        stopping.set()
        for thread in threads:
            thread.join(5)
        listener.close()


def _quiet(relay: Callable[[socket.socket], None], client: socket.socket) -> None:
    with suppress(OSError, ssl.SSLError):
        relay(client)


@pytest.fixture
def own_ca(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """The institution's CA (its root certificate), and a TLS context of a proxy that it certified."""
    ca.init(tmp_path / "ca", "Hospital IT")
    issued = ca.issue(tmp_path / "ca", identity.create_request(tmp_path / "proxy", "proxy", "Hospital IT"), Role.COORDINATOR,
                      hosts=["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    chain = tmp_path / "chain.pem"
    chain.write_bytes((issued.folder / "tls.pem").read_bytes() + (tmp_path / "ca" / "issuing-coordinator.pem").read_bytes())
    context.load_cert_chain(chain, tmp_path / "proxy" / "tls.key")
    return tmp_path / "ca" / "root.pem", context


def test_link_through_a_connect_proxy(pki: Pki) -> None:
    with server(pki) as fleet, connect_proxy() as (port, lines):
        with link_to(fleet, pki, "a", proxy=f"http://{HOST}:{port}") as link:
            assert link.connect() == fleet.nodes["a"]
        assert lines == [b"CONNECT %s:%d HTTP/1.1" % (HOST.encode(), fleet.port)]


def test_the_environments_proxy_and_its_exceptions(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(pki) as fleet, connect_proxy() as (port, lines):
        monkeypatch.setenv("HTTPS_PROXY", f"http://{HOST}:{port}")
        with link_to(fleet, pki, "a") as link:
            link.connect()
        assert len(lines) == 1
        monkeypatch.setenv("NO_PROXY", HOST)
        with link_to(fleet, pki, "a") as link:
            link.connect()
        assert len(lines) == 1


def test_a_proxy_over_tls_has_a_ca_of_its_own(pki: Pki, own_ca: tuple[Path, ssl.SSLContext]) -> None:
    root, context = own_ca
    with server(pki) as fleet, connect_proxy(context) as (port, lines):
        with link_to(fleet, pki, "a", proxy=f"https://localhost:{port}", proxy_ca=root) as link:
            link.connect()
        assert len(lines) == 1
        with link_to(fleet, pki, "a", proxy=f"https://localhost:{port}") as link, pytest.raises(Refused):
            link.connect()
        assert len(lines) == 1, "an unknown proxy isn't even asked"


def test_attack_a_proxy_that_opens_tls(pki: Pki, own_ca: tuple[Path, ssl.SSLContext]) -> None:
    """The institution's own CA is for the proxy's leg only: it doesn't make the proxy a coordinator."""
    root, context = own_ca
    listener = socket.create_server((HOST, 0))
    listener.settimeout(5)

    def open_tls() -> None:
        with suppress(OSError), listener.accept()[0] as tunnelled, context.wrap_socket(tunnelled, server_side=True):
            pass

    opener = threading.Thread(target=open_tls)
    opener.start()
    with server(pki) as fleet, connect_proxy(context, elsewhere=listener.getsockname()[1]) as (port, _), \
            link_to(fleet, pki, "a", proxy=f"https://localhost:{port}", proxy_ca=root) as link, \
            pytest.raises(Refused, match=r"link\.untrusted"):
        link.connect()
    opener.join(5)
    listener.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_attack_revoked_coordinator_behind_a_proxy(pki: Pki, own_ca: tuple[Path, ssl.SSLContext], scheme: str) -> None:
    """The certificate inside the tunnel is the one that counts, not the proxy's own."""
    pki.enrol(f"hub-{scheme}", Role.COORDINATOR)
    root, context = own_ca
    with server(pki, certificate=pki.cert(f"hub-{scheme}"), key=pki.key(f"hub-{scheme}")) as fleet, \
            connect_proxy(context if scheme == "https" else None) as (port, _):
        proxy = f"{scheme}://localhost:{port}"
        with link_to(fleet, pki, "a", proxy=proxy, proxy_ca=root) as link:
            assert link.connect() == fleet.nodes["a"]
        ca.revoke(pki.trust, f"hub-{scheme}")
        with link_to(fleet, pki, "a", proxy=proxy, proxy_ca=root) as link, \
                pytest.raises(Refused, match=r"identity\.revoked"):
            link.connect()


def test_a_proxy_that_refuses(pki: Pki) -> None:
    with server(pki) as fleet, connect_proxy(answer=b"HTTP/1.1 403 Forbidden\r\n\r\n") as (port, _), \
            link_to(fleet, pki, "a", proxy=f"http://{HOST}:{port}") as link, \
            pytest.raises(Unreachable, match=r"link\.proxy"):
        link.connect()


@pytest.mark.parametrize("proxy", ["ftp://x", "nonsense", "https://x:y"])
def test_a_proxy_that_is_none(pki: Pki, proxy: str) -> None:
    with pytest.raises(UsageError, match=r"link\.proxy"):
        FleetLink(f"https://{HOST}:1", pki.cert("a"), pki.key("a"), pki.issuing(Role.COORDINATOR),
                  check=lambda _: None, proxy=proxy)
