"""The site's end of Flower's Fleet API: pull a message, hand it to the installed app, push the reply.

All that this side knows of Flower's internals (1.41; tests/transport/ is their contract). Guarantees: only installed
code runs (nothing here can fetch or load an app bundle); only a server with a certificate of the given issuing CA, with
the right host name and not revoked is spoken to, redirects are not followed; a message that the coordinator hands out
again reaches the app again (whose handlers answer with stored bytes); nothing of the coordinator's texts is logged.

Stopping: `stop` wakes a thread that deactivates the node, which makes the coordinator answer the held poll at once,
and that then shuts the sockets down in case it doesn't. So `run` ends within 2 s, or when the running handler ends.
"""

from __future__ import annotations

import json
import logging
import random
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError

from fl_client.app import Handler, StageRefused, Vector, build_app, dispatch
from fl_client.link_tls import CheckServer, Sockets, check_url, identity, proxy_for
from privacy.errors import ConsiloError, Refused, Unreachable

logging.getLogger("flwr").setLevel(logging.CRITICAL)
log = logging.getLogger("consilo.link")

__all__ = ["FleetLink", "Handler", "StageRefused", "Vector", "build_app"]

MAX_OBJECTS = 256  # of one message
BEAT_S = 10.0  # Flower's minimum; a node counts as gone after two
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0
READ_S, CONNECT_S, LEAVE_S = 30.0, 5.0, 1.0  # a poll is held for 20 s
BAD_OBJECT = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RecursionError, DecodeError)


class FleetLink:
    """One site's connection. url: `https://host:port`. tls_cert, tls_key: the site's PEM files; one P-256 key serves
    TLS and Flower's node identity. server_ca: the coordinators' issuing CA, the only one that is trusted. check: raises
    Refused for a server's certificate, at the handshake or at any later request (`coordinator_check`). proxy: of HTTP
    CONNECT, else that of the environment (HTTPS_PROXY, NO_PROXY); proxy_ca: for its own leg, where that is TLS too.

    `with FleetLink(...) as link: link.connect()` is a check of the connection; `run` closes the link itself.
    Raises UsageError `link.url`, `link.proxy`, `link.certificate`, `key.missing`; Refused `key.permissions`.
    """

    def __init__(self, url: str, tls_cert: Path, tls_key: Path, server_ca: Path, *, check: CheckServer,
                 proxy: str | None = None, proxy_ca: Path | None = None) -> None:
        check_url(url)
        key, context = identity(tls_cert, tls_key, server_ca)
        way = proxy_for(url, proxy, proxy_ca)
        self.trouble = ""  # code of what keeps the link from working, or ""
        self._public = public_key_to_bytes(key.public_key())
        self._node: Any = None
        self._sockets = Sockets(check, proxied=way is not None)
        self._http = FleetHttpClient(url, verify=context, timeout=READ_S,
                                     interceptors=[self._sockets, NodeAuthHttpInterceptor(key, key.public_key())])
        self._http._client.close()
        self._http._client = httpx.Client(verify=context, timeout=httpx.Timeout(READ_S, connect=CONNECT_S), trust_env=False,
                                          proxy=way)
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="link")

    def connect(self) -> int:
        """Register as online; returns the node id. Messages that had no whole reply yet will be handed out again.

        Raises Unreachable `link.unreachable`; Refused `link.untrusted` (the server's certificate), `link.refused` (our
        certificate), `identity.*` (its revocation), `link.roster` (our key isn't on the roster), `link.clock`.
        """
        try:
            answer = self._http.ActivateNode(ActivateNodeRequest(public_key=self._public, heartbeat_interval=BEAT_S))
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as e:  # TLS 1.3: after our handshake
            raise Refused("link.refused", "The coordinator closes the connection when it sees this site's certificate.",
                          "Renew the certificate; ask the consortium's CA if it was revoked.") from e
        except (httpx.HTTPError, ssl.SSLError) as e:
            raise _explain(e) from e
        self._node = Node(node_id=answer.node_id)
        return int(answer.node_id)

    def run(self, app: Any, context: Any | None, stop: threading.Event, *,
            between: Callable[[], None] = lambda: None) -> None:
        """Serve `app` in this thread until `stop` is set; reconnect after every failure, waiting up to 5 s.

        `context`: Flower's, an empty one if None. between: called between messages and polls, in this thread.
        """
        context = context or Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
        helpers = [threading.Thread(target=work, args=(stop,), name="link", daemon=True)
                   for work in (self._beat, self._leave)]
        for helper in helpers:
            helper.start()
        try:
            self._serve(app, context, stop, between)
        finally:
            stop.set()
            for helper in helpers:
                helper.join(2 * LEAVE_S)
            self.close()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def __enter__(self) -> FleetLink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _serve(self, app: Any, context: Any, stop: threading.Event, between: Callable[[], None]) -> None:
        wait = FIRST_WAIT_S
        while not stop.is_set():
            between()
            try:
                if self._node is None:
                    self.connect()
                message = self._receive()
                self._sockets.check()
                self._note_trouble("")
                wait = FIRST_WAIT_S
                if message is not None and not stop.is_set():
                    answer = dispatch(app, message, context)
                    if not stop.is_set():
                        self._send(answer)
            except (ConsiloError, httpx.HTTPError, ssl.SSLError, ValueError) as e:  # ValueError: a garbled answer
                self._node = None  # to connect anew is also how a lost message is asked for again
                if not stop.is_set():
                    self._note_trouble(_explain(e).code)
                stop.wait(wait * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                wait = min(2 * wait, LONGEST_WAIT_S)

    def _receive(self) -> Any | None:
        answer = self._http.PullMessages(PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        try:
            message, tree = message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]
        except BAD_OBJECT as e:
            raise ValueError("not a message") from e
        if not tree.children:
            return message
        ids = {item.object_id for item in iterate_object_tree(tree)}
        if len(ids) > MAX_OBJECTS:
            raise ValueError("too many objects")
        run_id = message.metadata.run_id

        def pull(object_id: str) -> bytes:
            part = self._http.PullObject(PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id))
            if not part.object_available:
                raise ValueError("an object is missing")
            return bytes(part.object_content)

        objects = dict(zip(ids, self._pool.map(pull, ids), strict=True))
        try:
            return Message(content=_inflate(tree.object_id, objects).content, metadata=message.metadata)
        except BAD_OBJECT as e:
            raise ValueError("not a message") from e

    def _send(self, answer: Any) -> None:
        run_id = answer.metadata.run_id
        with no_object_id_recompute():
            answer.metadata.__dict__["_message_id"] = answer.object_id
            if answer.has_error() or "arrays" not in answer.content:
                envelope, tree, objects = answer, ObjectTree(object_id=answer.object_id), {}
            else:
                envelope, tree = remove_content_from_message(answer), get_object_tree(answer)
                objects = get_all_nested_objects(answer)
            todo = self._http.PushMessages(PushMessagesRequest(
                node=self._node, messages_list=[message_to_proto(envelope)], message_object_trees=[tree],
                clientapp_runtime_list=[0.0]))

        if objects and not set(todo.objects_to_push) <= objects.keys():
            raise ValueError("an object is asked for that isn't part of the answer")

        def push(object_id: str) -> None:
            done = self._http.PushObject(PushObjectRequest(
                node=self._node, run_id=run_id, object_id=object_id, object_content=objects[object_id].deflate(),
                session_id=todo.session_id))
            if not done.stored:
                raise ValueError("an object was refused")

        if objects:
            list(self._pool.map(push, todo.objects_to_push))

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(0.8 * BEAT_S):
            node = self._node
            try:
                if node is not None:
                    self._http.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=BEAT_S))
            except (ConsiloError, httpx.HTTPError, ssl.SSLError, ValueError):
                continue  # the main loop sees it too

    def _leave(self, stop: threading.Event) -> None:
        stop.wait()
        node, self._http._client.timeout = self._node, httpx.Timeout(LEAVE_S)
        try:
            if node is not None:
                self._http.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
        except (ConsiloError, httpx.HTTPError, ssl.SSLError, RuntimeError):
            pass  # gone, or closed already: then there is nothing to leave
        self._sockets.cut()

    def _note_trouble(self, code: str) -> None:
        if code != self.trouble:
            log.log(logging.WARNING if code else logging.INFO, "link: %s", code or "connected")
        self.trouble = code


