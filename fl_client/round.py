"""The round as a site sees it, from top to bottom. The coordinator's side is fl_server/round.py.

accept -> [update -> shares -> masked -> unmask] for each attempt -> closing. A handler gets a body and vectors and
returns the same; it refuses with a `SiteCode` and nothing else. A byte-identical repetition of a stage's message gets
the stored reply; nothing is ever computed twice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fl_client.journal import SiteJournal
from fl_client.link import Handler, StageRefused, Vector
from fl_client.policy import SitePolicy
from fl_client.training import Trainer
from privacy import stages
from privacy.canonical import decimal, labelled_hash, parse
from privacy.contract import Contract, Terms, validate
from privacy.errors import Aborted, ConsiloError, Refused, SiteCode, UsageError
from privacy.identity import Signer
from privacy.ledger import Ledger, check_extract
from privacy.secagg import transcript as tr
from privacy.secagg.encoding import Encoding
from privacy.secagg.peers import CheckCertificate
from privacy.secagg.plain import PlainSite
from privacy.secagg.site import SiteSession
from privacy.statements import make
from strategies.adapter import adapter_digest, initial

log = logging.getLogger("consilo.round")
Reply = tuple[bytes, Mapping[str, Vector]]
B = TypeVar("B", bound=Terms)
Update = NDArray[np.float32]
NOTHING: NDArray[np.uint32] = np.zeros(0, np.uint32)
CODES = {"budget.exhausted": SiteCode.BUDGET, "adapter.tensor": SiteCode.ADAPTER, "json.invalid": SiteCode.BAD_MESSAGE,
         "config.invalid": SiteCode.BAD_MESSAGE, "config.unknown_key": SiteCode.BAD_MESSAGE}


class SiteRound:
    """All that one site does for one accepted contract. ledger: None exactly when trust is none."""

    def __init__(self, contract: Contract, site: str, *, trainer: Trainer, policy: SitePolicy, signer: Signer,
                 check_certificate: CheckCertificate, journal: SiteJournal, ledger: Ledger | None) -> None:
        self.contract, self.site, self._trainer, self._policy = contract, site, trainer, policy
        self._signer, self._check_certificate = signer, check_certificate
        self._journal, self._ledger = journal, ledger
        self._mechanism, self._terms = contract.mechanism(site), contract.site(site)
        self._index = [s.name for s in contract.sites].index(site)
        s = contract.secagg
        self._encoding = Encoding(bits=s.bits, range=s.range, cohort=len(contract.sites))
        start = initial(trainer.spec, contract.lora.seed)
        self._frozen = {name: value for name, value in start.items() if name not in trainer.spec.trained}
        self._session: SiteSession | PlainSite | None = None
        self._encoded: NDArray[np.uint32] = NOTHING
        self._stored: dict[str, tuple[bytes, Reply]] = {}
        if self._mechanism.private and ledger is None:
            raise Refused("ledger.missing", "A private contract needs a ledger.", "Open the site's ledger first.")

    def handlers(self) -> dict[str, Handler]:
        """By message type, for `build_app`."""
        work = {"query.accept": self._accept, "train.update": self._update, "train.shares": self._shares,
                "train.masked": self._masked, "train.unmask": self._unmask, "query.closing": self._closing}
        return {name: self._once(name, handler) for name, handler in work.items()}

    def _accept(self, body: bytes, arrays: Mapping[str, Vector]) -> Reply:
        self._asked(body)
        lineage = (self._ledger.lineage, decimal(self._ledger.cap)) if self._ledger else ("", "")
        statement = self._state("acceptance", ("contract", self.contract.digest), {
            "lineage": lineage[0], "cap": lineage[1], "delta": decimal(self._terms.delta),
            "trust": self.contract.privacy.trust, "approver": self._policy.approver, "policy": self._policy.digest})
        return stages.dump(stages.Acceptance(statement=statement)), {}

    def _update(self, body: bytes, arrays: Mapping[str, Vector]) -> Reply:
        """M0 and the adapter in, M1 out; in between the charge, the training and the encoding."""
        got = _load(tr.Offer, body)
        if set(arrays) != {"adapter"}:
            raise StageRefused(SiteCode.BAD_MESSAGE)
        adapter = self._trainer.spec.unpack(arrays["adapter"])
        if any((adapter[name] != value).any() for name, value in self._frozen.items()):
            raise StageRefused(SiteCode.ADAPTER)
        self._compare(got, adapter_digest(adapter))
        if (got.round, got.attempt) <= self._journal.last(got.run):
            raise StageRefused(SiteCode.STALE_ROUND)
        if self._attempts() >= self.contract.privacy.rounds + self.contract.privacy.retries:
            raise StageRefused(SiteCode.BUDGET)
        self._drop_round()
        self._offer = got
        delta = self._charged(got, lambda: self._trainer.train(adapter))
        self._encoded = self._encoding.encode(delta, self._terms.weight)
        self._session = self._open(got)
        return self._session.m1(), {}

    def _shares(self, body: bytes, arrays: Mapping[str, Vector]) -> Reply:
        return self._live().m3(body), {}

    def _masked(self, body: bytes, arrays: Mapping[str, Vector]) -> Reply:
        session, encoded = self._live(), self._encoded
        self._encoded = NOTHING  # m5 masks it in place; nobody else may see it before
        reply, y = session.m5(body, encoded)
        return reply, {"y": y}

    def _unmask(self, body: bytes, arrays: Mapping[str, Vector]) -> Reply:
        session = self._live()
        m9, offer, m = session.m9(body), self._offer, self._mechanism
        head, epsilon = (0, ""), ""
        if self._ledger:
            head, epsilon = (self._ledger.head.seq, self._ledger.head.hash), decimal(self._ledger.epsilon())
        statement = self._state("round-site", ("transcript", session.transcript.hex() or session.masked), {
            "round": offer.round, "attempt": offer.attempt, "adapter_in": offer.adapter,
            "transcript": session.transcript.hex(), "masked": session.masked, "q": decimal(m.q),
            "clip": decimal(m.clip), "sigma": decimal(m.sigma), "steps": m.steps, "n_decl": m.n_decl,
            "ledger_seq": head[0], "ledger_head": head[1], "epsilon": epsilon})
        self._session = None
        return stages.dump(stages.Unmasked(m9=m9.decode(), statement=statement)), {}

    def _closing(self, body: bytes, arrays: Mapping[str, Vector]) -> Reply:
        self._asked(body)
        if self._ledger is None:
            return stages.dump(stages.Closed(statement="", ledger="")), {}
        if not any(c.run == self.contract.run for c in self._ledger.summary().closes):
            self._ledger.close_run(self.contract.run)
        extract = self._ledger.extract(self.contract.run)  # ends with the closing record, however often it is asked for
        end = check_extract(extract, self._signer.certificate)
        statement = self._state("closing", ("ledger", hashlib.sha256(extract).hexdigest()), {
            "lineage": end.lineage, "records": end.head.seq + 1, "ledger_seq": end.head.seq,
            "ledger_head": end.head.hash, "epsilon": end.closes[-1].head_epsilon, "delta": decimal(end.delta),
            "cap": decimal(end.cap)})
        return stages.dump(stages.Closed(statement=statement, ledger=extract.decode())), {}

    def _charged(self, offer: tr.Offer, train: Callable[[], Update]) -> Update:
        """Reserve durably, then sample and draw noise, then commit. A failure in between stays spent."""
        if self._ledger is None:
            return train()
        seq = self._ledger.reserve(self._mechanism, run=offer.run, contract=offer.contract, round=offer.round,
                                   attempt=offer.attempt, code=self.contract.code_version, approver=self._policy.approver)
        delta = train()
        self._ledger.commit(seq, self._mechanism.steps)
        return delta

    def _compare(self, got: tr.Offer, adapter: str) -> None:
        """The offer must be the one that this site's own contract implies, field by field."""
        want = tr.offer(self.contract, round_no=got.round, attempt=got.attempt, dim=self._trainer.spec.dim, adapter=adapter)
        if got.base_model != want.base_model:
            raise StageRefused(SiteCode.MODEL)
        if got.adapter != want.adapter:
            raise StageRefused(SiteCode.ADAPTER)
        if got != want or got.round > self.contract.privacy.rounds or got.attempt > self.contract.privacy.retries:
            raise StageRefused(SiteCode.CONTRACT)

    def _open(self, offer: tr.Offer) -> SiteSession | PlainSite:
        if not self.contract.secagg.enabled:
            self._journal.started(offer.run, offer.round, offer.attempt)
            return PlainSite(offer, self._index)
        return SiteSession(offer, index=self._index, n_c=self._policy.colluding, signer=self._signer,
                           check_certificate=self._check_certificate, journal=self._journal)

    def _attempts(self) -> int:
        """Attempts of this run so far: what the ledger charged, or without one what the journal began."""
        if self._ledger is None:
            return self._journal.attempts(self.contract.run)
        return sum(r.run == self.contract.run for r in self._ledger.summary().reserves)

    def _drop_round(self) -> None:
        """Forget the attempt: its session, its update and its replies (those to queries stay)."""
        self._session, self._encoded = None, NOTHING
        self._stored = {name: stored for name, stored in self._stored.items() if name.startswith("query.")}

    def _live(self) -> SiteSession | PlainSite:
        if self._session is None:
            raise StageRefused(SiteCode.STALE_ROUND)
        return self._session

    def _asked(self, body: bytes) -> None:
        if _load(stages.Ask, body).contract != self.contract.digest:
            raise StageRefused(SiteCode.CONTRACT)

    def _state(self, kind: str, subject: tuple[str, str], predicate: dict[str, str | int]) -> str:
        common = {"site": self.site, "run": self.contract.run, "contract": self.contract.digest}
        return make(self._signer, f"urn:consilo:{kind}:1", [subject], common | predicate).decode()

    def _once(self, name: str, handler: Handler) -> Handler:
        def run(body: bytes, arrays: dict[str, Vector]) -> Reply:
            parts = [p for array_name in sorted(arrays) for p in (array_name, arrays[array_name].tobytes())]
            key = labelled_hash("consilo stage", name, body, *parts)
            if name in self._stored and self._stored[name][0] == key:
                return self._stored[name][1]
            try:
                reply = handler(body, arrays)
            except ConsiloError as e:
                log.error("%s refused here: %s", name, e)
                if isinstance(e, Aborted):
                    self._drop_round()
                fallback = SiteCode.SECAGG if isinstance(e, Aborted) else SiteCode.FAILED
                raise StageRefused(CODES.get(e.code, fallback)) from e
            self._stored[name] = (key, reply)
            return reply

        return run


def _load(model: type[B], body: bytes) -> B:
    try:
        return validate(model, parse(body))
    except UsageError as e:
        raise StageRefused(SiteCode.BAD_MESSAGE) from e



