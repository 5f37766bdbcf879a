"""The messages M1 to M9 as frozen models. On the wire: canonical JSON, bytes as base64, unknown keys refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PlainSerializer

from privacy.canonical import parse
from privacy.contract import Sha256, Terms, validate
from privacy.errors import Aborted, UsageError
from privacy.secagg.transcript import MAX_COHORT

MAX_MESSAGE = 4 * 2**20
HASH = 32


def _decode(value: object) -> object:
    return base64.b64decode(value, validate=True) if isinstance(value, str) else value


def _many(of: str | None = None, most: int = MAX_COHORT) -> Any:
    """A list of a peer's message: bounded, and refused at its first bad item (an error for each would cost gigabytes)."""
    return Field(max_length=most, fail_fast=True, description=of)


Blob = Annotated[bytes, BeforeValidator(_decode), PlainSerializer(lambda b: base64.b64encode(b).decode(), when_used="json")]
Index = Annotated[int, Field(ge=0, lt=MAX_COHORT)]
Ring = NDArray[np.uint32] | NDArray[np.uint16]
M = TypeVar("M", bound=Terms)


def _item(items: bytes, k: int) -> bytes:
    return items[HASH * k:HASH * (k + 1)]


class M1(Terms):
    index: Index
    certificate: Blob = Field(description="PEM of the Ed25519 certificate", max_length=8192)
    public: Blob
    signature: Blob


class M2(Terms):
    keys: tuple[M1, ...] = _many()


class M3Body(Terms):
    """What a site commits to before anyone has shares. 32-byte items in the order of U1, which T1 fixes."""

    index: Index
    com_b: Blob
    com_s: Blob = Field(description="commitments to s_uw, for each w > u")
    ciphertexts: Blob = Field(description="SHA-256 of the ciphertext for each v other than u")

    def to_bytes(self) -> bytes:
        return dump(self)

    def fits(self, u1: Sequence[int]) -> bool:
        """Whether the lists have the length that U1 gives them."""
        above = sum(w > self.index for w in u1)
        return (len(self.com_b), len(self.com_s), len(self.ciphertexts)) == (HASH, HASH * above, HASH * (len(u1) - 1))

    def pair(self, w: int, u1: Sequence[int]) -> bytes:
        """Commitment to s_uw, w > u."""
        return _item(self.com_s, sum(self.index < v < w for v in u1))

    def ciphertext(self, v: int, u1: Sequence[int]) -> bytes:
        """SHA-256 of the ciphertext for v."""
        return _item(self.ciphertexts, sum(w < v and w != self.index for w in u1))


class M3(Terms):
    body: M3Body
    signature: Blob
    ciphertexts: tuple[tuple[Index, Blob], ...] = _many()


class M4(Terms):
    bodies: tuple[tuple[M3Body, Blob], ...] = _many("(body, signature) of every site")
    inbound: tuple[tuple[Index, Blob], ...] = _many("(sender, ciphertext for the receiver)")


class M5(Terms):
    index: Index
    y_hash: Sha256
    signature: Blob


class M6(Terms):
    survivors: tuple[M5, ...] = _many()


class M7(Terms):
    index: Index
    signature: Blob


class M8(Terms):
    votes: tuple[M7, ...] = _many()


class M9(Terms):
    index: Index
    shares: tuple[tuple[Index, Blob], ...] = _many("(u, this site's share of b_u), u a survivor")
    pairs: tuple[tuple[Index, Index, Blob], ...] = _many("(low, high, its share of s_low,high), one of them a survivor",
                                                         MAX_COHORT**2 // 4)
    signature: Blob

    def joined(self) -> bytes:
        """All shares; which ones they are is known from T3."""
        return b"".join([*(share for _, share in self.shares), *(share for _, _, share in self.pairs)])


def dump(message: Terms) -> bytes:
    """RFC 8785 bytes. Messages hold ASCII strings and integers only, for which the standard library's are the same."""
    return json.dumps(message.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def load(model: type[M], data: bytes) -> M:
    """Parse a peer's message. Raises Aborted `secagg.message`, whatever is wrong with it."""
    malformed = Aborted("secagg.message", f"A message {model.__name__} is malformed.",
                        "The round is void; check the versions of both sides.")
    try:
        message = validate(model, parse(data, limit=MAX_MESSAGE))
    except UsageError as e:
        raise malformed from e
    if dump(message) != data:  # one message has one encoding
        raise malformed
    return message
