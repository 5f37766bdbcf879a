"""The contract of the transport, held by both implementations: embedded SuperLink over mTLS, and in-process."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.corestate import in_memory_corestate
from transport_kit import Federation, Pki, server

from fl_client.app import StageRefused, build_app
from fl_server.exchange import MALFORMED, MAX_BODY_BYTES, STYPE, UNREACHABLE, Answer, Exchange, Note, pack, unpack
from privacy.errors import SiteCode, UsageError
from simulations.inprocess import InProcessGrid

Sites = Callable[..., Exchange]
CANARY = "patient-4711"


def echo(body: bytes, arrays: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    return body, arrays


def raw(reply: Callable[[Any], Any]) -> Any:
    """A hostile site: a ClientApp whose replies are made by hand."""
    app = ClientApp()
    app.train("update")(lambda message, context: reply(message))
    return app


def ask(exchange: Exchange, deadline_s: float = 5.0, **notes: Note) -> dict[str, Answer]:
    return exchange.ask("update", notes, deadline_s=deadline_s)


def test_body_and_vectors_of_a_million_values_come_back_as_they_went(sites: Sites) -> None:
    rng = np.random.default_rng(0)
    sent = {name: Note(b'{"site":"%s"}' % name.encode(), {
        "delta": rng.standard_normal(1_000_000, dtype=np.float32),
        "y": rng.integers(0, 2**32, 1_000_000, dtype=np.uint32)}) for name in ("a", "b")}
    answers = ask(sites(a=echo, b=echo), 20, **sent)
    for name, note in sent.items():
        got = answers[name].note
        assert got is not None and got.body == note.body and set(got.arrays) == {"delta", "y"}
        for key, vector in note.arrays.items():
            assert got.arrays[key].dtype == vector.dtype and np.array_equal(got.arrays[key], vector)


def test_vectors_over_many_chunks_even_equal_ones(sites: Sites) -> None:
    zeros = np.zeros(4_000_000, np.float32)  # 16 MB: equal chunks have one name
    got = ask(sites(a=echo), 20, a=Note(b"{}", {"z": zeros}))["a"].note
    assert got is not None and np.array_equal(got.arrays["z"], zeros)


@pytest.mark.parametrize("arrays", [{}, {"w": np.zeros(0, np.float32)}], ids=["none", "zero-length"])
def test_empty_arrays(sites: Sites, arrays: dict[str, Any]) -> None:
    got = ask(sites(a=echo), a=Note(b"{}", arrays))["a"].note
    assert got is not None and set(got.arrays) == set(arrays) and all(len(v) == 0 for v in got.arrays.values())


def test_a_body_at_the_limit(sites: Sites) -> None:
    body = b"x" * MAX_BODY_BYTES
    assert ask(sites(a=echo), 20, a=Note(body))["a"] == Answer(Note(body), None)


def test_answers_are_handed_over_one_at_a_time_and_then_let_go(sites: Sites) -> None:
    seen: dict[str, int] = {}
    vector = np.arange(10, dtype=np.uint32)
    answers = sites(a=echo, b=echo).ask(
        "update", {name: Note(name.encode(), {"y": vector}) for name in "ab"}, deadline_s=5,
        on_answer=lambda site, answer: not seen.update({site: int(answer.note.arrays["y"].sum())}))  # type: ignore[union-attr]
    assert seen == {"a": 45, "b": 45}
    assert answers == {name: Answer(Note(name.encode()), None) for name in "ab"}


@pytest.mark.parametrize("code", list(SiteCode))
def test_a_refusal_arrives_as_its_code(sites: Sites, code: SiteCode) -> None:
    def refuse(body: bytes, arrays: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        raise StageRefused(code)

    assert ask(sites(a=refuse), a=Note(b"{}"))["a"] == Answer(None, code.value)


def test_exception_text_never_crosses(sites: Sites, capfd: pytest.CaptureFixture[str],
                                      caplog: pytest.LogCaptureFixture) -> None:
    """Nor is it logged at the site: it may quote a record."""

    def fail(body: bytes, arrays: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        raise ValueError(CANARY)

    answers = ask(sites(a=fail), a=Note(b"{}"))
    assert answers["a"] == Answer(None, "site.failed") and CANARY not in repr(answers)
    assert CANARY not in "".join(capfd.readouterr()) + caplog.text and "ValueError" in caplog.text


def test_an_error_text_of_a_hostile_site_is_dropped(sites: Sites, capfd: pytest.CaptureFixture[str]) -> None:
    hostile = raw(lambda message: Message(Error(0, CANARY), reply_to=message))
    answers = ask(sites(a=hostile), a=Note(b"{}"))
    assert answers["a"] == Answer(None, MALFORMED) and CANARY not in "".join(capfd.readouterr())


def test_unknown_stage_is_a_failure_not_silence(sites: Sites) -> None:
    assert ask(sites(), a=Note(b"{}"))["a"] == Answer(None, "site.failed")


def test_the_silent_are_unreachable_at_the_deadline(sites: Sites, transport: Federation) -> None:
    if isinstance(transport.exchange._grid, InProcessGrid):
        pytest.skip("in one thread, an answer is there as soon as it is pulled")

    def slow(body: bytes, arrays: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        time.sleep(0.6)
        return body, arrays

    start = time.monotonic()
    answers = ask(sites(a=echo, b=slow), 0.3, a=Note(b"{}"), b=Note(b"{}"))
    assert answers == {"a": Answer(Note(b"{}"), None), "b": Answer(None, UNREACHABLE)}
    assert time.monotonic() - start < 1.0
    late = ask(sites(a=echo, b=echo), a=Note(b"2"), b=Note(b"2"))  # the late reply of before is nobody's answer now
    assert {answer.note.body for answer in late.values() if answer.note} == {b"2"}


def records(config: Any = None, **more: Any) -> RecordDict:
    return RecordDict({"c": config or ConfigRecord({"body": b"{}"}), **more})


def array(dtype: str = "float32", shape: tuple[int, ...] = (2,), stype: str = STYPE, data: bytes = bytes(8)) -> Any:
    return ArrayRecord({"w": Array(dtype, shape, stype, data)})


MALFORMED_REPLIES: dict[str, Callable[[], RecordDict]] = {
    "nothing": RecordDict,
    "oversized body": lambda: records(ConfigRecord({"body": b"x" * (MAX_BODY_BYTES + 1)})),
    "no body": lambda: records(ConfigRecord({"bodi": b"{}"})),
    "more than a body": lambda: records(ConfigRecord({"body": b"{}", "more": 1})),
    "text body": lambda: records(ConfigRecord({"body": "{}"})),
    "another record": lambda: records(extra=ConfigRecord({"x": 1})),
    "arrays that are none": lambda: records(arrays=ConfigRecord({"x": 1})),
    "float64": lambda: records(arrays=array("float64", (1,))),
    "a matrix": lambda: records(arrays=array(shape=(1, 2))),
    "a wrong length": lambda: records(arrays=array(shape=(3,))),
    "half a value": lambda: records(arrays=array(shape=(1,), data=bytes(7))),
    "numpy's format": lambda: records(arrays=ArrayRecord({"w": Array(np.zeros(2, np.float32))})),
    "too many": lambda: records(arrays=ArrayRecord({str(i): Array(np.zeros(1)) for i in range(17)})),
}


@pytest.mark.parametrize("name", MALFORMED_REPLIES)
def test_malformed_reply(sites: Sites, name: str) -> None:
    hostile = raw(lambda message: Message(MALFORMED_REPLIES[name](), reply_to=message))
    assert ask(sites(a=hostile, b=echo), a=Note(b"{}"), b=Note(b"{}")) == {
        "a": Answer(None, MALFORMED), "b": Answer(Note(b"{}"), None)}


def test_a_reply_in_another_sites_name_is_ignored(sites: Sites) -> None:
    """Site a answers as if it were another node. (Over mTLS the listener refuses it before the exchange sees it.)"""

    def forge(message: Any) -> Any:
        reply = Message(records(), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id + 1
        return reply

    answers = ask(sites(a=raw(forge), b=echo), 0.5, a=Note(b"{}"), b=Note(b"{}"))
    assert answers["a"] == Answer(None, UNREACHABLE) and answers["b"].code is None


def test_a_reply_to_another_message_is_ignored(sites: Sites) -> None:
    def forge(message: Any) -> Any:
        reply = Message(records(), reply_to=message)
        reply.metadata.__dict__["_reply_to_message_id"] = "0" * 64
        return reply

    assert ask(sites(a=raw(forge)), 0.5, a=Note(b"{}"))["a"] == Answer(None, UNREACHABLE)


def test_our_own_notes_are_checked(sites: Sites) -> None:
    exchange = sites(a=echo)
    for note in (Note(b"x" * (MAX_BODY_BYTES + 1)), Note(b"", {"w": np.zeros(2)}),  # type: ignore[dict-item]
                 Note(b"", {"w": np.zeros((1, 2), np.float32)})):
        with pytest.raises(UsageError, match=r"exchange\.note"):
            ask(exchange, a=note)
    with pytest.raises(UsageError, match=r"exchange\.no_such_site"):
        ask(exchange, aa=Note(b""))


def test_online(sites: Sites) -> None:
    assert sites().online() == {"a", "b"}


def test_inprocess_faults_taps_and_bytes() -> None:
    seen: list[tuple[Any, Any]] = []
    nodes = {"a": 1, "b": 2, "c": 3}
    faults: dict[tuple[int, int], Any] = {(2, 0): "request", (3, 1): "reply"}
    grid = InProcessGrid({node: build_app({"train.update": echo}) for node in nodes.values()},
                         drop=lambda node, message, k: faults.get((node, k)),
                         tap=lambda message, reply: seen.append((message, reply)))
    exchange = Exchange(grid, nodes)
    notes = {name: Note(b"{}", {"w": np.ones(1000, np.float32)}) for name in nodes}
    start = time.monotonic()
    for silent in ("b", "c"):
        answers = exchange.ask("update", notes, deadline_s=60)
        assert {name for name, answer in answers.items() if answer.code == UNREACHABLE} == {silent}
    assert time.monotonic() - start < 5  # a fault costs no time
    assert len(seen) == 5 and all(reply.metadata.src_node_id == m.metadata.dst_node_id for m, reply in seen)
    assert 6 * 4000 < grid.bytes_down < 6 * 5500 and 5 * 4000 < grid.bytes_up < 5 * 5500


def test_inprocess_nodes_share_no_memory() -> None:
    """What a node got, and what it sent, may change afterwards without the other side noticing."""
    kept: list[Any] = []
    app = ClientApp()

    @app.train("update")
    def keep(message: Any, context: Any) -> Any:
        reply = Message(message.content, reply_to=message)
        kept.extend((message, reply))
        return reply

    grid = InProcessGrid({1: app})
    sent = grid.create_message(pack(Note(b"{}", {"w": np.ones(4, np.float32)})), "train.update", 1, "")
    (got,) = grid.send_and_receive([sent])
    for message in kept:
        message.content["c"]["body"] = b"changed"
        message.content["arrays"]["w"].data = b""
    assert sent.content["c"]["body"] == got.content["c"]["body"] == b"{}" and unpack(got.content) is not None


@pytest.mark.case(22, 26)
def test_a_run_outlives_an_hour_in_which_its_coordinator_stood_still(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the clock jumped ahead: Flower takes either for the death of the process that the run belongs to."""
    now = in_memory_corestate.now
    with server(pki) as fleet:
        assert fleet.state.activate_node(fleet.nodes["a"], 10)
        monkeypatch.setattr(in_memory_corestate, "now", lambda: now() + timedelta(hours=1))
        fleet.state.get_tasks()  # Flower looks for dead ones first
        message = fleet.grid.create_message(pack(Note(b"{}")), "train.update", fleet.nodes["a"], "")
        assert len(fleet.grid.push_messages([message])) == 1
