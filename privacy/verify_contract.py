"""Verification, rule 5: what was agreed on, which engineer signed it, and who approved it at each site."""

from __future__ import annotations

from datetime import datetime

from privacy.contract import Contract, SiteTerms, load_contract
from privacy.identity import Role
from privacy.predicates import Acceptance, ContractSignature
from privacy.secagg import transcript as tr
from privacy.verify_trust import Facts, Findings

NON_PRIVATE = "NON-PRIVATE: the contract has trust=none, so no epsilon exists for this run"
VISIBLE = "INDIVIDUAL UPDATES VISIBLE: secure aggregation was off"


def contract(facts: Facts, found: Findings) -> str:
    data = facts.raw.files.get("contract.json", b"")
    agreed = load_contract(data)
    for site in agreed.sites:
        agreed.plans(site.name)  # every phase is a mechanism that can be
    if agreed.secagg.enabled:  # else no sum hides a site, even from a coordinator that colludes with but one other
        tr.check_cohort(len(agreed.sites), agreed.secagg.threshold, agreed.secagg.survivors, n_c=1)
    if found.expect(agreed.to_bytes() == data, "the contract is not in canonical form"):
        facts.contract = agreed
    digest = agreed.digest
    for event in facts.events:
        found.expect(event.predicate.contract == digest, f"{event.path} is bound to another contract")
        found.expect(event.predicate.run == agreed.run, f"{event.path} belongs to another run")
    signers = {p.name: p.fingerprint for p in facts.peers.values() if p.role is Role.SITE}
    found.expect(signers == {s.name: s.signer for s in agreed.sites},
                 "the sites and their certificates are not those of the contract")
    engineer = _signed(facts, agreed, found)
    accepted = {a.site: a for a in facts.said(Acceptance)}
    found.expect(len(accepted) == len(facts.said(Acceptance)), "a site accepted twice")
    for site in agreed.sites:
        if found.expect(site.name in accepted, f"{site.name} did not accept the contract"):
            _accepted(agreed, site, accepted[site.name], found)
    notes = [NON_PRIVATE] * (agreed.privacy.trust == "none") + [VISIBLE] * (not agreed.secagg.enabled)
    return "; ".join([f"signed by the engineer {engineer}, accepted by all {len(agreed.sites)} sites before it expired, "
                      "and bound into every statement", *notes])


def _signed(facts: Facts, agreed: Contract, found: Findings) -> str:
    """The name of the one engineer who signed; that the statement is on this contract, its caller has checked."""
    signed = [(e.who, e.predicate) for e in facts.events if isinstance(e.predicate, ContractSignature)]
    if not found.expect(bool(signed), "no engineer of this consortium signed the contract: nobody answers for its purpose"):
        return ""
    found.expect(len(signed) == 1, "the contract is signed more than once: it is open who answers for its purpose")
    for _, said in signed:
        found.expect((said.purpose, said.expires) == (agreed.purpose, agreed.expires),
                     "the engineer signed another purpose or expiry than the contract's")
    return signed[0][0]


def _accepted(agreed: Contract, site: SiteTerms, a: Acceptance, found: Findings) -> None:
    found.expect(a.trust == agreed.privacy.trust and float(a.delta) == site.delta,
                 f"{site.name} accepted another kind of privacy, or another delta, than the contract's")
    found.expect(bool(a.cap) == bool(a.lineage) == (a.trust != "none"),
                 f"{site.name} names a cap or a lineage without a ledger, or none with one")
    found.expect(a.code == agreed.code, f"{site.name} has other code installed than the contract names")
    found.expect(not agreed.expired(datetime.fromisoformat(a.approved)),
                 f"{site.name} approved the contract when it had expired, so the approval doesn't hold")
