"""The way to the coordinator's control plane: address, proxy, the server's certificate, the gRPC channel.

Guarantees: before anything is sent, the certificate that the server shows (TLS 1.3) is fetched by a handshake of its own
and checked in full; the channel then trusts that one certificate and no other, whatever is in between. Errors are said
in our own words.

A proxy (HTTP CONNECT) comes from `proxy`, else from HTTPS_PROXY or https_proxy; NO_PROXY counts in both cases.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from privacy.control import MAX_REPLY_BYTES, MAX_REQUEST_BYTES
from privacy.control.reasons import REASONS, reason
from privacy.errors import ConsiloError, Refused, Unreachable, UsageError
from privacy.identity import Role
from privacy.trust import TrustStore

CONNECT_S = 10.0
_STATUS = grpc.StatusCode


@dataclass(frozen=True)
class Address:
    """host and port of the server; proxy: `http://[user:password@]host:port`, or "" for none."""

    host: str
    port: int
    proxy: str = ""

    @classmethod
    def parse(cls, url: str, proxy: str | None = None) -> Address:
        """Raises UsageError `control.url`."""
        host, port = _host(url, "https")
        if proxy_bypass(host):
            return cls(host, port)
        proxy = getproxies_environment().get("https", "") if proxy is None else proxy
        if proxy:
            _host(proxy, "http")
        return cls(host, port, proxy)

    @property
    def target(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def shown_certificate(address: Address, timeout_s: float = CONNECT_S) -> x509.Certificate:
    """What the server shows in a handshake in which nothing else is sent; its issuer is not yet checked.

    Raises Unreachable `control.unreachable`; Refused `control.untrusted` (no TLS 1.3, or for another host).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with _connect(address, timeout_s) as plain, context.wrap_socket(plain, server_hostname=address.host) as tls:
            certificate = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
        if address.host not in _hosts(certificate):
            raise untrusted()
    except (ssl.SSLError, ValueError) as e:
        raise untrusted() from e
    except (OSError, http.client.HTTPException) as e:
        raise Unreachable("control.unreachable", "The coordinator's control plane can't be reached.",
                          "Check address, port, proxy and network.") from e
    return certificate


def require_coordinator(trust: TrustStore, server: x509.Certificate, at: datetime) -> None:
    """Raises Refused `control.untrusted`, `identity.expired`, `identity.revoked`, `identity.crl_stale`."""
    try:
        trust.check(server, Role.COORDINATOR, usage="tls", at=at)
    except Refused as e:
        if e.code in ("identity.untrusted", "identity.role", "identity.usage"):
            raise untrusted() from e
        raise


@contextmanager
def open_channel(address: Address, server: x509.Certificate, key: bytes | None = None,
                 certificate: bytes | None = None) -> Iterator[grpc.Channel]:
    """A channel to the holder of exactly that certificate, under the address' host name. key, certificate: ours, PEM."""
    tls = grpc.ssl_channel_credentials(server.public_bytes(Encoding.PEM), key, certificate)
    options: list[tuple[str, str | int]] = [
        ("grpc.max_receive_message_length", MAX_REPLY_BYTES), ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
        ("grpc.enable_retries", 0), ("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.enable_http_proxy", int(bool(address.proxy)))]
    if address.proxy:
        options.append(("grpc.http_proxy", address.proxy))
    with grpc.secure_channel(address.target, tls, options) as channel:
        yield channel


def explain(error: grpc.RpcError) -> ConsiloError:
    """Of a call that failed. A text from the other side is used only as a key of `REASONS`."""
    status, details = error.code(), error.details()
    if details in REASONS and status.name == REASONS[details].status:
        return reason(details)
    if status in (_STATUS.DEADLINE_EXCEEDED, _STATUS.CANCELLED):
        return Unreachable("control.deadline", "The call took longer than it may.", "Try again; check the network.")
    if status is _STATUS.RESOURCE_EXHAUSTED:
        return reason("control.busy")
    if status is _STATUS.UNIMPLEMENTED:
        return UsageError("control.version", "The coordinator doesn't know this call.", "Compare the versions.")
    if status is _STATUS.UNAVAILABLE:
        return Unreachable("control.refused", "The coordinator, which was there a moment ago, closed the connection: it "
                           "doesn't accept this certificate, or no more connections.",
                           "Check that the certificate is in force and of a role that may connect; try again.")
    return reason("internal.bug")


def untrusted() -> Refused:
    return Refused("control.untrusted", "The server's certificate is not one of this consortium's coordinator; nothing "
                   "was sent.", "Check the address; if a proxy opens TLS, have it make an exception.")


def _connect(address: Address, timeout_s: float) -> socket.socket:
    if not address.proxy:
        return socket.create_connection((address.host, address.port), timeout_s)
    proxy = urlsplit(address.proxy)
    via = http.client.HTTPConnection(str(proxy.hostname), proxy.port or 80, timeout=timeout_s)
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}" if proxy.username else ""
    via.set_tunnel(address.host, address.port,
                   {"Proxy-Authorization": f"Basic {b64encode(login.encode()).decode()}"} if login else {})
    via.connect()
    return via.sock


def _host(url: str, scheme: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if scheme == "https" else 80)
    except ValueError:
        host, port = None, 0
    if not host or parts.scheme != scheme or parts.path not in ("", "/") or (scheme == "https" and parts.username):
        raise UsageError("control.url", f"The address is not of the form {scheme}://host:port.", "Correct it.")
    return host, port


def _hosts(certificate: x509.Certificate) -> list[str]:
    """The host names and addresses that a certificate is for; the CA issues no wildcards."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension):
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
