"""The messages M1-M9 as frozen models. On the wire: canonical JSON, bytes as base64, unknown keys refused."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, Field, PlainSerializer

from privacy.canonical import canonical, parse
from privacy.contract import Sha256, Terms, validate
from privacy.errors import Aborted, UsageError
from privacy.secagg.transcript import MAX_COHORT

MAX_MESSAGE = 4 * 2**20  # M4 of 100 sites is 2.2 MiB


def _decode(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as e:
        raise ValueError("not base64") from e
    if base64.b64encode(raw).decode() != value:
        raise ValueError("not canonical base64")
    return raw


Blob = Annotated[bytes, BeforeValidator(_decode), PlainSerializer(lambda b: base64.b64encode(b).decode(), when_used="json")]
Index = Annotated[int, Field(ge=0, lt=MAX_COHORT)]
M = TypeVar("M", bound=Terms)


class M1(Terms):
    index: Index
    certificate: Blob = Field(description="PEM of the Ed25519 certificate", max_length=8192)
    public: Blob
    signature: Blob


class M2(Terms):
    keys: tuple[M1, ...] = Field(max_length=MAX_COHORT)


class M3Body(Terms):
    index: Index
    com_b: Blob
    com_s: tuple[tuple[Index, Blob], ...]
    ciphertexts: tuple[tuple[Index, Blob], ...] = Field(description="(v, SHA-256 of the ciphertext for v)")

    def to_bytes(self) -> bytes:
        return canonical(self.model_dump(mode="json"))


class M3(Terms):
    body: M3Body
    signature: Blob
    ciphertexts: tuple[tuple[Index, Blob], ...]


class M4(Terms):
    bodies: tuple[tuple[M3Body, Blob], ...] = Field(description="(body, signature) of every site", max_length=MAX_COHORT)
    inbound: tuple[tuple[Index, Blob], ...] = Field(description="(sender, ciphertext for the receiver)")


class M5(Terms):
    index: Index
    y_hash: Sha256
    signature: Blob


class M6(Terms):
    survivors: tuple[M5, ...] = Field(max_length=MAX_COHORT)


class M9(Terms):
    index: Index
    shares: tuple[tuple[Index, Blob], ...] = Field(description="(u, this site's share of b_u)")
    signature: Blob


def dump(message: Terms) -> bytes:
    return canonical(message.model_dump(mode="json"))


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