def _explain(e: Exception) -> ConsiloError:
    """What a failure means, in our own words: the coordinator's are not repeated."""
    if isinstance(e, ConsiloError):
        return e
    cause: BaseException | None = e
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return Refused("link.untrusted", "The server's certificate is not one of this consortium's coordinator.",
                       "Check the address; if a proxy opens TLS, have it make an exception.")
    if isinstance(e, httpx.ProxyError):
        return Unreachable("link.proxy", "The proxy refuses to connect to the coordinator.",
                           "Have the proxy allow CONNECT to the coordinator's host and port.")
    status = e.response.status_code if isinstance(e, httpx.HTTPStatusError) else 0
    if status == 412:
        return Refused("link.roster", "This site's key is not on the coordinator's roster.",
                       "Ask the coordinator's operator to refresh the roster.")
    if status == 401:
        return Refused("link.clock", "The coordinator doesn't accept the signed time or the node.",
                       "Synchronise the clock; it may be at most 5 s ahead.")
    return Unreachable("link.unreachable", f"The coordinator can't be reached, or fails ({type(e).__name__}).",
                       "Check the address, the network and the coordinator's state.")


def _inflate(root: str, objects: dict[str, bytes]) -> Any:
    """The message made of these objects. Raises one of `BAD_OBJECT`. What arrays would grow to is bounded first."""
    chunks = sum(len(json.loads(item.partition(HEAD_BODY_DIVIDER)[2])["arraychunk_ids"])
                 for item in objects.values() if item.startswith(b"Array "))
    if chunks > MAX_OBJECTS:
        raise ValueError("too large")
    return inflate_object_from_contents(root, objects)
