"""Flower's SuperLink inside the coordinator: the Fleet API alone, over mutual TLS, and a `Grid` on its state.

With `fleet_guard`, all that this side knows of Flower's internals (1.41; tests/transport/ is their contract).
Guarantees: only certificates of the trusted issuing CAs connect, and only keys on the roster become nodes; TLS 1.3, no
session resumption, so a certificate is checked on every connection; no Control or run-time API exists; state is in
memory only (durability is the journal's); nothing that a site sends is logged or kept beyond its stage.
"""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.serverapp import Grid
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from fl_server.fleet_guard import HOLD_S, MAX_OBJECTS, FleetGuard, PeerKeyProtocol, WholeBody, key_pem
from privacy.errors import Unreachable, UsageError
from privacy.files import read_private

logging.getLogger("flwr").setLevel(logging.CRITICAL)  # it writes a line a message to stdout, peers' words included

IN_MEMORY = ":flwr-in-memory:"
TASK_BEAT_S = 10.0  # Flower fails a run that is silent for 60 s
TTL_S = 12 * 3600.0  # the exchange withdraws messages long before
GRACE_S = 0.5  # for answers that are under way when the listener stops
BAD_OBJECT = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RecursionError)


class EmbeddedGrid(Grid):  # type: ignore[misc]
    """Flower's `Grid` on LinkState and object store of this process. Vectors travel as 5 MiB objects, all else inline
    in the message: one request each way."""

    def __init__(self, state: Any, guard: FleetGuard) -> None:
        self._state, self._guard = state, guard
        guard.reconnected = self._redeliver
        self.run_id = state.create_run(
            fab_id=None, fab_version=None, fab_hash=None, override_config={}, federation_id=NOOP_FEDERATION_ID,
            federation_config=None, flwr_aid=NOOP_FLWR_AID, primary_task_type=TaskType.SERVER_APP)
        self._run = state.get_run_info(run_ids=[self.run_id])[0]
        self._task = self._run.primary_task_id
        state.claim_task(self._task)
        state.activate_task(self._task)
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, name="fleet-run", daemon=True)
        self._beat.start()

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(self, content: Any, message_type: str, dst_node_id: int, group_id: str,
                       ttl: float | None = None) -> Any:
        return Message(content=content, metadata=Metadata(
            run_id=self.run_id, message_id="", src_node_id=SUPERLINK_NODE_ID, dst_node_id=dst_node_id,
            reply_to_message_id="", group_id=group_id, created_at=time.time(), ttl=ttl or TTL_S,
            message_type=message_type, src_task_id=self._task))

    def get_node_ids(self) -> list[int]:
        return list(self._state.get_nodes(self.run_id))

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        """Objects first, messages last: a site never sees half a message. Raises Unreachable `fleet.refused`."""
        state, session = self._state, None
        ids: list[str] = []
        ready: list[Any] = []
        objects: dict[str, Any] = {}
        with no_object_id_recompute():
            for message in messages:
                ids.append(_name(message))
                if "arrays" not in message.content:
                    state.object_store.preregister(self.run_id, ObjectTree(object_id=ids[-1]))
                    ready.append(message)
                    continue
                session = session or state.start_session(self.run_id)
                nested = get_all_nested_objects(message)
                objects |= {i: nested[i] for i in state.preregister_object_tree(get_object_tree(message), session)}
                ready.append(remove_content_from_message(message))
            for object_id, item in objects.items():  # the last one closes the session
                state.store_object(self.run_id, session, object_id, item.deflate())
        for message in ready:
            if not state.store_message_ins(message):
                raise Unreachable("fleet.refused", "Flower's link state refused a message.", "Start the run again.")
        self._guard.wake(message.metadata.dst_node_id for message in ready)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Any]:
        """Whole replies, one at a time; an incomplete one stays until its last object is there."""
        self._guard.arrived.clear()  # before the look, so that no wake is lost
        for asked in message_ids:
            reply = self._reply(asked)
            if reply is not None:
                self.forget([asked])
                yield reply

    def wait(self, timeout_s: float) -> bool:
        self._guard.arrived.wait(timeout_s)
        return True

    def forget(self, message_ids: Iterable[str]) -> None:
        for asked in message_ids:
            reply_id = self._state.message_ins_id_to_message_res_id.get(asked, "")
            self._state.delete_messages({asked})
            self._drop_objects(reply_id)
            self._drop_objects(asked)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        """As in Flower; the project itself uses `fl_server.exchange`. `timeout`: seconds, 60 if None."""
        left, end = set(self.push_messages(messages)), time.monotonic() + (timeout or 60.0)
        replies: list[Any] = []
        while left and time.monotonic() < end:
            replies += self.pull_messages(list(left))
            left -= {reply.metadata.reply_to_message_id for reply in replies}
            if left:
                self.wait(end - time.monotonic())
        self.forget(left)
        return replies

    def close(self) -> None:
        """End the run, and with it the heartbeat thread and all push sessions."""
        self._stop.set()
        self._beat.join()
        self._state.delete_sessions_in_run(self.run_id)
        self._state.finish_task(self._task, "completed", "")

    def _keep_alive(self) -> None:
        while not self._stop.wait(TASK_BEAT_S):
            self._state.acknowledge_task_heartbeat(self._task)

    def _reply(self, asked: str) -> Any | None:
        """The reply to a message if it is whole. Its metadata are the envelope's, which the guard checked; those in
        the uploaded object are the sender's own words."""
        envelope = self._state.message_res_store.get(self._state.message_ins_id_to_message_res_id.get(asked))
        objects = None if envelope is None else self._objects(envelope.metadata.message_id)
        if not objects:
            return None if objects is None else envelope
        try:
            content = _inflate(envelope.metadata.message_id, objects).content
        except BAD_OBJECT:
            content = RecordDict()  # the exchange calls it malformed
        return Message(content=content, metadata=envelope.metadata)

    def _objects(self, root: str) -> dict[str, bytes] | None:
        """Contents of a message's objects by id; empty if it is inline, None while one is missing."""
        store = self._state.object_store
        try:
            tree = store.get_object_tree(root)
        except NoObjectInStoreError:
            return None
        parts = iterate_object_tree(tree) if tree.children else ()
        found = {part.object_id: store.get(part.object_id) for part in parts}
        return found if all(found.values()) else None

    def _redeliver(self, node: int) -> None:
        """The node's agent connects anew: what it was handed without a whole reply will be handed out again."""
        state = self._state
        with state.lock:
            for asked, message in state.message_ins_store.items():
                if message.metadata.dst_node_id != node:
                    continue
                reply_id = state.message_ins_id_to_message_res_id.get(asked)
                if reply_id is not None:
                    if self._objects(reply_id) is not None:
                        continue
                    del state.message_ins_id_to_message_res_id[asked], state.message_res_store[reply_id]
                    self._drop_objects(reply_id)
                message.metadata.delivered_at = ""

    def _drop_objects(self, root: str) -> None:
        session = self._state._object_push_session_by_root.get(root)
        if session is not None:
            self._state._cleanup_push_session(session, cleanup_messages=False)
        self._state.object_store.delete(root)


