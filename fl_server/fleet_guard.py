"""The ASGI layers around Flower's Fleet router: body limit, identity checks, long polling.

Guarantees: a request is served only on a connection whose client certificate holds the very key that signs it; a
reply's sender is the node that sends it; only the calls that an agent of this project makes are served (no
registration, no app bundles); an agent reads only objects of messages that were handed to it; a message is handed
out on the newest poll of a node, and handed out again when its agent connects anew, until there is a whole reply.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.inflatable.inflatable_object import is_valid_sha256_hash, iterate_object_tree
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_REQUEST_BYTES = 8 * 2**20  # one array chunk of 5 MiB, or an inline body of 4 MiB
MAX_OBJECTS = 256  # of one message: 5 MiB chunks of at most 512 MiB, and what holds them
WORKERS = 8  # threads of Flower's handlers; each holds copies of a request, and they take turns anyway
HOLD_S = 20.0  # below the idle timeouts of usual proxies

_FLEET = "/v1/fleet/"
ACTIVATE, DEACTIVATE, BEAT = _FLEET + "activate-node", _FLEET + "deactivate-node", _FLEET + "send-node-heartbeat"
PULL, PUSH = _FLEET + "pull-messages", _FLEET + "push-messages"
PULL_OBJECT, PUSH_OBJECT = _FLEET + "pull-object", _FLEET + "push-object"
SERVED = frozenset({ACTIVATE, DEACTIVATE, BEAT, PULL, PUSH, PULL_OBJECT, PUSH_OBJECT})


def key_pem(certificate: x509.Certificate) -> bytes:
    """The public key as Flower names nodes by it: SubjectPublicKeyInfo, PEM."""
    return certificate.public_key().public_bytes(serialization.Encoding.PEM,
                                                 serialization.PublicFormat.SubjectPublicKeyInfo)


class PeerKeyProtocol(HttpToolsProtocol):
    """Puts the client's certificate and its public key into `scope["state"]` of the connection: `peer`, `peer_key`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        der = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        peer = x509.load_der_x509_certificate(der)
        self.app_state = {**self.app_state, "peer": peer, "peer_key": key_pem(peer)}


