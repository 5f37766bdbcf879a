"""The round as the coordinator drives it, from top to bottom. The site's side is fl_client/round.py.

One attempt: offer and adapter out, keys in; key list out, shares in; inbound shares out, masked vectors in and added as
they arrive; survivors out, votes in; votes out, unmasking shares in; the sum decoded. A site that falls out is left out;
when fewer are left than the contract's least number, the attempt is void as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate
from numpy.typing import NDArray

from fl_server.exchange import MALFORMED, UNREACHABLE, Answer, Exchange, Note
from privacy import stages
from privacy.canonical import parse
from privacy.contract import Contract, validate
from privacy.errors import Aborted, CheckFailed, ConsiloError, RoundVoid
from privacy.identity import fingerprint
from privacy.predicates import KINDS, Predicate, RoundSite
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.messages import M5, Ring, dump, load
from privacy.secagg.peers import CheckCertificate
from privacy.secagg.plain import PlainCoordinator
from privacy.statements import open_envelope
from strategies.adapter import AdapterSpec, Tensors, adapter_digest

T = TypeVar("T")


@dataclass(frozen=True)
class Lost:
    """A site that didn't answer a stage as it should: by a `SiteCode`, silence, or the code of what was wrong."""

    site: str
    stage: str
    code: str


@dataclass(frozen=True)
class Mean:
    """Result of one attempt: the weighted mean change of `sites`, float32 (dim,), its transcript and votes (T2, T3,
    signatures on T3 by site; empty in plain mode)."""

    attempt: int
    delta: NDArray[np.float32]
    sites: tuple[str, ...]
    view: str
    transcript: str
    votes: Mapping[str, bytes]


@dataclass(frozen=True)
class Deadlines:
    training_s: float
    stage_s: float


