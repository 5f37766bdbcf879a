"""Requests of a site that are no requests: whatever a certificate holder posts, the listener answers, and others go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from hypothesis import given
from hypothesis import strategies as st
from test_fleet_attacks import ECHO, OPEN, Attacker, asking
from transport_kit import Pki, link_to, server, serving

from fl_server.exchange import Answer, Exchange, Note
from fl_server.fleet import FleetServer
from tests.fuzz.fuzz_kit import TIMES, bounded, mutated


@pytest.fixture
def fleet(pki: Pki) -> Iterator[FleetServer]:
    with server(pki) as running:
        yield running
    while OPEN:
        OPEN.pop().close()


class Raw:
    """In place of a protobuf message."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def SerializeToString(self, deterministic: bool = True) -> bytes:
        return self.data


class Anything:
    """In place of a type of answers."""

    def ParseFromString(self, data: bytes) -> None:
        pass


def requests(a: Attacker, asked: Any) -> dict[str, bytes]:
    reply = Message(RecordDict({"c": ConfigRecord({"body": b"{}"}), "arrays": ArrayRecord(
        {"y": Array(np.arange(4, dtype=np.float32))})}), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    parts = get_all_nested_objects(reply)
    push = PushMessagesRequest(node=a.node, messages_list=[message_to_proto(reply)], clientapp_runtime_list=[0.0],
                               message_object_trees=[get_object_tree(reply)])
    todo = a.http.PushMessages(push)
    name = todo.objects_to_push[0]
    made: dict[str, Any] = {
        "ActivateNode": ActivateNodeRequest(public_key=a.public, heartbeat_interval=10),
        "SendNodeHeartbeat": SendNodeHeartbeatRequest(node=a.node, heartbeat_interval=10), "PushMessages": push,
        "PushObject": PushObjectRequest(node=a.node, run_id=asked.metadata.run_id, object_id=name,
                                        object_content=parts[name].deflate(), session_id=todo.session_id),
        "PullObject": PullObjectRequest(node=a.node, run_id=asked.metadata.run_id, object_id=name),
        "ConfirmMessageReceived": ConfirmMessageReceivedRequest(
            node=a.node, run_id=asked.metadata.run_id, message_object_id=reply.object_id)}
    return {path: request.SerializeToString() for path, request in made.items()}


@TIMES
def test_requests(times: int, fleet: FleetServer, pki: Pki) -> None:
    a, exchange, seen = Attacker(fleet, pki, "a"), Exchange(fleet.grid, fleet.nodes), set[int]()
    a.activate()
    thread, answers = asking(exchange, 600.0, a=Note(b"{}"))
    asked, _ = a.pull()
    good = requests(a, asked)

    @bounded(100, times)
    @given(st.sampled_from(sorted(good)), st.integers(0, 2**32 - 1))
    def run(name: str, seed: int) -> None:
        path = "/v1/fleet/" + re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
        try:
            a.http._unary_unary(path=path, rpc_method=f"/flwr.proto.Fleet/{name}", request=Raw(mutated(good[name], seed)),
                                response_type=Anything)
            seen.add(200)
        except httpx.HTTPStatusError as e:
            seen.add(e.response.status_code)

    run()
    assert {200, 400, 403} <= seen <= {200, 400, 401, 403, 404, 409, 412}, "none is a bug of the listener"
    with serving(link_to(fleet, pki, "a"), ECHO), serving(link_to(fleet, pki, "b"), ECHO):
        thread.join(30)
        assert isinstance(answers["a"], Answer)
        after = exchange.ask("update", {"a": Note(b"1"), "b": Note(b"2")}, deadline_s=30)
        assert [after[name].note and after[name].note.body for name in "ab"] == [b"1", b"2"]
