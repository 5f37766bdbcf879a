"""What the fuzz tests share: hostile bytes made of good ones, and the one property that all parsers have.

Property: whatever the bytes, a parser returns a value or raises a typed error of one printable, bounded line that quotes no
value of the document. Examples are derandomised and few in CI; `make test-long` runs LONG times as many, drawn anew.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from privacy.errors import MAX_WORDS, ConsiloError

CANARY = "canary-5f1c"  # stands where a secret may stand
LONG = 50
TIMES = pytest.mark.parametrize("times", [1, pytest.param(LONG, marks=[pytest.mark.long, pytest.mark.timeout(3600)])],
                                ids=["ci", "long"])
DEEP: Any = "leaf"
for _ in range(40):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**31, 2**53, 2**64, 10**400, 0.5, -0.0, 1e308, "", CANARY, CANARY * 500, "\ud800", "\0", "\n",
    "e\u0301", [], {}, [[]], {"a": 1}, {CANARY: CANARY}, [CANARY] * 200, DEEP, "2026-02-30T00:00:00Z", "9" * 30, "1e99",
    "nan", "-1", "0" * 64, "AAAA", "====")
TEXTS = (
    b'{"a":1,"a":2}', b"NaN", b"1e999", b"-Infinity", b"[" * 5000, b'{"a":' * 5000, b'"\\ud800"', b'"\\u0000"', b"1" * 5000,
    b"", b"\n", b"null", b"[]", b"{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b'"' * 999, b"\\" * 999, b'{"\\u0061":1}')
# Keys are named, to be mended, and a PEFT variant, which is public; values never.
NAMED = re.compile(r"(Unknown key|Key|override) '[^']*'|adapter\.variant: .*? can't train")


class Target(NamedTuple):
    """allowed: what may be raised beside ConsiloError."""

    parser: Callable[[bytes], object]
    examples: Sequence[bytes]
    allowed: tuple[type[Exception], ...] = ()


def bounded(examples: int, times: int) -> settings:
    """Nothing is shrunk: a failure has to cost no more than the rest."""
    return settings(max_examples=examples * times, deadline=None, derandomize=times == 1, database=None,
                    suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))


def fuzz(target: Target, examples: int, times: int) -> None:
    """Raises AssertionError, or what the parser raised."""

    @bounded(examples, times)
    @given(hostile(target.examples))
    def run(data: bytes) -> None:
        holds(target, data)

    for good in target.examples:
        holds(target, good)
    run()


def holds(target: Target, data: bytes) -> object:
    """What came of the bytes: a value or an error."""
    try:
        return target.parser(data)
    except target.allowed as e:
        assert CANARY not in str(e)
        return e
    except ConsiloError as e:
        said = f"{e}"
        assert said.isprintable() and len(e.cause) <= MAX_WORDS + 3 >= len(e.mend), said[:500]
        assert CANARY not in NAMED.sub("", said), said[:500]
        return e


def hostile(examples: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    changed = st.builds(mutated, st.sampled_from(list(examples)), st.integers(0, 2**32 - 1))
    return st.one_of(changed, changed, changed, st.binary(max_size=200), st.sampled_from(TEXTS))


def mutated(data: bytes, seed: int) -> bytes:
    """One to three changes: of single bytes, of lines, of the JSON or of the DER inside, whatever there is."""
    rng = Random(seed)
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice((_bytes, _lines, _json, _json, _json, _der))(data, rng)
    return data


def _bytes(data: bytes, rng: Random) -> bytes:
    at, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    low, high = sorted((at, other))
    return rng.choice((
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1:], lambda: data[:at], lambda: data[low:high],
        lambda: data[:at] + rng.randbytes(rng.choice((1, 2, 8))) + data[at:], lambda: data[:low] + data[high:],
        lambda: data[:high] + data[low:high] + data[high:], lambda: data + data, lambda: data[::-1],
        lambda: data[:at] + b"\0" + data[at:], lambda: data[:at] + rng.choice(TEXTS) + data[at:],
        lambda: data[:at] + CANARY.encode() + data[at:]))()


def _lines(data: bytes, rng: Random) -> bytes:
    rows = data.splitlines(keepends=True) or [b""]
    i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
    return b"".join(rng.choice((
        lambda: rows[:i] + rows[i + 1:], lambda: [*rows[:i], rows[i], *rows[i:]], lambda: [*rows, rows[i]],
        lambda: [*rows[:i], rows[j], *rows[i + 1:]], lambda: [*rows[:i], _json(rows[i], rng), *rows[i + 1:]],
        lambda: [*rows[:i], rng.choice(TEXTS) + b"\n", *rows[i + 1:]]))())


def _json(data: bytes, rng: Random) -> bytes:
    end = b"\n" if data.endswith(b"\n") else b""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        rows = data.splitlines(keepends=True)
        if len(rows) < 2 or not data.startswith(b"{"):
            return _bytes(data, rng)
        i = rng.randrange(len(rows))
        return b"".join([*rows[:i], _json(rows[i], rng), *rows[i + 1:]])
    text = json.dumps(changed(value, rng), sort_keys=True, separators=(",", ":"), ensure_ascii=rng.random() < 0.2)
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1 and data[:1] == b"{":  # the first key twice
        data = b"{" + data[1:data.find(b",")] + b"," + data[1:]
    return data + end


def changed(value: Any, rng: Random) -> Any:
    """The same JSON with one node changed; a node deep inside as likely as one at the top."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        what = rng.random()
        if what < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.22:
            return value | {rng.choice((CANARY, key + "x", "", "\ud800", "\n")): value[key]}
        return value | {key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        what = rng.random()
        if what < 0.08:
            return value[:i] + value[i + 1:]
        if what < 0.16:
            return value + [value[i]] * rng.choice((1, 2, 150))
        return [*value[:i], changed(value[i], rng), *value[i + 1:]]
    if isinstance(value, str) and rng.random() < 0.4:
        return rng.choice((value[::-1], value[:-1], value + "A", value * 2, value.upper(), value + "\0", value + "\n"))
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, -value, str(value), float(value) if abs(value) < 1e9 else 0.5, [value]))
    return rng.choice(VALUES)


def _der(data: bytes, rng: Random) -> bytes:
    """Change bytes inside a PEM block."""
    blocks = list(re.finditer(rb"(-----BEGIN [A-Z0-9 ]+-----)([A-Za-z0-9+/=\n\\]+?)(-----END)", data))
    if not blocks:
        return _bytes(data, rng)
    block = rng.choice(blocks)
    try:
        der = base64.b64decode(block[2].replace(b"\\n", b""))
    except binascii.Error:
        return _bytes(data, rng)
    body = base64.b64encode(_bytes(der, rng))
    line = b"\\n" if b"\\n" in block[2] else b"\n"
    wrapped = line.join(body[i:i + 64] for i in range(0, len(body), 64))
    return data[:block.start(2)] + line + wrapped + line + data[block.end(2):]
