"""Canonical JSON (RFC 8785), strict parsing, and labelled, length-prefixed SHA-256.

Guarantees: two equal values have one encoding; `parse` refuses duplicate keys, non-finite numbers, deep nesting and
oversized input before anything else sees them; `labelled_hash` is injective in its label and parts.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

import rfc8785

from privacy.errors import UsageError

MAX_JSON_BYTES = 8 * 2**20  # a ledger extract of 10,000 records stays below it
MAX_JSON_DEPTH = 32  # statements nest 6 deep
# Possessive, closing quote optional: linear on any input.
_OPEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.S)


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value. Raises UsageError `json.not_canonical` for NaN, big ints, foreign types."""
    try:
        return bytes(rfc8785.dumps(value))
    except (rfc8785.CanonicalizationError, ValueError, TypeError, RecursionError) as e:
        raise UsageError("json.not_canonical", f"A value has no canonical JSON form ({type(e).__name__}).",
                         "Use finite numbers, strings, lists and dicts with string keys.") from e


def digest(value: Any) -> str:
    """Lowercase hex SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def parse(data: bytes, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Parse JSON from outside. Raises UsageError `json.invalid` without quoting the input."""

    def bad(why: str) -> UsageError:
        return UsageError("json.invalid", f"The JSON is refused: {why}.", "Send the document as it was written.")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            raise bad("a key occurs twice")
        return out

    def constant(_: str) -> Any:
        raise bad("a number is not finite")

    def real(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else constant(text)  # 1e999

    if len(data) > limit:
        raise bad(f"larger than {limit} bytes")
    depth = deepest = 0
    for token in _OPEN.finditer(data):
        first = token.group()[:1]
        depth += (first in b"[{") - (first in b"]}")
        deepest = max(deepest, depth)
    if deepest > MAX_JSON_DEPTH:
        raise bad(f"nested deeper than {MAX_JSON_DEPTH}")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant,
                          parse_float=real)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as e:
        raise bad("not well-formed") from e


def decimal(value: float) -> str:
    """A number as the shortest decimal string that reads back exactly (statements hold no JSON floats)."""
    return repr(float(value))


def labelled_hash(label: str, *parts: bytes | str | int) -> bytes:
    """SHA-256 over a label and parts, each length-prefixed (8 bytes, little-endian); ints as 8 bytes."""
    h = hashlib.sha256()
    for part in (label, *parts):
        if isinstance(part, int):
            raw = part.to_bytes(8, "little")
        else:
            raw = part.encode() if isinstance(part, str) else part
        h.update(len(raw).to_bytes(8, "little") + raw)
    return h.digest()
