"""Canonical JSON and the strict parser."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.canonical import MAX_JSON_DEPTH, canonical, labelled_hash, parse
from privacy.errors import UsageError

JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**53 + 1, 2**53 - 1) | st.text(st.characters(codec="utf-8")),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner))


@given(JSON)
def test_parse_inverts_canonical(value: object) -> None:
    assert canonical(parse(canonical(value))) == canonical(value)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    try:
        canonical(parse(data))
    except UsageError as e:
        assert e.code in ("json.invalid", "json.not_canonical")


@pytest.mark.parametrize("bad", [b'{"a":1,"a":2}', b"NaN", b"[Infinity]", b"[-Infinity]", b"{", b"\xff", b"",
                                 b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1), b'{"a":{"b":1,"b":1}}'])
def test_refused(bad: bytes) -> None:
    with pytest.raises(UsageError, match=r"json\.invalid"):
        parse(bad)


def test_attack_unterminated_string_is_scanned_in_linear_time() -> None:
    """4 MiB of escaped quotes: a backtracking scan would need hours."""
    with pytest.raises(UsageError, match=r"json\.invalid"):
        parse(b'"' + b'\\"' * 2**21)


def test_brackets_inside_strings_are_no_depth() -> None:
    assert parse(b'["' + b"[" * 1000 + b'\\"]"]') == ["[" * 1000 + '"]']


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_labelled_hash_is_injective_in_its_parts(a: list[bytes], b: list[bytes]) -> None:
    assert (labelled_hash("x", *a) == labelled_hash("x", *b)) == (a == b)
    assert labelled_hash("x", *a) != labelled_hash("y", *a)