class WholeBody:
    """Outermost layer: hands the body on in one piece, up to `MAX_REQUEST_BYTES` (413 above)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body, more = bytearray(), True
        while more:
            part = await receive()
            if part["type"] == "http.disconnect":
                return
            body += part.get("body", b"")
            more = part.get("more_body", False)
            if len(body) > MAX_REQUEST_BYTES:
                await _refuse(413, scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        del body

        async def once() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, once, send)


class FleetGuard:
    """Innermost layer, after Flower's translation and node authentication.

    `state`: Flower's LinkState. `reconnected(node)` is called (in a worker thread) before an agent is let in anew.
    `arrived` is set when something of a reply came in. `admits(certificate)` says, at every request, whether a connection
    that was let in is still welcome. What the event loop's thread owns is marked so.
    """

    app: ASGIApp

    def __init__(self, state: Any, hold_s: float, admits: Callable[[x509.Certificate], bool] = lambda _: True) -> None:
        self.state, self.hold_s, self._admits = state, hold_s, admits
        self.reconnected: Callable[[int], None] = lambda node: None
        self.arrived = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._held: dict[int, asyncio.Event] = {}  # loop: the newest poll of each node
        self._idle: set[int] = set()  # loop: nodes for which nothing waits
        self._offered: dict[int, set[str]] = {}  # loop: objects that a node was told of

    def around(self, app: ASGIApp) -> FleetGuard:
        self.app = app
        return self

    def wake(self, nodes: Iterable[int]) -> None:
        """There is a message for these nodes. From any thread."""
        self.call_soon(self._ring, list(nodes))

    def close(self) -> None:
        """Answer held polls, and hold none from now on. From any thread."""
        self._closed = True
        self.call_soon(self._release)

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        """Call it in the event loop's thread, if there was a request yet."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._loop is None:
            current_default_thread_limiter().total_tokens = WORKERS
        self._loop = asyncio.get_running_loop()
        path, state = scope["path"], scope["state"]
        request = state.get("protobuf_request")
        if path not in SERVED or request is None or _claimed_key(scope) != state["peer_key"]:
            await _refuse(403, scope, receive, send)
            return
        if not self._admits(state["peer"]) or not self._allowed(path, request):
            await _refuse(403, scope, receive, send)
            return
        if path == ACTIVATE:  # the same key over the same TLS key: it is the site, whatever ran there before
            node = self.state.get_node_id_by_public_key(request.public_key)
            if node is not None:
                await asyncio.to_thread(self._readmit, node)
                self._drop_poll(node)
                self._idle.discard(node)
        elif path == PULL and not await self._turn(request.node.node_id):
            await _refuse(409, scope, receive, send)
            return

        async def before_sending(part: Message) -> None:
            if part["type"] == "http.response.start":
                await self._done(path, request, state.get("protobuf_response"))
            await send(part)

        await self.app(scope, receive, before_sending)

    async def _done(self, path: str, request: Any, response: Any) -> None:
        """The handler is through; `response` is None if it failed."""
        if path == DEACTIVATE:
            self._drop_poll(request.node_id)
        elif path == PULL and response is not None and response.messages_list:
            node = request.node.node_id
            self._idle.discard(node)  # one message a pull: the next one looks at once
            self._offered[node] = {t.object_id for tree in response.message_object_trees
                                   for t in iterate_object_tree(tree)}
        elif path == PUSH and response is not None and not (
                request.message_object_trees[0].children and response.objects_to_push):  # nothing to upload
            await asyncio.to_thread(self._end_session, response.session_id)
        if path in (PUSH, PUSH_OBJECT):
            self.arrived.set()

    def _allowed(self, path: str, request: Any) -> bool:
        if path == PUSH:
            messages, trees = request.messages_list, request.message_object_trees
            return (len(messages) == len(trees) == 1
                    and messages[0].metadata.src_node_id == request.node.node_id
                    and messages[0].metadata.message_id == trees[0].object_id
                    and len(names := [item.object_id for item in iterate_object_tree(trees[0])]) <= MAX_OBJECTS
                    and all(is_valid_sha256_hash(name) for name in names))
        if path == PUSH_OBJECT:
            return bool(is_valid_sha256_hash(request.object_id))
        if path == PULL_OBJECT:
            return request.object_id in self._offered.get(request.node.node_id, ())
        return True

    async def _turn(self, node: int) -> bool:
        """Hold a poll until something may wait for the node. False: a newer poll or an activation took its place."""
        ring = asyncio.Event()
        self._drop_poll(node)
        self._held[node] = ring
        if node in self._idle and not self._closed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ring.wait(), self.hold_s)
        if self._held.get(node) is not ring:
            return False
        del self._held[node]
        self._idle.add(node)  # the handler looks now; whatever comes later rings again
        return True

    def _readmit(self, node: int) -> None:
        self.reconnected(node)
        self.state.deactivate_node(node)

    def _end_session(self, session_id: str) -> None:
        self.state._cleanup_push_session(session_id, cleanup_messages=False)

    def _ring(self, nodes: list[int]) -> None:
        for node in nodes:
            self._idle.discard(node)
            if node in self._held:
                self._held[node].set()

    def _release(self) -> None:
        for ring in self._held.values():
            ring.set()

    def _drop_poll(self, node: int) -> None:
        if (older := self._held.pop(node, None)) is not None:
            older.set()


def _claimed_key(scope: Scope) -> bytes:
    try:
        return base64.b64decode(dict(scope["headers"]).get(FLEET_HTTP_PUBLIC_KEY_HEADER.encode(), b""), validate=True)
    except binascii.Error:
        return b""


async def _refuse(status: int, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"code": status}, status)(scope, receive, send)
