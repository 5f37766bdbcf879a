"""The round as a site sees it, from top to bottom. The coordinator's side is fl_server/round.py.

accept -> [update -> shares -> masked -> vote -> unmask -> witness] for each attempt -> closing. Under a rule of two
passes a second sum follows the first: again -> shares -> masked -> vote -> unmask. A handler gets a body and vectors and
returns the same; it refuses with a `SiteCode` and nothing else. A byte-identical repetition of a stage's message gets the
stored reply; nothing is ever computed twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fl_client.app import Handler, StageRefused, Vector
from fl_client.exit import Charge, DpReleased, Outgoing, System
from fl_client.journal import SiteJournal
from fl_client.policy import SitePolicy
from fl_client.replies import Replies
from fl_client.sending import Sending
from fl_client.statements import SiteStatements
from fl_client.training import Trainer
from fl_client.witness import Witness
from privacy import stages
from privacy.canonical import parse
from privacy.contract import Contract, Terms, validate
from privacy.errors import Refused, SiteCode, UsageError
from privacy.identity import Signer
from privacy.ledger import Ledger
from privacy.ledger_records import REFUSALS
from privacy.secagg import transcript as tr
from privacy.secagg.messages import Ring
from privacy.secagg.peers import CheckCertificate
from privacy.secagg.plain import PlainSite
from privacy.secagg.site import SiteSession
from privacy.signing import Approval
from strategies.adapter import Tensors, adapter_digest

B = TypeVar("B", bound=Terms)
A = TypeVar("A", stages.Ask, stages.Checkpoint)
Update = NDArray[np.float32]
NOTHING: Ring = np.zeros(0, np.uint32)
SESSION_S = 3600.0  # from M1 on


class SiteRound:
    """All that one site does for one accepted contract. ledger: None exactly when trust is none."""

    def __init__(self, contract: Contract, site: str, *, trainer: Trainer, policy: SitePolicy, signer: Signer,
                 check_certificate: CheckCertificate, journal: SiteJournal, ledger: Ledger | None,
                 approval: Approval, witness: Witness) -> None:
        self.contract, self.site, self._trainer, self._policy = contract, site, trainer, policy
        self._signer, self._check_certificate = signer, check_certificate
        self._journal, self._ledger, self._approval, self._witness = journal, ledger, approval, witness
        self._sending = Sending(contract, site, trainer.spec)
        self._session: SiteSession | PlainSite | None = None
        self._summed: SiteSession | PlainSite | None = None  # the first sum, where a second one follows
        self._encoded: Ring = NOTHING
        self._new: Tensors = {}  # after training, until it is encoded for the last time
        self._begun = time.monotonic()
        self._replies = Replies(self._drop_round, self._record)
        self._statements = SiteStatements(contract, site, signer, ledger, journal.stated)
        if contract.privacy.trust != "none" and ledger is None:
            raise Refused("ledger.missing", "A private contract needs a ledger.", "Open the site's ledger first.")

    def handlers(self) -> dict[str, Handler]:
        """By message type, for `build_app`."""
        work = {"query.accept": self._accept, "train.update": self._update, "train.again": self._again,
                "train.shares": self._shares, "train.masked": self._masked, "train.vote": self._vote,
                "train.unmask": self._unmask, "query.witness": self._cosign, "query.closing": self._closing}
        return {name: self._replies.once(name, handler) for name, handler in work.items()}

    def _accept(self, body: bytes, arrays: Mapping[str, Vector]) -> Outgoing:
        self._asked(_load(stages.Ask, body))
        said = self._statements.acceptance(self._policy, self._approval)
        return Outgoing(System(stages.dump(stages.Acceptance(statement=said))))

    def _update(self, body: bytes, arrays: Mapping[str, Vector]) -> Outgoing:
        """M0 and the adapter in, M1 out; in between the charge, the training and the encoding."""
        got = _load(tr.Offer, body)
        self._witness.require_trust()
        round_ = self._sending.begin(got.round, _only("adapter", arrays))
        self._compare(got, self._sending.offer(round_, got.attempt))
        if got.slot <= self._journal.last(got.run):
            raise StageRefused(SiteCode.STALE_ROUND)
        self._journal.require_usable()
        if self._attempts() >= self.contract.privacy.rounds + self.contract.privacy.retries:
            raise StageRefused(SiteCode.BUDGET)
        if self._ledger is None and self._journal.spent_from(got.adapter):
            raise StageRefused(SiteCode.BUDGET)  # without noise, two sums of one update would give it away
        self._drop_round()
        session = self._open(got)
        change, self._charge = self._charged(got, lambda: self._trainer.train(round_.old, got.round))
        self._round, self._new = round_, self._sending.trained(round_, change)
        return self._begin(got, session, {})

    def _again(self, body: bytes, arrays: Mapping[str, Vector]) -> Outgoing:
        """M0 of the second sum and what came of the first in, M1 out: the same update of the same sites, nothing new."""
        got, first = _load(tr.Offer, body), self._summed
        if first is None or (got.round, got.attempt) != (first.offer.round, first.offer.attempt):
            raise StageRefused(SiteCode.STALE_ROUND)
        shared = self._sending.shared(_only("shared", arrays))
        second = tr.Second(first.sites, first.transcript.hex(), adapter_digest(shared))
        self._compare(got, self._sending.offer(self._round, got.attempt, second))
        self._summed = None
        self._replies.forget("train.")
        return self._begin(got, self._open(got), shared)

    def _begin(self, offer: tr.Offer, session: SiteSession | PlainSite, shared: Tensors) -> Outgoing:
        """M1. From here on the site is in that sum, or the sum is void."""
        m1, self._begun = session.m1(), time.monotonic()
        encoded = self._sending.encode(offer, self._round, self._new, shared)
        self._offer, self._session, self._encoded = offer, session, encoded
        self._new = self._new if offer.pass_no < self._sending.passes else {}
        return Outgoing(System(m1))

    def _shares(self, body: bytes, arrays: Mapping[str, Vector]) -> Outgoing:
        return Outgoing(System(self._live().m3(body)))

    def _masked(self, body: bytes, arrays: Mapping[str, Vector]) -> Outgoing:
        """M5 with the statement: from here on the update counts as released, whatever becomes of the attempt."""
        session, encoded = self._live(), self._encoded
        self._encoded = NOTHING  # m5 masks it in place; nobody else may see it before
        m5, y = session.m5(body, encoded)
        said = self._statements.round(self._offer, session.view, session.masked)
        masked = stages.dump(stages.Masked(m5=m5.decode(), statement=said))
        return Outgoing(DpReleased(masked, self._charge), {"y": DpReleased(y, self._charge)})

    def _vote(self, body: bytes, arrays: Mapping[str, Vector]) -> Outgoing:
        return Outgoing(System(self._live().m7(body)))

    def _unmask(self, body: bytes, arrays: Mapping[str, Vector]) -> Outgoing:
        session = self._live()
        m9 = session.m9(body)
        self._session, self._summed = None, session if self._offer.pass_no < self._sending.passes else None
        return Outgoing(System(m9))

    def _cosign(self, body: bytes, arrays: Mapping[str, Vector]) -> Outgoing:
        asked = self._asked(_load(stages.Checkpoint, body))
        return Outgoing(System(stages.dump(self._witness.cosign(asked, self.contract.run, self._ledger))))

    def _closing(self, body: bytes, arrays: Mapping[str, Vector]) -> Outgoing:
        self._asked(_load(stages.Ask, body))
        statement, extract = self._statements.closing()
        return Outgoing(System(stages.dump(stages.Closed(statement=statement, ledger=extract.decode(),
                                                         refusals=tuple(self._statements.refusals.values())))))

    def _charged(self, offer: tr.Offer, train: Callable[[], Update]) -> tuple[Update, Charge]:
        """Reserve durably, then sample and draw noise, then commit. A failure in between stays spent."""
        if self._ledger is None:
            return train(), Charge(self.contract, offer.round, offer.attempt, None)
        mechanism = self.contract.mechanism(self.site, offer.round)
        seq = self._ledger.reserve(mechanism, run=offer.run, contract=offer.contract, round=offer.round,
                                   attempt=offer.attempt, code=self.contract.code_version, approver=self._policy.approver)
        charge = Charge(self.contract, offer.round, offer.attempt, seq)
        delta = train()
        self._ledger.commit(seq, mechanism.steps)
        return delta, charge

    def _compare(self, got: tr.Offer, want: tr.Offer) -> None:
        """The offer must be the one that this site's own contract implies, field by field."""
        if got.base_model != want.base_model:
            raise StageRefused(SiteCode.MODEL)
        if got.adapter != want.adapter:
            raise StageRefused(SiteCode.ADAPTER)
        p = self.contract.privacy
        if got != want or got.round > p.rounds or got.attempt > p.retries or self.contract.expired():
            raise StageRefused(SiteCode.CONTRACT)

    def _open(self, offer: tr.Offer) -> SiteSession | PlainSite:
        index = [m.name for m in offer.cohort].index(self.site)
        if not self.contract.secagg.enabled:
            return PlainSite(offer, index, self._journal)
        return SiteSession(offer, index=index, n_c=self._policy.colluding, signer=self._signer,
                           check_certificate=self._check_certificate, journal=self._journal)

    def _attempts(self) -> int:
        """Attempts of this run so far: what the ledger charged, or without one what the journal began."""
        if self._ledger is None:
            return self._journal.attempts(self.contract.run)
        return sum(r.run == self.contract.run for r in self._ledger.summary().reserves)

    def expire(self) -> None:
        """For the agent to call now and then: an old attempt is dropped with its secrets and stored replies."""
        if time.monotonic() - self._begun > SESSION_S:
            self._drop_round()

    def _drop_round(self) -> None:
        """Forget the attempt: its session, its update and its replies (those to queries stay)."""
        if self._session is not None:
            self._session.expire()
        self._session, self._summed, self._encoded, self._new = None, None, NOTHING, {}
        self._replies.forget("train.")

    def _record(self, code: SiteCode) -> None:
        """A refusal that says something about the coordinator is stated, and goes into the ledger, once each."""
        if code.value in REFUSALS:
            self._statements.refusal(code.value)
        closed = self._ledger is None or any(c.run == self.contract.run for c in self._ledger.summary().closes)
        if self._ledger is not None and not closed and code.value in REFUSALS:
            self._ledger.refuse(code.value, self.contract.run, self.contract.digest, "round")

    def _live(self) -> SiteSession | PlainSite:
        if self._session is None:
            raise StageRefused(SiteCode.STALE_ROUND)
        return self._session

    def _asked(self, asked: A) -> A:
        if asked.contract != self.contract.digest:
            raise StageRefused(SiteCode.CONTRACT)
        return asked


def _only(name: str, arrays: Mapping[str, Vector]) -> Vector:
    if set(arrays) != {name}:
        raise StageRefused(SiteCode.BAD_MESSAGE)
    return arrays[name]


def _load(model: type[B], body: bytes) -> B:
    try:
        return validate(model, parse(body))
    except UsageError as e:
        raise StageRefused(SiteCode.BAD_MESSAGE) from e
