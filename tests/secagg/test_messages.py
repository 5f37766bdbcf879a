"""Messages: one encoding each; every change of a field is refused or without effect."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_kit import Scene, added, at, edit, vectors

from privacy.canonical import canonical
from privacy.contract import Terms
from privacy.errors import Aborted
from privacy.secagg import messages
from privacy.secagg.messages import M1, M2, M3, M4, M5, M6, M7, M8, M9, M3Body, dump, load
from simulations.adversary import Consortium

MODELS = {"m1": M1, "m2": M2, "m3": M3, "m4": M4, "m5": M5, "m6": M6, "m7": M7, "m8": M8, "m9": M9}

INDEX, BLOB = st.integers(0, 99), st.binary(max_size=70)
M1S = st.builds(M1, index=INDEX, certificate=BLOB, public=BLOB, signature=BLOB)
BODIES = st.builds(M3Body, index=INDEX, com_b=BLOB, com_s=BLOB, ciphertexts=BLOB)
M5S = st.builds(M5, index=INDEX, y_hash=st.binary(min_size=32, max_size=32).map(bytes.hex), signature=BLOB)
M7S = st.builds(M7, index=INDEX, signature=BLOB)
SEALED = st.lists(st.tuples(INDEX, BLOB), max_size=3).map(tuple)
ANY = st.one_of(M1S, st.builds(M2, keys=st.lists(M1S, max_size=3).map(tuple)),
                st.builds(M3, body=BODIES, signature=BLOB, ciphertexts=SEALED),
                st.builds(M4, bodies=st.lists(st.tuples(BODIES, BLOB), max_size=3).map(tuple), inbound=SEALED),
                M5S, st.builds(M6, survivors=st.lists(M5S, max_size=3).map(tuple)),
                M7S, st.builds(M8, votes=st.lists(M7S, max_size=3).map(tuple)),
                st.builds(M9, index=INDEX, shares=SEALED, signature=BLOB,
                          pairs=st.lists(st.tuples(INDEX, INDEX, BLOB), max_size=3).map(tuple)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ANY)
def test_a_message_is_read_back_and_its_encoding_is_canonical(message: Terms) -> None:
    data = dump(message)
    assert data == canonical(message.model_dump(mode="json"))
    assert load(type(message), data) == message
    assert canonical(json.loads(data)) == data


def sent_and_received(consortium: Consortium) -> dict[str, bytes]:
    """Every kind of message, of a round from which a site dropped out."""
    scene, seen = Scene.of(consortium, 5, 4), dict[str, bytes]()

    def hook(message: str, u: int, data: bytes) -> bytes | None:
        if u == 1 and message in MODELS:
            seen[message] = data
        return None if (message, u) == ("m5", 4) else data

    assert scene.play(hook).total is not None and len(seen) == 9
    return seen


def test_real_messages_are_read_back(consortium: Consortium) -> None:
    for kind, data in sent_and_received(consortium).items():
        assert dump(load(MODELS[kind], data)) == data == canonical(json.loads(data))


def variants(value: Any) -> Iterator[Any]:
    """The same JSON with one node changed."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield {k: v for k, v in value.items() if k != key}
            for changed in variants(item):
                yield value | {key: changed}
        yield value | {"more": 0}
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield value[:i] + value[i + 1:]
            for changed in variants(item):
                yield [*value[:i], changed, *value[i + 1:]]
        yield [*value, value[-1] if value else 0]
        yield value[::-1] if value[::-1] != value else {}
    elif isinstance(value, int):
        yield from (value + 1, 99, str(value))
    else:
        half = len(value) // 2
        other = value[:half] + ("B" if value[half:half + 1] == "A" else "A") + value[half + 1:]
        yield from (v for v in ("", value[4:], other, 0) if v != value)


@pytest.mark.parametrize("message", MODELS)
def test_every_change_of_a_message_is_refused_or_harmless(consortium: Consortium, message: str) -> None:
    """Of what goes from or to site 1, of four: refused by who gets it (or, where a list could have been that short, site 1's
    answer by the coordinator), and the others' sum is exact. Harmless is only to leave a vote out where enough are left."""
    honest = Scene.of(consortium)
    seen = dict[str, bytes]()
    honest.play(lambda m, u, data: seen.setdefault(m, data) if u == 1 else data)
    xs, outcomes = vectors(honest.offer), Counter[tuple[str, ...]]()
    count = sum(1 for _ in variants(json.loads(seen[message])))
    for k in range(count):
        scene = Scene.of(consortium)

        def change(value: Any, k: int = k) -> None:
            new = next(v for i, v in enumerate(variants(dict(value))) if i == k)
            value.clear()
            value.update(new)

        played = scene.play(at(scene, message, 1, edit(change)))
        assert played.total is not None and {u for _, u in played.refused} <= {1}
        assert np.array_equal(played.total, added(xs, played.coordinator.survivors))
        outcomes[tuple(m for m, _ in played.refused)] += 1
    other = {"m2": {("m3",): 3}, "m6": {("m7",): 3}, "m8": {(): 4}}.get(message, {})
    assert outcomes == {(message,): count - sum(other.values())} | other


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"{", b"\xff", b'{"index":0,"index":0,"signature":""}',
                                  b'{"index":-1,"signature":""}', b'{"index":100,"signature":""}',
                                  b'{"index":0, "signature":""}', b'{"signature":"","index":0}',
                                  b'{"index":0,"signature":"A"}', b'{"index":0,"signature":"QR=="}',
                                  b'{"index":0,"signature":"Q Q=="}', b'{"index":0,"signature":"QQ"}',
                                  b'{"index":0,"signature":"\xc3\xa9==="}', b'{"index":true,"signature":""}',
                                  b'{"index":0.0,"signature":""}', b'{"index":"0","signature":""}'])
def test_malformed_messages_are_refused_with_one_code(data: bytes) -> None:
    with pytest.raises(Aborted, match=r"secagg\.message"):
        load(M7, data)
    assert load(M7, b'{"index":0,"signature":"QQ=="}').signature == b"A"


def test_a_message_has_a_greatest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is parsed; and the longest one of a hundred sites is below."""
    monkeypatch.setattr(messages, "MAX_MESSAGE", 30)
    load(M7, b'{"index":0,"signature":"QQ=="}')
    with pytest.raises(Aborted, match=r"secagg\.message"):
        load(M7, b'{"index":0,"signature":"QQQQ"}' + b" ")
    monkeypatch.undo()
    body = M3Body(index=0, com_b=bytes(32), com_s=bytes(32 * 99), ciphertexts=bytes(32 * 99))
    sealed = bytes(1088 + 32 + 32 * 101 + 16)
    m4 = M4(bodies=tuple((body, bytes(64)) for _ in range(100)), inbound=tuple((99, sealed) for _ in range(99)))
    m9 = M9(index=99, shares=tuple((99, bytes(32)) for _ in range(67)), signature=bytes(64),
            pairs=tuple((99, 99, bytes(32)) for _ in range(67 * 33)))
    m3 = M3(body=body, signature=bytes(64), ciphertexts=m4.inbound)
    m2 = M2(keys=tuple(M1(index=99, certificate=bytes(8192), public=bytes(1216), signature=bytes(64)) for _ in range(100)))
    for message in (m2, m3, m4, m9):
        assert load(type(message), dump(message)) == message
