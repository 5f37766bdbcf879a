"""Flower's `Grid` without a network: the same messages, the same app, in this thread.

Guarantees: nodes share no memory (each message is taken apart into Flower's objects and built anew, both ways); one
vector is held at a time; no exception's text reaches the server's side; a fault is a silent node, and costs no time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from flwr.app import Context, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fl_client.app import dispatch

Fault = Literal["request", "reply"] | None


class InProcessGrid(Grid):  # type: ignore[misc]
    """apps: node id -> `ClientApp`. contexts: node id -> Flower's `Context`, empty ones if None.

    drop(node, message, k): called for the k-th message (from 0) to a node; "request" loses it, "reply" loses the
    answer. tap(message, reply) sees what both sides got. `bytes_down`, `bytes_up`: bytes of all objects so far.
    A message is handled when its reply is pulled, in the order of pushing.
    """

    def __init__(self, apps: Mapping[int, Any], contexts: Mapping[int, Any] | None = None, *,
                 drop: Callable[[int, Any, int], Fault] = lambda node, message, k: None,
                 tap: Callable[[Any, Any], None] = lambda message, reply: None) -> None:
        self._apps, self._drop, self._tap = dict(apps), drop, tap
        self._contexts = contexts or {node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(),
                                                    run_config={}) for node in apps}
        self._count: Counter[int] = Counter()
        self._waiting: dict[str, Any] = {}
        self._run: Any = None
        self.bytes_down = self.bytes_up = 0

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(self, content: Any, message_type: str, dst_node_id: int, group_id: str,
                       ttl: float | None = None) -> Any:
        return Message(content=content, metadata=Metadata(
            run_id=1, message_id="", src_node_id=SUPERLINK_NODE_ID, dst_node_id=dst_node_id, reply_to_message_id="",
            group_id=group_id, created_at=time.time(), ttl=ttl or 12 * 3600.0, message_type=message_type))

    def get_node_ids(self) -> list[int]:
        return list(self._apps)

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        ids = []
        for message in messages:
            message, size = _through_the_wire(message)
            self.bytes_down += size
            ids.append(message.metadata.message_id)
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Any]:
        for asked in message_ids:
            message = self._waiting.pop(asked, None)
            reply = None if message is None else self._handle(message)
            if reply is not None:
                yield reply

    def wait(self, timeout_s: float) -> bool:
        return False  # what didn't answer when it was pulled is lost

    def forget(self, message_ids: Iterable[str]) -> None:
        for asked in message_ids:
            self._waiting.pop(asked, None)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        return list(self.pull_messages(self.push_messages(messages)))

    def close(self) -> None:
        self._waiting.clear()

    def _handle(self, message: Any) -> Any | None:
        node = message.metadata.dst_node_id
        fault = self._drop(node, message, self._count[node])
        self._count[node] += 1
        if fault == "request":
            return None
        reply, size = _through_the_wire(dispatch(self._apps[node], message, self._contexts[node]))
        self.bytes_up += size
        self._tap(message, reply)
        return None if fault == "reply" else reply


def deflated(message: Any) -> tuple[str, dict[str, bytes]]:
    """A message's name, as Flower names it, and its serialised objects by theirs."""
    return str(message.object_id), {name: item.deflate() for name, item in get_all_nested_objects(message).items()}


def inflated(name: str, objects: Mapping[str, bytes]) -> Any:
    """Inverse of `deflated`."""
    message = inflate_object_from_contents(name, dict(objects))
    message.metadata.__dict__["_message_id"] = name
    return message


def _through_the_wire(message: Any) -> tuple[Any, int]:
    """A copy made of the message's serialised objects, and their size in bytes."""
    name, objects = deflated(message)
    return inflated(name, objects), sum(map(len, objects.values()))
