"""The link's TLS: this site's identity, the proxy on the way, and whom the sockets are connected to.

Guarantees: nothing is sent over a connection before the certificate at its other end was checked, and nothing after the
check stops holding (a revocation list that names it, a list that ran out): every request looks again.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from privacy.errors import ConsiloError, UsageError
from privacy.files import read_private
from privacy.identity import Role
from privacy.trust_files import WatchedTrust

CheckServer = Callable[[x509.Certificate], None]


def coordinator_check(folder: Path) -> CheckServer:
    """Of a server's certificate, against the trust folder as it is at each call.

    Raises Refused `identity.crl_missing` at once where there is no revocation list of coordinators.
    """
    trust = WatchedTrust(folder, [Role.COORDINATOR])

    def check(server: x509.Certificate) -> None:
        trust.current().check(server, Role.COORDINATOR, usage="tls", at=datetime.now(UTC))

    return check


class Sockets:
    """Flower's interceptor that learns the connections' sockets and who is at their other end.

    check: raises Refused for a coordinator's certificate that doesn't hold (any more). proxied: the TLS to look at is
    the one inside the proxy's tunnel.
    """

    def __init__(self, check: CheckServer, *, proxied: bool) -> None:
        self._open: list[tuple[socket.socket, x509.Certificate]] = []
        self._check, self._event = check, f"{'proxy' if proxied else 'connection'}.start_tls.complete"

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        self.check()
        context.request.extensions["trace"] = self._trace
        return call_next(context)

    def check(self) -> None:
        """Raises what the check of a server's certificate raises, after the connections were cut."""
        self._open = [(each, server) for each, server in self._open if each.fileno() >= 0]
        try:
            for server in {server for _, server in self._open}:
                self._check(server)
        except ConsiloError:
            self.cut()
            raise

    def cut(self) -> None:
        """End reads and writes that are blocked in other threads."""
        for each, _ in self._open:
            try:
                socket.socket.shutdown(each, socket.SHUT_RDWR)
            except OSError:
                continue

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        if event != self._event:
            return
        stream = info["return_value"]
        shown = stream.get_extra_info("ssl_object").getpeercert(True)
        server = x509.load_der_x509_certificate(shown)
        try:
            self._check(server)
        except ConsiloError:
            stream.close()
            raise
        self._open.append((stream.get_extra_info("socket"), server))


def check_url(url: str) -> None:
    """Raises UsageError `link.url`."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL("")
    if parts.scheme != "https" or not parts.host:
        raise UsageError("link.url", "The coordinator's address isn't an https URL.", "Use https://host:port.")


def proxy_for(url: str, proxy: str | None, proxy_ca: Path | None) -> httpx.Proxy | None:
    """The proxy on the way, or None. It only relays: what passes through is TLS to the coordinator itself.

    Raises UsageError `link.proxy`.
    """
    host = httpx.URL(url).host
    if proxy is None and not proxy_bypass(host):
        proxy = getproxies().get("https")
    if not proxy:
        return None
    try:
        context = ssl.create_default_context(cafile=proxy_ca) if httpx.URL(proxy).scheme == "https" else None
        return httpx.Proxy(proxy, ssl_context=context)
    except (httpx.InvalidURL, ValueError, OSError) as e:
        raise UsageError("link.proxy", f"The proxy's address or CA can't be used ({type(e).__name__}).",
                         "Use http://host:port or https://host:port, and site.proxy_ca for the latter.") from e


def identity(tls_cert: Path, tls_key: Path, server_ca: Path) -> tuple[ec.EllipticCurvePrivateKey, ssl.SSLContext]:
    """This site's key, and a context that shows its certificate and trusts one issuing CA alone.

    Raises UsageError `link.certificate`, `key.missing`; Refused `key.permissions`.
    """
    pem = read_private(tls_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks chain and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    try:
        key = load_pem_private_key(pem, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not an EC key")
        context.load_cert_chain(tls_cert, tls_key)
        context.load_verify_locations(server_ca)
    except (OSError, ValueError, TypeError) as e:
        raise UsageError("link.certificate", f"Key or certificates can't be loaded ({type(e).__name__}).",
                         "Give tls.pem and tls.key of this site, and issuing-coordinator.pem, as the CA issued them.",
                         ) from e
    return key, context
