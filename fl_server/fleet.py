"""Flower's SuperLink inside the coordinator: the Fleet API alone, over mutual TLS.

With `fleet_guard` and `fleet_grid`, all that this side knows of Flower's internals (1.41; tests/transport/ is the
contract). Guarantees: only certificates of the trusted issuing CAs connect, and only keys on the roster become nodes;
TLS 1.3, no session resumption, so a certificate is checked on every connection; no Control or run-time API exists;
state is in memory only (durability is the journal's); nothing that a site sends is logged or kept beyond its stage.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.error import http_error_translator
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from fl_server.fleet_grid import EmbeddedGrid
from fl_server.fleet_guard import HOLD_S, FleetGuard, PeerKeyProtocol, WholeBody, key_pem
from privacy.errors import Unreachable, UsageError
from privacy.files import read_private

logging.getLogger("flwr").setLevel(logging.CRITICAL)  # it writes a line a message to stdout, peers' words included
SSLProtocol.max_size = 32 * 1024  # asyncio keeps a buffer of it for each connection (else 256 KiB); an agent has about six

IN_MEMORY = ":flwr-in-memory:"
GRACE_S = 0.5  # for answers that are under way when the listener stops


class FleetServer:
    """The listener: `with FleetServer(...) as fleet: Exchange(fleet.grid, fleet.nodes)`.

    host, port: where to listen; port 0 picks a free one (`fleet.port` after the start). certificate, key: PEM files of
    the coordinator. trusted: PEM files of the issuing CAs whose certificates may connect (role site only). crl: PEM
    file of their revocation lists; then every connection is checked against it. roster: site name -> PEM of the site's
    TLS certificate (P-256). hold_s: how long an empty poll is held. admits: asked about the client's certificate at every
    request, for what changes while a connection lasts.
    Raises UsageError `fleet.certificate`, `fleet.roster`, `key.missing`; Refused `key.permissions`; and, on start,
    Unreachable `fleet.port`.
    """

    def __init__(self, *, host: str, port: int, certificate: Path, key: Path, trusted: Sequence[Path],
                 roster: Mapping[str, bytes], crl: Path | None = None, hold_s: float = HOLD_S,
                 admits: Callable[[x509.Certificate], bool] = lambda _: True) -> None:
        self.host, self.port = host, port
        context = _tls(certificate, key, trusted, crl)
        factory = LinkStateFactory(IN_MEMORY, NoOpFederationManager(), ObjectStoreFactory(IN_MEMORY))
        self.state = factory.state()
        self.nodes = {site: _register(self.state, site, pem) for site, pem in roster.items()}
        self._guard = FleetGuard(self.state, hold_s, admits)
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=[
            Middleware(WholeBody), Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware), Middleware(NodeAuthMiddleware),
            Middleware(self._guard.around)])
        app.state.linkstate_factory, app.state.enable_supernode_auth = factory, True  # True: no self-registration
        app.include_router(fleet_router)
        self._server = uvicorn.Server(uvicorn.Config(
            app, http=PeerKeyProtocol, ssl_context_factory=lambda config, default: context, ws="none", loop="asyncio",
            lifespan="off", log_config=None, log_level="critical", access_log=False, proxy_headers=False,
            server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=2))

    def start(self) -> FleetServer:
        """Listen, create the run, and return once connections are accepted."""
        try:
            listener = socket.create_server((self.host, self.port), backlog=256)
        except OSError as e:
            raise Unreachable("fleet.port", f"Port {self.port} of {self.host} can't be used.",
                              "Choose another port, or stop what listens there.") from e
        self.port = listener.getsockname()[1]
        self.grid = EmbeddedGrid(self.state, self._guard)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="fleet", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """Answer held polls, end the run, close the listener. Takes at most a few seconds."""
        self._guard.close()
        self.grid.close()
        self._server.should_exit = True
        self._thread.join(GRACE_S)
        if self._thread.is_alive():  # agents keep their connections open
            self._guard.call_soon(self._cut)
            self._thread.join(10)

    def _cut(self) -> None:
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    def __enter__(self) -> FleetServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


def _tls(certificate: Path, key: Path, trusted: Sequence[Path], crl: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    context.num_tickets = 0
    read_private(key)
    try:
        context.load_cert_chain(certificate, key)
        for ca in trusted:
            context.load_verify_locations(ca)
        if crl is not None:
            context.load_verify_locations(crl)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except (OSError, ValueError) as e:
        raise UsageError("fleet.certificate", f"The listener's certificates can't be loaded ({type(e).__name__}).",
                         "Give the coordinator's certificate and key, and PEM files of the sites' issuing CA.") from e
    return context


def _register(state: Any, site: str, pem: bytes) -> int:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        if not isinstance(certificate.public_key(), ec.EllipticCurvePublicKey):
            raise ValueError("not an EC key")
        return int(state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key_pem(certificate), 0, name=site))
    except ValueError as e:
        raise UsageError("fleet.roster", f"The roster's TLS certificate of {site!r} can't be used.",
                         "Give each site its own P-256 certificate, as the CA issued it.") from e
