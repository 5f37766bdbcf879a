"""The bodies of the stages that aren't secure-aggregation messages, as frozen models with one canonical encoding."""

from __future__ import annotations

from pydantic import Field

from privacy.canonical import MAX_JSON_BYTES, canonical
from privacy.contract import Sha256, Terms


class Ask(Terms):
    """Body of the queries `accept` and `closing`."""

    contract: Sha256


class Acceptance(Terms):
    """Answer to `accept`."""

    statement: str = Field(max_length=65_536, description="envelope of urn:consilo:acceptance:2")


class Masked(Terms):
    """Answer to `masked`: M5 and the site's statement on the attempt; the masked vector travels beside it."""

    m5: str = Field(max_length=65_536)
    statement: str = Field(max_length=65_536, description="envelope of urn:consilo:round-site:2")


class Closed(Terms):
    """Answer to `closing`. Both are "" when trust is none."""

    statement: str = Field(max_length=65_536, description="envelope of urn:consilo:closing:1")
    ledger: str = Field(max_length=MAX_JSON_BYTES, description="the extract, JSON lines")


def dump(body: Terms) -> bytes:
    return canonical(body.model_dump(mode="json"))
