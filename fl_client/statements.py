"""What a site signs about itself: acceptance of a contract, each round, the end of the run (docs/evidence-format.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from fl_client.policy import SitePolicy
from privacy.canonical import decimal
from privacy.contract import Contract
from privacy.identity import Signer
from privacy.ledger import Ledger, check_extract
from privacy.predicates import KINDS
from privacy.secagg import transcript as tr
from privacy.signing import Approval
from privacy.statements import make


class SiteStatements:
    """Envelopes of one site under one contract. ledger: None exactly when trust is none. keep: called with kind and
    envelope before it is handed out."""

    def __init__(self, contract: Contract, site: str, signer: Signer, ledger: Ledger | None,
                 keep: Callable[[str, str], None]) -> None:
        self._contract, self._site, self._signer, self._ledger, self._keep = contract, site, signer, ledger, keep
        self.refusals: dict[str, str] = {}  # envelopes, by code

    def acceptance(self, policy: SitePolicy, approval: Approval) -> str:
        """approval: who agreed to this contract under this policy, as `check_approval` found it."""
        lineage = (self._ledger.lineage, decimal(self._ledger.cap)) if self._ledger else ("", "")
        return self._make("acceptance", ("contract", self._contract.digest), {
            "lineage": lineage[0], "cap": lineage[1], "delta": decimal(self._contract.site(self._site).delta),
            "trust": self._contract.privacy.trust, "approver": policy.approver,
            "approved_by": approval.approver, "approved": approval.approved, "policy": policy.digest, "code": approval.code})

    def round(self, offer: tr.Offer, view: bytes, masked: str) -> str:
        """view: T2, or b"" without secure aggregation. masked: hex H(y). It leaves with y, before T3 is known."""
        m, head, epsilon = self._contract.mechanism(self._site, offer.round), (0, ""), ""
        if self._ledger:
            head, epsilon = (self._ledger.head.seq, self._ledger.head.hash), decimal(self._ledger.epsilon())
        subject = ("view", view.hex()) if view else ("masked", masked)
        return self._make("round-site", subject, {
            "lineage": self._ledger.lineage if self._ledger else "", "round": offer.round, "attempt": offer.attempt,
            "pass_no": offer.pass_no, "adapter_in": offer.adapter, "view": view.hex(), "masked": masked,
            "q": decimal(m.q), "clip": decimal(m.clip), "sigma": decimal(m.sigma), "steps": m.steps, "n_decl": m.n_decl,
            "ledger_seq": head[0], "ledger_head": head[1], "epsilon": epsilon})

    def refusal(self, code: str) -> None:
        """State that this site said no to a round; the coordinator gets it when the run is closed."""
        if code not in self.refusals:
            self.refusals[code] = self._make("refusal", ("contract", self._contract.digest), {"code": code})

    def closing(self) -> tuple[str, bytes]:
        """(envelope, ledger extract), both empty without a ledger. The first call closes the run; all say the same."""
        if self._ledger is None:
            return "", b""
        if not any(c.run == self._contract.run for c in self._ledger.summary().closes):
            self._ledger.close_run(self._contract.run)
        extract = self._ledger.extract(self._contract.run)  # ends with the closing record
        end = check_extract(extract, self._signer.certificate)
        return self._make("closing", ("ledger", hashlib.sha256(extract).hexdigest()), {
            "lineage": end.lineage, "records": end.head.seq + 1, "ledger_seq": end.head.seq,
            "ledger_head": end.head.hash, "epsilon": end.closes[-1].head_epsilon, "delta": decimal(end.delta),
            "cap": decimal(end.cap)}), extract

    def _make(self, kind: str, subject: tuple[str, str], predicate: dict[str, str | int]) -> str:
        common = {"site": self._site, "run": self._contract.run, "contract": self._contract.digest}
        envelope = make(self._signer, KINDS[kind].predicate_type, [subject], common | predicate).decode()
        self._keep(kind, envelope)
        return envelope
