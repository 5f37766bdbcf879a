"""The one exit: nothing enters a message of a site but what is tagged, by type and checked again at run time.

System      a function of keys, contract, protocol and ledger; of no record
DpReleased  computed from records under the mechanism, with the charge that paid for it (post-processing included)
LocalOnly   everything else: loss, counts, reasons, timings of records; it can't be put into a message
Refusals leave as a `SiteCode`, by `fl_client.replies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fl_client.app import Vector
from privacy.contract import Contract
from privacy.errors import Refused


class Tag(StrEnum):
    SYSTEM = "system"
    DP_RELEASED = "dp-released"
    LOCAL_ONLY = "local-only"


@dataclass(frozen=True)
class Charge:
    """The right to release one attempt's update: the ledger's record, made durable before any record was sampled.

    seq: of the reserve; None without a ledger, which only a contract with trust=none allows.
    Raises Refused `exit.uncharged`.
    """

    contract: Contract = field(repr=False)
    round: int
    attempt: int
    seq: int | None

    def __post_init__(self) -> None:
        if self.seq is None and self.contract.privacy.trust != "none":
            raise Refused("exit.uncharged", "An update of a private contract has no charge.", "Reserve it first.")


@dataclass(frozen=True)
class System:
    value: bytes
    tag = Tag.SYSTEM


@dataclass(frozen=True)
class DpReleased:
    value: bytes | Vector
    charge: Charge
    tag = Tag.DP_RELEASED


@dataclass(frozen=True)
class LocalOnly:
    value: object = field(repr=False)
    tag = Tag.LOCAL_ONLY


@dataclass(frozen=True)
class Outgoing:
    """A message that may leave. Raises Refused `exit.untagged` for anything else than the tagged types."""

    body: System | DpReleased
    arrays: Mapping[str, DpReleased] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bodies_fit = type(self.body) in (System, DpReleased) and isinstance(self.body.value, bytes)
        vectors_fit = all(type(v) is DpReleased and type(v.charge) is Charge and not isinstance(v.value, bytes)
                          for v in self.arrays.values())
        if not bodies_fit or not vectors_fit:
            raise Refused("exit.untagged", "Something that is not tagged for leaving was put into a message.",
                          "Tag it system, or release it under the mechanism; local-only values stay.")


def unwrap(outgoing: object) -> tuple[bytes, dict[str, Any]]:
    """(body, vectors) of an `Outgoing`; the only way from a handler into a message. Raises Refused `exit.untagged`."""
    if type(outgoing) is not Outgoing or not isinstance(outgoing.body.value, bytes):
        raise Refused("exit.untagged", "A handler returned something that is no tagged message.", "Return an Outgoing.")
    return outgoing.body.value, {name: item.value for name, item in outgoing.arrays.items()}
