"""The round as the coordinator drives it, from top to bottom. The site's side is fl_client/round.py.

One attempt: offer and adapter out, keys in; key list out, shares in; inbound shares out, masked vectors in and added as
they arrive; survivors out, votes in; votes out, unmasking shares in; the sum decoded. A site that falls out is left out;
when fewer are left than the contract's least number, the attempt is void as a whole. A rule of two passes has a second
sum, over exactly the sites of the first: if one of them falls out, the attempt is void.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate
from numpy.typing import NDArray

from fl_server.attempt import Deadlines, Done, Lost, Summed, check_round_site, void
from fl_server.exchange import MALFORMED, UNREACHABLE, Answer, Exchange, Note, Notes, Vector
from privacy import stages
from privacy.canonical import parse
from privacy.contract import Contract, validate
from privacy.errors import ConsiloError, RoundVoid
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.messages import M5, Ring, dump, load
from privacy.secagg.peers import CheckCertificate
from privacy.secagg.plain import PlainCoordinator
from strategies.adapter import AdapterSpec, Tensors, adapter_digest
from strategies.base import Named, Part, PlaintextRule, Round, flatten, segments, setup, unflatten
from strategies.rules import rule

T = TypeVar("T")
Session = CoordinatorSession | PlainCoordinator


class RoundDriver:
    """Runs attempts for one contract. certificates: each site's Ed25519 certificate, accepted before.

    Of the attempt that ran last, `lost` holds the sites that fell out and `statements` what sites signed with their
    masked vectors (name and envelope), void or not: they were charged. Raises UsageError as `rule` and `setup` do.
    """

    def __init__(self, contract: Contract, spec: AdapterSpec, exchange: Exchange, *, deadlines: Deadlines,
                 check_certificate: CheckCertificate, certificates: Mapping[str, Certificate]) -> None:
        self.contract, self.spec, self._exchange, self._deadlines = contract, spec, exchange, deadlines
        self._check_certificate, self._certificates = check_certificate, certificates
        self._rule = rule(contract.rule.name, secure=contract.secagg.enabled)
        self.setup = setup(self._rule, contract, spec)
        self._names = [s.name for s in contract.sites]
        self._weights = {s.name: s.weight for s in contract.sites}
        self.lost: list[Lost] = []
        self.statements: list[tuple[str, bytes]] = []

    def attempt(self, round_no: int, attempt: int, adapter: Tensors) -> Done:
        """Goes on without the sites that fall out while enough are left. Raises RoundVoid when too few are."""
        self.lost, self.statements = [], []
        round_, digest = Round(self.setup, round_no, adapter), adapter_digest(adapter)
        plan, passes = self._rule.plan(round_, 1), self._rule.passes(self.setup)
        offer = tr.offer(self.contract, round_no=round_no, attempt=attempt, ranges=segments(plan), adapter=digest)
        session = self._sum(offer, "update", {"adapter": self.spec.pack(adapter)}, self._online(), last=passes == 1)
        sums, sites = [self._summed(session)], self._sites(session)
        if isinstance(self._rule, PlaintextRule) and isinstance(session, PlainCoordinator):
            change = self._combined(self._rule, session, round_, plan)
        else:
            means = unflatten(self._mean(session), plan)
            if passes == 2:
                shared, plan = self._rule.between(round_, means), self._rule.plan(round_, 2)
                second = tr.Second(sites, sums[0].transcript, adapter_digest(shared))
                offer = tr.offer(self.contract, round_no=round_no, attempt=attempt, ranges=segments(plan), adapter=digest,
                                 second=second)
                vector = flatten(shared, self._rule.shares(self.setup))
                session = self._sum(offer, "again", {"shared": vector}, sites, last=True)
                sums.append(self._summed(session))
                means |= unflatten(self._mean(session), plan)
            change = self._rule.change(round_, means)
        return Done(attempt, change, sites, tuple(sums))

    def _sum(self, offer: tr.Offer, stage: str, given: Mapping[str, Vector], sites: Sequence[str], *,
             last: bool) -> Session:
        """One secure sum. Where another one follows, every site is waited for to the end: it must take part in both."""
        session: Session = (CoordinatorSession(offer, self._check_certificate) if self.contract.secagg.enabled
                            else PlainCoordinator(offer, keep=not self._rule.linear))
        quorum = offer.threshold if last else None
        ask = partial(self._stage, offer)
        there = ask(stage, dict.fromkeys(sites, Note(dump(offer), given)), lambda u, n: session.take_m1(u, n.body),
                    deadline_s=self._deadlines.training_s)
        m2 = Note(self._own(session.m2))
        there = ask("shares", dict.fromkeys(there, m2), lambda u, n: session.take_m3(u, n.body))
        m4 = self._own(session.m4)
        there = ask("masked", Notes({m.name: m.index for m in offer.cohort if m.name in there}, m4),
                    lambda u, n: self._take_masked(offer, session, u, n))
        m6 = Note(self._own(session.m6))
        voted = ask("vote", dict.fromkeys(there, m6), lambda u, n: session.take_m7(u, n.body), quorum=quorum)
        m8 = Note(self._own(session.m8))
        late = [x.site for x in self.lost if (x.pass_no, x.stage, x.code) == (offer.pass_no, "vote", UNREACHABLE)]
        ask("unmask", dict.fromkeys(voted + late, m8), lambda u, n: session.take_m9(u, n.body), quorum=quorum)
        return session

    def _mean(self, session: Session) -> NDArray[np.float32]:
        """The weighted mean, float32 (dim,), of the survivors' vectors."""
        try:
            total = self._own(session.unmask)
        except RoundVoid as e:
            pass_no, known = session.offer.pass_no, {(x.site, x.pass_no) for x in self.lost if x.stage == "unmask"}
            dealers = [session.offer.cohort[u].name for u in session.suspects]
            self.lost += [Lost(name, pass_no, "unmask", e.code) for name in dealers if (name, pass_no) not in known]
            raise
        weights = [self._weights[name] for name in self._sites(session)]
        return self._own(lambda: session.offer.encoding.decode_mean(total, weights))

    def _combined(self, by: PlaintextRule, session: PlainCoordinator, round_: Round, plan: Sequence[Part]) -> Named:
        """What a rule that isn't linear makes of the single updates; every site's policy reveals them."""
        encoding, sites = session.offer.encoding, self._sites(session)
        weights = [self._weights[name] for name in sites]
        sent = [unflatten(self._own(lambda: encoding.decode_mean(session.vectors[u], [w])), plan)  # noqa: B023
                for u, w in zip(session.survivors, weights, strict=True)]
        return self._own(lambda: by.combine(round_, sent, weights))

    def _sites(self, session: Session) -> tuple[str, ...]:
        return tuple(session.offer.cohort[u].name for u in session.survivors)

    def _summed(self, session: Session) -> Summed:
        votes = {session.offer.cohort[u].name: vote for u, vote in session.votes.items()}
        return Summed(session.view.hex(), session.transcript.hex(), votes)

    def _take_masked(self, offer: tr.Offer, session: Session, u: int, note: Note) -> None:
        """The statement first: a vector without one isn't added."""
        got, name = validate(stages.Masked, parse(note.body)), offer.cohort[u].name
        masked = load(M5, got.m5.encode()).y_hash
        check_round_site(self.contract, name, offer, session.view.hex(), masked, got.statement.encode(),
                         self._certificates[name])
        session.take_m5(u, got.m5.encode(), _vector(note, offer.encoding.dtype))
        self.statements.append((name, got.statement.encode()))

    def _online(self) -> list[str]:
        online = self._exchange.wait_online(self._names, self._deadlines.stage_s, self.contract.secagg.survivors)
        self.lost += [Lost(name, 1, "update", UNREACHABLE) for name in self._names if name not in online]
        return [name for name in self._names if name in online]

    def _stage(self, offer: tr.Offer, stage: str, notes: Mapping[str, Note], take: Callable[[int, Note], None], *,
               deadline_s: float | None = None, quorum: int | None = None) -> list[str]:
        """Ask, check each answer as it comes; returns who goes on. The others are `lost`."""
        bad, index = dict[str, str](), {m.name: m.index for m in offer.cohort}

        def on_answer(name: str, answer: Answer) -> bool:
            if answer.note is None:
                return False
            try:
                self._check_certificate(self._certificates[name].public_bytes(Encoding.PEM))  # revoked meanwhile?
                take(index[name], answer.note)
            except ConsiloError as e:
                bad[name] = e.code
            except Exception:  # noqa: BLE001 - whatever a site sends puts it out, and no more
                bad[name] = MALFORMED
            return name not in bad

        answers = self._own(lambda: self._exchange.ask(stage, notes, on_answer=on_answer, quorum=quorum,
                                                       deadline_s=deadline_s or self._deadlines.stage_s))
        bad |= {name: answer.code or MALFORMED for name, answer in answers.items() if answer.note is None}
        self.lost += [Lost(name, offer.pass_no, stage, bad[name]) for name in notes if name in bad]
        return [name for name in notes if name not in bad]

    def _own(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except ConsiloError as e:
            raise void(e.code, {lost.site: lost.code for lost in self.lost}) from e


def _vector(note: Note, dtype: np.dtype[np.generic]) -> Ring:
    """The masked vector, in place of one of another type an empty one, which the session refuses."""
    y = note.arrays.get("y")
    return y if y is not None and y.dtype == dtype else np.zeros(0, dtype)  # type: ignore[return-value]
