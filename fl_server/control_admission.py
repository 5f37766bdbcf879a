"""Who may call which method of the control plane.

Guarantees: a method that no table names is refused; a certificate is checked on every call, against revocation lists that
are read anew when they change.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import grpc
from cryptography import x509

from privacy import trust_files
from privacy.control.reasons import reason
from privacy.errors import ConsiloError, Refused
from privacy.identity import Peer, Role, load_certificate
from privacy.trust import TrustStore

REMEMBERED = 4096  # addresses whose rate is kept

_CALLER: ContextVar[Peer] = ContextVar("caller")
READERS = (Role.SITE, Role.ENGINEER, Role.AUDITOR)
_V1 = "/consilo.control.v1."
ROLES: Mapping[str, tuple[Role, ...]] = {
    _V1 + "Roster/Get": READERS,
    _V1 + "Contracts/List": READERS,
    _V1 + "Contracts/Get": READERS,
    _V1 + "Contracts/Approve": (Role.SITE,),
    _V1 + "Evidence/Fetch": READERS,
    _V1 + "Adapters/Fetch": (Role.SITE, Role.ENGINEER),
    "/grpc.health.v1.Health/Check": READERS,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": (Role.ENGINEER,),
}
OPEN: Mapping[str, tuple[int, float]] = {  # calls at once, calls a second, of one address
    _V1 + "Enrolment/Authorities": (30, 1.0),
    _V1 + "Enrolment/Submit": (6, 0.02),
    _V1 + "Enrolment/Poll": (30, 1.0),
    "/grpc.health.v1.Health/Check": (30, 1.0),
}


def caller() -> Peer:
    """Whoever made the call that is being served; of the port with client certificates only."""
    return _CALLER.get()


class Admission(Protocol):
    """Raises an error of `REASONS`, or returns the key under which the peer's calls are counted."""

    def __call__(self, method: str, context: grpc.ServicerContext) -> str: ...


class WatchedTrust(trust_files.WatchedTrust):
    """The coordinator's trust folder, with a revocation list for each role that may call."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, READERS)

    def current(self) -> TrustStore:
        """Raises Unreachable `control.store` as long as the folder holds something that can't be trusted."""
        try:
            return super().current()
        except (ConsiloError, OSError) as e:
            raise reason("control.store") from e


class RoleAdmission:
    """By the client's certificate: TLS 1.3, a valid chain, not revoked at this moment, of a role that may call."""

    def __init__(self, trust: WatchedTrust, roles: Mapping[str, tuple[Role, ...]] = ROLES) -> None:
        self._trust, self._roles = trust, roles

    def __call__(self, method: str, context: grpc.ServicerContext) -> str:
        shown: Any = context.auth_context()
        if list(shown.get("ssl_tls_version", ())) != [b"TLSv1.3"]:
            raise reason("control.tls")
        trust = self._trust.current()
        peer = self._check(trust, load_certificate(shown["x509_pem_cert"][0]), self._roles.get(method, ()))
        _CALLER.set(peer)
        return peer.name

    def _check(self, trust: TrustStore, certificate: x509.Certificate, roles: tuple[Role, ...]) -> Peer:
        for role in roles:
            try:
                return trust.check(certificate, role, usage="tls", at=datetime.now(UTC))
            except Refused as e:
                if e.code == "identity.crl_stale":
                    raise reason("control.store") from e
                if e.code != "identity.role":
                    raise
        raise reason("control.role")


class OpenAdmission:
    """Without a client certificate: only the methods of `OPEN`, each address at its rate (an IPv6 /64 is one address)."""

    def __init__(self, methods: Mapping[str, tuple[int, float]] = OPEN,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._rates = {method: Rate(burst, per_s, clock) for method, (burst, per_s) in methods.items()}

    def __call__(self, method: str, context: grpc.ServicerContext) -> str:
        if method not in self._rates:
            raise reason("control.role")
        address = _address(context.peer())
        self._rates[method].spend(address)
        return address


class Rate:
    """A token bucket for each key; of more than `REMEMBERED` keys the longest unused are forgotten."""

    def __init__(self, burst: int, per_s: float, clock: Callable[[], float]) -> None:
        self._burst, self._per_s, self._clock, self._lock = burst, per_s, clock, threading.Lock()
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, key: str) -> None:
        """Raises Unreachable `control.busy`."""
        now = self._clock()
        with self._lock:
            left, at = self._left.pop(key, (float(self._burst), now))
            left = min(self._burst, left + (now - at) * self._per_s)
            self._left[key] = (left - 1 if left >= 1 else left, now)
            if len(self._left) > REMEMBERED:
                self._left.popitem(last=False)
        if left < 1:
            raise reason("control.busy")


def _address(peer: str) -> str:
    """Of gRPC's `ipv4:192.0.2.7:1234` or `ipv6:%5B2001:db8::1%5D:1234`."""
    host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return peer
    return str(ip_network((address, 64), strict=False)) if address.version == 6 else str(address)
