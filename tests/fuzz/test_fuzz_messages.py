"""What comes in a round: M0 to M9, the bodies of the other stages, Flower's messages, and the trainer's pipe."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fuzz_kit
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.metadata import Metadata
from fuzz_kit import CANARY, LONG, TIMES, Target, bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st

from fl_client import link
from fl_client.app import DTYPES, STYPE, StageRefused, to_note
from fl_client.frames import MAX_HEADER, Peer
from fl_client.round import _load
from fl_server import fleet_grid
from fl_server.exchange import MALFORMED, read_answer
from privacy import stages
from privacy.canonical import canonical, parse
from privacy.contract import Terms
from privacy.errors import SiteCode, UsageError
from privacy.secagg import messages, transcript
from privacy.secagg.coordinator import CoordinatorSession
from privacy.statements import make
from privacy.transparency import Head, sign_checkpoint
from simulations.adversary import Consortium, play

KINDS: dict[str, type[Terms]] = {f"M{i}": getattr(messages, f"M{i}") for i in range(1, 10)}
BODIES: dict[str, type[Terms]] = {"M0": transcript.Offer} | {kind.__name__: kind for kind in (
    stages.Ask, stages.Acceptance, stages.Checkpoint, stages.Cosigned, stages.Masked, stages.Closed)}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    """Every message and body as a real session makes it."""
    parties, sent = Consortium(tmp_path_factory.mktemp("parties"), 4), dict[str, bytes]()
    offer = parties.offer(4, 3, 8)

    def hook(message: str, site: int, data: bytes) -> bytes | None:
        sent.setdefault(message.upper(), data)
        return None if (message, site) == ("m5", 3) else data

    vectors = [np.zeros(8, np.uint32)] * 4
    assert play(parties, offer, vectors, hook, coordinator=CoordinatorSession(offer, parties.check)).total is not None
    one = parties.signers[0]
    said = make(one, "urn:consilo:acceptance:2", [("contract", "0" * 64)], {"site": "site0"}).decode()
    head = sign_checkpoint(one, Head(log="hub", size=3, root="0" * 64)).decode()
    good: dict[str, Terms] = {
        "M0": offer, "Ask": stages.Ask(contract="0" * 64), "Acceptance": stages.Acceptance(statement=said),
        "Checkpoint": stages.Checkpoint(
            contract="0" * 64, certificate="PEM", checkpoint=head, old=1, proof=("1" * 64,) * 3, ledger=said,
            included=(stages.Included(sha256="2" * 64, index=0, path=("3" * 64,)),)),
        "Cosigned": stages.Cosigned(size=3, statement=head), "Masked": stages.Masked(m5=sent["M5"].decode(), statement=said),
        "Closed": stages.Closed(statement=said, ledger='{"seq":0}\n', refusals=(said,))}
    return ({name: Target(lambda data, kind=kind: messages.load(kind, data), [sent[name]]) for name, kind in KINDS.items()}
            | {name: Target(lambda data, kind=kind: _load(kind, data), [stages.dump(good[name])], (StageRefused,))
               for name, kind in BODIES.items()})


@TIMES
@pytest.mark.parametrize("name", [*KINDS, *BODIES])
def test_messages(name: str, times: int, targets: dict[str, Target]) -> None:
    fuzz(targets[name], 60, times)


@pytest.mark.parametrize("name", [*KINDS, *BODIES])
def test_an_honest_message_is_read(name: str, targets: dict[str, Target]) -> None:
    """So that what is fuzzed lies beyond the first refusal."""
    assert isinstance(targets[name].parser(targets[name].examples[0]), Terms)


@TIMES
def test_json(times: int) -> None:
    """What `parse` lets through has a second reading that is the same: no number or key was lost."""
    def read(data: bytes) -> Any:
        value = parse(data)
        try:
            text = canonical(value)
        except UsageError as e:  # what JSON can hold and RFC 8785 can't: lone surrogates, integers beyond 2^53
            assert e.code == "json.not_canonical"
            json.dumps(value, allow_nan=False)
            return value
        assert parse(text) == value
        return value

    fuzz(Target(read, [b'{"a":[1,2.5,"x",null,true],"b":{"c":"\\u00e9"}}', b"[1e308,-0.0]"]), 300, times)


# Flower's messages ---------------------------------------------------------------------------------------------------

ARRAYS = st.builds(
    lambda dtype, shape, stype, data: Array(dtype=dtype, shape=shape, stype=stype, data=data),
    st.sampled_from([*DTYPES, "float64", "object", "<f4", "O", "", CANARY]),
    st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**40, 2**70]), max_size=3).map(tuple),
    st.sampled_from([STYPE, "numpy.ndarray", "pickle", ""]), st.sampled_from([0, 2, 4, 8, 12, 13]).map(bytes))
GOOD = st.integers(0, 3).map(lambda n: Array(dtype="float32", shape=(n,), stype=STYPE, data=bytes(4 * n)))
BODY = st.sampled_from([b"{}", b"", CANARY, 1, 1.5, True, [b"{}"], [1], bytes(4 * 2**20 + 1)])
CONFIG = st.dictionaries(st.sampled_from(["body", "more", ""]), BODY, max_size=2).map(ConfigRecord)
RECORDS = st.one_of(CONFIG, st.dictionaries(st.sampled_from(["y", "adapter", ""]), st.one_of(GOOD, ARRAYS), max_size=20)
                    .map(ArrayRecord))
CONTENT = st.one_of(
    st.dictionaries(st.sampled_from(["c", "arrays", "more"]), RECORDS, max_size=3),
    st.fixed_dictionaries({"c": st.just(ConfigRecord({"body": b"{}"})), "arrays": st.dictionaries(
        st.text("ab", max_size=2), st.one_of(GOOD, ARRAYS), max_size=3).map(ArrayRecord)}))


@TIMES
def test_flower_messages(times: int) -> None:
    """A note is exactly of the agreed form, on both sides alike, and holds the bytes that came."""
    @bounded(250, times)
    @given(CONTENT)
    def run(content: dict[str, Any]) -> None:
        message = SimpleNamespace(has_error=lambda: False, content=RecordDict(content))
        answer = read_answer(message)
        try:
            body, arrays = to_note(message)
        except StageRefused as e:
            assert e.code is SiteCode.BAD_MESSAGE
            assert answer.code == MALFORMED or not content["arrays"]  # the coordinator wants no empty record
            return
        sizes = {name: len(array.data) for name, array in content.get("arrays", {}).items()}
        assert isinstance(body, bytes) and {name: a.nbytes for name, a in arrays.items()} == sizes
        assert answer.note is None if "arrays" in content and not sizes else answer.note is not None

    run()


@TIMES
def test_objects_of_a_message(times: int) -> None:
    """What the other side hands over as the parts of a message: a message is made of them, or one of the errors that are
    taken for "no message"."""
    record = ArrayRecord({name: Array(np.arange(6, dtype=np.float32)) for name in ("a", "b")})
    metadata = Metadata(run_id=1, message_id="", src_node_id=1, dst_node_id=2, reply_to_message_id="", group_id="1",
                        created_at=0.0, ttl=60.0, message_type="train.update", src_task_id=1)
    message = Message(content=RecordDict({"c": ConfigRecord({"body": b"{}"}), "arrays": record}), metadata=metadata)
    good = {key: part.deflate() for key, part in link.get_all_nested_objects(message).items()}

    def read(key: str) -> Callable[[bytes], object]:
        def parser(data: bytes) -> object:
            made = []
            for side in (link, fleet_grid):
                try:
                    made.append(side._inflate(message.object_id, good | {key: data}))
                except side.BAD_OBJECT as e:
                    made.append(e)  # neither side says more than that it is no message
            assert type(made[0]) is type(made[1])
            return made[0]

        return parser

    for key, part in sorted(good.items(), key=lambda item: item[1]):
        assert isinstance(read(key)(part), Message)
        fuzz(Target(read(key), [part]), 30, times)


@TIMES
def test_errors_of_sites(times: int) -> None:
    """Of an error only a known code gets through."""
    @bounded(60, times)
    @given(st.one_of(st.sampled_from([*SiteCode]).map(str), st.text(), st.none(), st.integers()))
    def run(reason: Any) -> None:
        code = read_answer(SimpleNamespace(has_error=lambda: True, error=SimpleNamespace(reason=reason))).code
        assert code == (reason if reason in set(SiteCode) else MALFORMED)

    run()


# The trainer's pipe --------------------------------------------------------------------------------------------------

@TIMES
def test_frames(times: int) -> None:
    """A turned trainer's bytes: Unreachable, or a header that is an object and a payload of the size that was asked."""
    def read(data: bytes) -> object:
        source, writer = os.pipe()
        other, sink = os.pipe()
        try:
            os.write(writer, data[:60_000])
            os.close(writer)
            header, payload = Peer(source, sink).receive(limit=64)
            assert isinstance(header, dict) and len(payload) <= 64
            return header
        finally:
            for fd in (source, other, sink):
                os.close(fd)

    def frame(header: bytes, payload: bytes, *, more: int = 0) -> bytes:
        return struct.pack("<IQ", len(header), len(payload) + more) + header + payload

    examples = [frame(b'{"kind":"Refused","error":{"code":"a.b"}}', b""), frame(b'{"shapes":[["a",[2,3]]]}', bytes(24)),
                frame(b"[1]", b""), frame(b"{}", b"", more=2**40), struct.pack("<IQ", MAX_HEADER + 1, 0)]
    fuzz(Target(read, examples), 150, times)


def test_the_kit_finds_planted_faults() -> None:
    """Each kind of fault that it looks for: another exception, a quoted value, a line that isn't printable."""
    good = canonical({"a": {"b": ["x", 1]}, "c": "text"})

    def quotes(data: bytes) -> object:
        if CANARY.encode() in data:
            raise UsageError("json.invalid", f"Not valid: {data.decode('utf-8', 'replace')}", "Send another.")
        return parse(data)

    def loose(data: bytes) -> object:
        value = parse(data)
        return value["a"]["b"] if isinstance(value, dict) else value

    for parser, error in ((quotes, AssertionError), (loose, (KeyError, TypeError))):
        with pytest.raises((error, ExceptionGroup) if isinstance(error, type) else (*error, ExceptionGroup)):
            fuzz(Target(parser, [good]), 200, 1)
    assert LONG > 1 and fuzz_kit.mutated(good, 1) == fuzz_kit.mutated(good, 1)