class FleetServer:
    """The listener: `with FleetServer(...) as fleet: Exchange(fleet.grid, fleet.nodes)`.

    host, port: where to listen; port 0 picks a free one (`fleet.port` after the start). certificate, key: PEM files of
    the coordinator. trusted: PEM files of the issuing CAs whose certificates may connect (role site only). crl: PEM
    file of their revocation lists; then every connection is checked against it. roster: site name -> PEM of the site's
    TLS certificate (P-256). hold_s: how long an empty poll is held.
    Raises UsageError `fleet.certificate`, `fleet.roster`, `key.missing`; Refused `key.permissions`; and, on start,
    Unreachable `fleet.port`.
    """

    def __init__(self, *, host: str, port: int, certificate: Path, key: Path, trusted: Sequence[Path],
                 roster: Mapping[str, bytes], crl: Path | None = None, hold_s: float = HOLD_S) -> None:
        self.host, self.port = host, port
        context = _tls(certificate, key, trusted, crl)
        factory = LinkStateFactory(IN_MEMORY, NoOpFederationManager(), ObjectStoreFactory(IN_MEMORY))
        self.state = factory.state()
        self.nodes = {site: _register(self.state, site, pem) for site, pem in roster.items()}
        self._guard = FleetGuard(self.state, hold_s)
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


def _name(message: Any) -> str:
    """Flower names a message by the hash of its content."""
    message.metadata.__dict__["_message_id"] = message.object_id
    return str(message.object_id)


def _inflate(root: str, objects: dict[str, bytes]) -> Any:
    """The message made of these objects. Raises one of `BAD_OBJECT`. An array may name a chunk many times (zeros
    do), so what it would grow to is bounded first."""
    chunks = sum(len(json.loads(item.partition(b"\x00")[2])["arraychunk_ids"])
                 for item in objects.values() if item.startswith(b"Array "))
    if chunks > MAX_OBJECTS:
        raise ValueError("too large")
    return inflate_object_from_contents(root, objects)