class RoundDriver:
    """Runs attempts for one contract. certificates: each site's Ed25519 certificate, accepted before.

    Of the attempt that ran last, `lost` holds the sites that fell out and `statements` what sites signed with their
    masked vectors, void or not: they were charged.
    """

    def __init__(self, contract: Contract, spec: AdapterSpec, exchange: Exchange, *, deadlines: Deadlines,
                 check_certificate: CheckCertificate, certificates: Mapping[str, Certificate]) -> None:
        self.contract, self.spec, self._exchange, self._deadlines = contract, spec, exchange, deadlines
        self._check_certificate, self._certificates = check_certificate, certificates
        self._names = [s.name for s in contract.sites]
        self.lost: list[Lost] = []
        self.statements: dict[str, bytes] = {}

    def attempt(self, round_no: int, attempt: int, adapter: Tensors) -> Mean:
        """Goes on without the sites that fall out while enough are left. Raises RoundVoid when too few are."""
        self.lost, self.statements = [], {}
        offer = tr.offer(self.contract, round_no=round_no, attempt=attempt, tensors=self.spec.sizes,
                         adapter=adapter_digest(adapter))
        session = self._session(offer)
        m0 = Note(dump(offer), {"adapter": self.spec.pack(adapter)})
        there = self._stage("update", dict.fromkeys(self._online(), m0), lambda u, n: session.take_m1(u, n.body),
                            deadline_s=self._deadlines.training_s)
        m2 = Note(self._own(session.m2))
        there = self._stage("shares", dict.fromkeys(there, m2), lambda u, n: session.take_m3(u, n.body))
        m4 = self._own(session.m4)
        there = self._stage("masked", {name: Note(m4[self._names.index(name)]) for name in there},
                            lambda u, n: self._take_masked(offer, session, u, n))
        m6 = Note(self._own(session.m6))
        voted = self._stage("vote", dict.fromkeys(there, m6), lambda u, n: session.take_m7(u, n.body),
                            quorum=offer.threshold)
        m8 = Note(self._own(session.m8))
        late = [lost.site for lost in self.lost if (lost.stage, lost.code) == ("vote", UNREACHABLE)]
        self._stage("unmask", dict.fromkeys(voted + late, m8), lambda u, n: session.take_m9(u, n.body),
                    quorum=offer.threshold)
        total = self._own(lambda: self._unmask(session))
        sites = [self.contract.sites[u] for u in session.survivors]
        mean = self._own(lambda: offer.encoding.decode_mean(total, [site.weight for site in sites]))
        return Mean(attempt, mean, tuple(site.name for site in sites), session.view.hex(), session.transcript.hex(),
                    {self._names[u]: vote for u, vote in session.votes.items()})

    def _unmask(self, session: CoordinatorSession | PlainCoordinator) -> Ring:
        try:
            return session.unmask()
        except Aborted as e:
            known = {lost.site for lost in self.lost if lost.stage == "unmask"}
            dealers = [self._names[u] for u in session.suspects]
            self.lost += [Lost(name, "unmask", e.code) for name in dealers if name not in known]
            raise

    def _take_masked(self, offer: tr.Offer, session: CoordinatorSession | PlainCoordinator, u: int, note: Note) -> None:
        """The statement first: a vector without one isn't added."""
        got, name = validate(stages.Masked, parse(note.body)), self._names[u]
        m, m5, view = self.contract.mechanism(name, offer.round), load(M5, got.m5.encode()), session.view.hex()
        said = statement(RoundSite, got.statement.encode(), self._certificates[name],
                         subject=("view", view) if view else ("masked", m5.y_hash))
        private = self.contract.privacy.trust != "none"
        if (said.site, said.run, said.contract, said.round, said.attempt, said.adapter_in, said.view, said.masked,
                float(said.q), float(said.clip), float(said.sigma), said.steps, said.n_decl,
                bool(said.epsilon), bool(said.ledger_head)) != (
                name, offer.run, offer.contract, offer.round, offer.attempt, offer.adapter, view, m5.y_hash,
                m.q, m.clip, m.sigma, m.steps, m.n_decl, private, private):
            raise CheckFailed("round.statement", "A site's statement is about something else than this attempt.",
                              "That site is left out; its software differs.")
        session.take_m5(u, got.m5.encode(), _vector(note, offer.encoding.dtype))
        self.statements[name] = got.statement.encode()

    def _session(self, offer: tr.Offer) -> CoordinatorSession | PlainCoordinator:
        if self.contract.secagg.enabled:
            return CoordinatorSession(offer, self._check_certificate)
        return PlainCoordinator(offer)

    def _online(self) -> list[str]:
        online = self._exchange.wait_online(self._names, self._deadlines.stage_s, self.contract.secagg.survivors)
        self.lost += [Lost(name, "update", UNREACHABLE) for name in self._names if name not in online]
        return [name for name in self._names if name in online]

    def _stage(self, stage: str, notes: Mapping[str, Note], take: Callable[[int, Note], None], *,
               deadline_s: float | None = None, quorum: int | None = None) -> list[str]:
        """Ask, check each answer as it comes; returns who goes on. The others are `lost`."""
        bad: dict[str, str] = {}

        def on_answer(name: str, answer: Answer) -> bool:
            if answer.note is None:
                return False
            try:
                self._check_certificate(self._certificates[name].public_bytes(Encoding.PEM))  # revoked meanwhile?
                take(self._names.index(name), answer.note)
            except ConsiloError as e:
                bad[name] = e.code
            except Exception:  # noqa: BLE001 - whatever a site sends puts it out, and no more
                bad[name] = MALFORMED
            return name not in bad

        answers = self._own(lambda: self._exchange.ask(stage, notes, on_answer=on_answer, quorum=quorum,
                                                       deadline_s=deadline_s or self._deadlines.stage_s))
        bad |= {name: answer.code or MALFORMED for name, answer in answers.items() if answer.note is None}
        self.lost += [Lost(name, stage, bad[name]) for name in notes if name in bad]
        return [name for name in notes if name not in bad]

    def _own(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except ConsiloError as e:
            raise void(e.code, {lost.site: lost.code for lost in self.lost}) from e


def void(code: str, bad: Mapping[str, str]) -> RoundVoid:
    """`bad`: what is wrong, by site; all are named in the cause."""
    error = RoundVoid(code, "; ".join(f"{name}: {why}" for name, why in sorted(bad.items())) + ".",
                      "Each site's own log says why; a new attempt needs a fresh update and a fresh charge.")
    error.sites = tuple(sorted(bad))
    return error


P = TypeVar("P", bound=Predicate)


def statement(model: type[P], envelope: bytes, certificate: Certificate, *, subject: tuple[str, str] | None = None) -> P:
    """What a site says, once signature, predicate type, form and (if given) subject are right. Raises CheckFailed,
    UsageError."""
    said = open_envelope(envelope, {fingerprint(certificate): certificate})
    kind = next(k.predicate_type for k in KINDS.values() if k.model is model)
    if said.predicate_type != kind or (subject is not None and said.subject != (subject,)):
        raise CheckFailed("round.statement", "A statement is of another type or subject than asked for.", "Ask that site.")
    return validate(model, said.predicate)


def _vector(note: Note, dtype: np.dtype[np.generic]) -> Ring:
    """The masked vector, in place of one of another type an empty one, which the session refuses."""
    y = note.arrays.get("y")
    return y if y is not None and y.dtype == dtype else np.zeros(0, dtype)  # type: ignore[return-value]
