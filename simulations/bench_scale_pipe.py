"""Sites behind a pipe: a coordinator's `Grid` whose messages are handled in another process, one reply at a time.

A message goes over as Flower's serialised objects. It is handled when its reply is pulled, so the coordinator holds one
reply at a time, as it does when replies arrive slower than it adds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Context, RecordDict

from fl_client.app import dispatch
from fl_client.frames import Peer
from privacy.errors import Unreachable
from simulations.inprocess import InProcessGrid, deflated, inflated


class PipeGrid(InProcessGrid):
    """The coordinator's end. nodes: ids of the sites that `answer` serves at the other one."""

    def __init__(self, peer: Peer, nodes: Sequence[int]) -> None:
        super().__init__(dict.fromkeys(nodes))
        self._peer = peer

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        return [_send(self._peer, message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Any]:
        for asked in message_ids:
            self._peer.send({"pull": asked})
            _, reply = _receive(self._peer)
            yield reply

    def forget(self, message_ids: Iterable[str]) -> None:
        """What was pushed is handled when it is pulled, or never."""


def answer(peer: Peer, apps: Mapping[int, Any]) -> None:
    """The sites' end: apps by node id. Returns when the coordinator is gone."""
    contexts = {node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={}) for node in apps}
    waiting: dict[str, Any] = {}
    try:
        while True:
            header, message = _receive(peer)
            if message is not None:
                waiting[header["name"]] = message
                continue
            message = waiting.pop(header["pull"])
            node = message.metadata.dst_node_id
            _send(peer, dispatch(apps[node], message, contexts[node]))
    except Unreachable:
        return


def _send(peer: Peer, message: Any) -> str:
    name, objects = deflated(message)
    peer.send({"name": name, "objects": [[key, len(item)] for key, item in objects.items()]}, b"".join(objects.values()))
    return name


def _receive(peer: Peer) -> tuple[dict[str, Any], Any]:
    """Header, and the message if there is one."""
    header, payload = peer.receive()
    if "name" not in header:
        return header, None
    objects, at = dict[str, bytes](), 0
    for key, size in header["objects"]:
        objects[key], at = payload[at:at + size], at + size
    return header, inflated(header["name"], objects)
