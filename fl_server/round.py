"""The round as the coordinator drives it, from top to bottom. The site's side is fl_client/round.py.

One attempt: offer and adapter out, keys in; key list out, shares in; inbound shares out, masked vectors in and added as
they arrive; survivors out, unmasking shares in; the sum decoded. Whatever goes wrong makes the attempt void as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from cryptography.x509 import Certificate
from numpy.typing import NDArray

from fl_server.exchange import MALFORMED, Answer, Exchange, Note
from privacy import stages
from privacy.bundle import KINDS, Predicate, RoundSite
from privacy.canonical import parse
from privacy.contract import Contract, validate
from privacy.errors import CheckFailed, ConsiloError, RoundVoid
from privacy.identity import fingerprint
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.encoding import Encoding
from privacy.secagg.messages import dump
from privacy.secagg.peers import CheckCertificate
from privacy.secagg.plain import PlainCoordinator
from privacy.statements import open_envelope
from strategies.adapter import AdapterSpec, Tensors, adapter_digest

T = TypeVar("T")


@dataclass(frozen=True)
class Mean:
    """Result of one attempt: the weighted mean change, float32 (dim,), its transcript, the sites' statements."""

    attempt: int
    delta: NDArray[np.float32]
    transcript: str
    statements: Mapping[str, bytes]


@dataclass(frozen=True)
class Deadlines:
    training_s: float
    stage_s: float


class RoundDriver:
    """Runs attempts for one contract. certificates: each site's Ed25519 certificate, accepted before."""

    def __init__(self, contract: Contract, spec: AdapterSpec, exchange: Exchange, *, deadlines: Deadlines,
                 check_certificate: CheckCertificate, certificates: Mapping[str, Certificate]) -> None:
        self.contract, self.spec, self._exchange, self._deadlines = contract, spec, exchange, deadlines
        self._check_certificate, self._certificates = check_certificate, certificates
        self._names = [s.name for s in contract.sites]
        s = contract.secagg
        self._encoding = Encoding(bits=s.bits, range=s.range, cohort=len(self._names))

    def attempt(self, round_no: int, attempt: int, adapter: Tensors) -> Mean:
        """Raises RoundVoid with the code of the first thing that went wrong, and the sites that it is about."""
        offer = tr.offer(self.contract, round_no=round_no, attempt=attempt, dim=self.spec.dim,
                         adapter=adapter_digest(adapter))
        session = self._session(offer)
        note = Note(dump(offer), {"adapter": self.spec.pack(adapter)})
        self._stage("update", dict.fromkeys(self._names, note),
                    lambda u, n: session.take_m1(u, n.body), self._deadlines.training_s)
        m2 = Note(self._own(session.m2))
        self._stage("shares", dict.fromkeys(self._names, m2), lambda u, n: session.take_m3(u, n.body))
        m4 = self._own(session.m4)
        self._stage("masked", {name: Note(m4[u]) for u, name in enumerate(self._names)},
                    lambda u, n: session.take_m5(u, n.body, _masked(n)))
        statements: dict[str, bytes] = {}

        def take_m9(u: int, note: Note) -> None:
            got, name = validate(stages.Unmasked, parse(note.body)), self._names[u]
            said = statement(RoundSite, got.statement.encode(), self._certificates[name])
            m = self.contract.mechanism(name, offer.round)
            if (said.site, said.run, said.contract, said.round, said.attempt, said.adapter_in, said.transcript,
                    said.masked, float(said.q), float(said.clip), float(said.sigma), said.steps, said.n_decl) != (
                    name, offer.run, offer.contract, offer.round, offer.attempt, offer.adapter,
                    session.transcript.hex(), session.y_hash(u), m.q, m.clip, m.sigma, m.steps, m.n_decl):
                raise CheckFailed("round.statement", "A site's statement is about something else than this attempt.",
                                  "The round is void; that site's software differs.")
            session.take_m9(u, got.m9.encode())
            statements[name] = got.statement.encode()

        m6 = Note(self._own(session.m6))
        self._stage("unmask", dict.fromkeys(self._names, m6), take_m9)
        total = self._own(session.unmask)
        delta = self._encoding.decode_mean(total, [s.weight for s in self.contract.sites])
        return Mean(attempt, delta, session.transcript.hex(), statements)

    def _session(self, offer: tr.Offer) -> CoordinatorSession | PlainCoordinator:
        if self.contract.secagg.enabled:
            return CoordinatorSession(offer, self._check_certificate)
        return PlainCoordinator(offer)

    def _stage(self, stage: str, notes: Mapping[str, Note], take: Callable[[int, Note], None],
               deadline_s: float | None = None) -> None:
        """Ask every site, check each answer as it comes; void if one is missing, refused or wrong."""
        bad: dict[str, str] = {}

        def on_answer(name: str, answer: Answer) -> None:
            if answer.note is None:
                bad[name] = answer.code or "site.malformed"
                return
            try:
                take(self._names.index(name), answer.note)
            except ConsiloError as e:
                bad[name] = e.code
            except Exception:  # noqa: BLE001 - whatever a site sends voids its attempt, and no more
                bad[name] = MALFORMED

        answers = self._exchange.ask(stage, notes, deadline_s=deadline_s or self._deadlines.stage_s,
                                     on_answer=on_answer)
        for name, answer in answers.items():
            if answer.note is None and name not in bad:
                bad[name] = answer.code or "site.unreachable"
        if bad:
            raise void(bad)

    def _own(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except ConsiloError as e:
            raise void({"": e.code}) from e


def void(bad: Mapping[str, str]) -> RoundVoid:
    """The code is that of the first site in order; all are named in the cause."""
    first = bad[min(bad)]
    error = RoundVoid(first, "; ".join(f"{name or 'coordinator'}: {code}" for name, code in sorted(bad.items())) + ".",
                      "Each site's own log says why; a new attempt needs a fresh update and a fresh charge.")
    error.sites = tuple(sorted(name for name in bad if name))
    return error


P = TypeVar("P", bound=Predicate)


def statement(model: type[P], envelope: bytes, certificate: Certificate) -> P:
    """What a site says, once signature, predicate type and form are right. Raises CheckFailed, UsageError."""
    said = open_envelope(envelope, {fingerprint(certificate): certificate})
    if said.predicate_type != next(k.predicate_type for k in KINDS.values() if k.model is model):
        raise CheckFailed("round.statement", "A statement is of another type than asked for.", "Ask that site.")
    return validate(model, said.predicate)


def _masked(note: Note) -> NDArray[np.uint32]:
    y = note.arrays.get("y")
    return y.view(np.uint32) if y is not None and y.dtype == np.uint32 else np.zeros(0, np.uint32)
