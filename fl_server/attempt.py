"""What an attempt at a round is made of: its result, who fell out of it, how sites' statements on it are opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from cryptography.x509 import Certificate

from privacy.contract import Contract, validate
from privacy.errors import CheckFailed, RoundVoid
from privacy.identity import fingerprint
from privacy.predicates import KINDS, Predicate, RoundSite
from privacy.secagg import transcript as tr
from privacy.statements import open_envelope
from strategies.base import Named

P = TypeVar("P", bound=Predicate)


@dataclass(frozen=True)
class Lost:
    """A site that didn't answer a stage as it should: by a `SiteCode`, silence, or the code of what was wrong."""

    site: str
    pass_no: int
    stage: str
    code: str


@dataclass(frozen=True)
class Summed:
    """One secure sum: T2, T3 and the signatures on T3 by site; all empty in plain mode."""

    view: str
    transcript: str
    votes: Mapping[str, bytes]


@dataclass(frozen=True)
class Done:
    """Result of one attempt: the mean change of the model, by tensor of the rule's `space`, over `sites`."""

    attempt: int
    change: Named
    sites: tuple[str, ...]
    sums: tuple[Summed, ...]


@dataclass(frozen=True)
class Deadlines:
    training_s: float
    stage_s: float


def void(code: str, bad: Mapping[str, str]) -> RoundVoid:
    """`bad`: what is wrong, by site; all are named in the cause."""
    error = RoundVoid(code, "; ".join(f"{name}: {why}" for name, why in sorted(bad.items())) + ".",
                      "Each site's own log says why; a new attempt needs a fresh update and a fresh charge.")
    error.sites = tuple(sorted(bad))
    return error


def statement(model: type[P], envelope: bytes, certificate: Certificate, *, subject: tuple[str, str] | None = None) -> P:
    """What a site says, once signature, predicate type, form and (if given) subject are right. Raises CheckFailed,
    UsageError."""
    said = open_envelope(envelope, {fingerprint(certificate): certificate})
    kind = next(k.predicate_type for k in KINDS.values() if k.model is model)
    if said.predicate_type != kind or (subject is not None and said.subject != (subject,)):
        raise CheckFailed("round.statement", "A statement is of another type or subject than asked for.", "Ask that site.")
    return validate(model, said.predicate)


def check_round_site(contract: Contract, name: str, offer: tr.Offer, view: str, masked: str, envelope: bytes,
                     certificate: Certificate) -> None:
    """A site's statement on this pass of this attempt, and on nothing else. Raises as `statement`."""
    said, m = statement(RoundSite, envelope, certificate, subject=("view", view) if view else ("masked", masked)), \
        contract.mechanism(name, offer.round)
    private = contract.privacy.trust != "none"
    if (said.site, said.run, said.contract, said.round, said.attempt, said.pass_no, said.adapter_in, said.view, said.masked,
            float(said.q), float(said.clip), float(said.sigma), said.steps, said.n_decl,
            bool(said.epsilon), bool(said.ledger_head)) != (
            name, offer.run, offer.contract, *offer.slot, offer.adapter, view, masked,
            m.q, m.clip, m.sigma, m.steps, m.n_decl, private, private):
        raise CheckFailed("round.statement", "A site's statement is about something else than this attempt.",
                          "That site is left out; its software differs.")
