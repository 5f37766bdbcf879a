"""The bodies of the stages that aren't secure-aggregation messages, as frozen models with one canonical encoding."""

from __future__ import annotations

from pydantic import Field

from privacy.canonical import MAX_JSON_BYTES, canonical
from privacy.contract import Sha256, Terms
from privacy.statements import MAX_ENVELOPE, MAX_PEM
from privacy.transparency import MAX_PROOF

MAX_CHECKPOINT = 4096  # bytes of a signed head of the log, or of a witness of it


class Ask(Terms):
    """Body of the queries `accept` and `closing`."""

    contract: Sha256


class Acceptance(Terms):
    """Answer to `accept`."""

    statement: str = Field(max_length=MAX_ENVELOPE, description="envelope of urn:consilo:acceptance:2")


class Included(Terms):
    """Proof that one of a site's own statements is in the log."""

    sha256: Sha256
    index: int = Field(ge=0)
    path: tuple[Sha256, ...] = Field(max_length=MAX_PROOF)


class Checkpoint(Terms):
    """Body of the query `witness`: the log's new head, and why it continues the head of `old` entries."""

    contract: Sha256
    certificate: str = Field(max_length=MAX_PEM, description="the coordinator's Ed25519 certificate, PEM")
    checkpoint: str = Field(max_length=MAX_CHECKPOINT, description="envelope of urn:consilo:checkpoint:1")
    old: int = Field(ge=0, description="size of the last head that this site is known to have seen; 0: none")
    proof: tuple[Sha256, ...] = Field(max_length=MAX_PROOF)
    included: tuple[Included, ...] = Field(max_length=16)
    ledger: str = Field(max_length=MAX_ENVELOPE, description="the newest statement in which this site named a head of the "
                        "same lineage, or ''")


class Cosigned(Terms):
    """Answer to `witness`: the size of the site's head, and its signature on the checkpoint, '' if `old` was another."""

    size: int = Field(ge=0)
    statement: str = Field(max_length=MAX_CHECKPOINT, description="envelope of urn:consilo:witness:1")


class Masked(Terms):
    """Answer to `masked`: M5 and the site's statement on the attempt; the masked vector travels beside it."""

    m5: str = Field(max_length=MAX_ENVELOPE)
    statement: str = Field(max_length=MAX_ENVELOPE, description="envelope of urn:consilo:round-site:4")


class Closed(Terms):
    """Answer to `closing`. Statement and ledger are "" when trust is none."""

    statement: str = Field(max_length=MAX_ENVELOPE, description="envelope of urn:consilo:closing:1")
    ledger: str = Field(max_length=MAX_JSON_BYTES, description="the extract, JSON lines")
    refusals: tuple[str, ...] = Field((), max_length=32, description="envelopes of urn:consilo:refusal:1")


def dump(body: Terms) -> bytes:
    return canonical(body.model_dump(mode="json"))
