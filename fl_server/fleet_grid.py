"""Flower's `Grid` on the LinkState and the object store of this process: the round's end of the embedded SuperLink.

Guarantees: a site never sees half a message, the round never half a reply; a reply's metadata are those that the guard
checked; what an agent was handed is handed out again if it connects anew without a whole reply; `forget` and a pulled
reply leave nothing behind.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from google.protobuf.message import DecodeError

from fl_server.fleet_guard import MAX_OBJECTS, FleetGuard
from privacy.errors import Unreachable

TTL_S = 12 * 3600.0  # the exchange withdraws messages long before
BAD_OBJECT = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RecursionError, DecodeError)


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
        # Flower gives up a run that no process speaks for in 60 s; this one's is the same process, which may stand still.
        state.task_token_store[self._task].active_until = datetime.max.replace(tzinfo=UTC)

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
        """End the run, and with it all push sessions."""
        self._state.delete_sessions_in_run(self.run_id)
        self._state.finish_task(self._task, "completed", "")

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


def _name(message: Any) -> str:
    """Flower names a message by the hash of its content."""
    message.metadata.__dict__["_message_id"] = message.object_id
    return str(message.object_id)


def _inflate(root: str, objects: dict[str, bytes]) -> Any:
    """The message made of these objects. Raises one of `BAD_OBJECT`. An array may name a chunk many times (zeros
    do), so what it would grow to is bounded first."""
    chunks = sum(len(json.loads(item.partition(HEAD_BODY_DIVIDER)[2])["arraychunk_ids"])
                 for item in objects.values() if item.startswith(b"Array "))
    if chunks > MAX_OBJECTS:
        raise ValueError("too large")
    return inflate_object_from_contents(root, objects)
