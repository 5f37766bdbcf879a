"""The report's facts about the run itself: contract, approvals, rounds, incidents, log, evaluations, release.

Every function takes verified `Facts` and gives JSON values; none of them knows an epsilon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from privacy.contract import Contract
from privacy.predicates import BEFORE_SUM, Acceptance, ContractSignature, Evaluation, Refusal, Release, Round, RoundSite
from privacy.transparency import least_witnesses
from privacy.verify_trust import Facts


def contract(facts: Facts, agreed: Contract) -> dict[str, Any]:
    """code: the version that the contract names; code_digest: what every site states to have installed."""
    engineer = next(facts.peers[e.who] for e in facts.events if isinstance(e.predicate, ContractSignature))
    return {"digest": agreed.digest, "purpose": agreed.purpose, "expires": agreed.expires,
            "signed_by": {"name": engineer.name, "organisation": engineer.organisation},
            "sign_off": [s.model_dump() for s in agreed.sign_off], "metrics": list(agreed.metrics),
            "code": agreed.code_version, "code_digest": agreed.code, "data": agreed.data.name,
            "fields": list(agreed.data.fields), "labels": len(agreed.data.labels), "rule": agreed.rule.name,
            "optimizer": agreed.rule.optimizer, "model": agreed.model.weights, "sites": len(agreed.sites),
            "threshold": agreed.secagg.threshold, "survivors": agreed.secagg.survivors,
            "hiding_set": agreed.secagg.survivors - 1, "suite": agreed.secagg.suite}


def approvals(facts: Facts) -> list[dict[str, str]]:
    return [{"organisation": facts.peers[a.site].organisation,
             **a.model_dump(include={"site", "approved_by", "approved", "approver", "policy", "code"})}
            for a in facts.said(Acceptance)]


def rounds(facts: Facts, agreed: Contract) -> dict[str, Any]:
    attempts = facts.said(Round)
    sums = [len(r.sites) for r in attempts if r.outcome == "done"]
    full = sum(n == len(agreed.sites) for n in sums)
    return {"planned": agreed.privacy.rounds, "retries": agreed.privacy.retries, "done": len(sums),
            "void": len(attempts) - len(sums), "full": full, "partial": len(sums) - full}


def log(facts: Facts, agreed: Contract) -> dict[str, Any]:
    """The transparency log. all_rounds: whether enough sites signed the last head, which covers all; else rule 8 of the
    verifier says that at most the last round lies under no such head."""
    names, size = [s.name for s in agreed.sites], max(facts.heads)
    least = least_witnesses(len(names))
    return {"operator": facts.heads[size].log, "entries": size, "root": facts.heads[size].root, "heads": len(facts.heads),
            "witnesses": sorted(facts.witnesses), "silent": sorted(set(names) - facts.witnesses), "least": least,
            "all_rounds": len(facts.witnesses) >= least}


def evaluations(facts: Facts) -> list[dict[str, Any]]:
    """The public metric after each measured round, as the coordinator states it."""
    found = [e.model_dump(exclude={"run", "contract"}) for e in facts.said(Evaluation)]
    return sorted(found, key=lambda e: int(e["round"]))


def released(facts: Facts) -> list[dict[str, Any]]:
    return [r.model_dump(exclude={"run", "contract"}) for r in facts.said(Release)]


def incidents(facts: Facts, agreed: Contract) -> list[dict[str, Any]]:
    """Void attempts, who dropped out where, charges without any statement; then, of no round in particular, refusals and
    sites whose ledger never came."""
    found: list[dict[str, Any]] = []

    def add(kind: str, at: tuple[int, int], sites: Sequence[str], *, stage: str = "", reason: str = "") -> None:
        round_, attempt = at
        found.append({"kind": kind, "round": round_, "attempt": attempt, "stage": stage, "reason": reason,
                      "sites": list(sites)})

    for r in facts.said(Round):
        at, void = (r.round, r.attempt), r.outcome == "void"
        if void:
            add("void", at, [], reason=r.reason)
        for stage, code in dict.fromkeys((d.stage, d.code) for d in r.dropped):
            kind = "dropped" if void else "missing" if stage in BEFORE_SUM else "silent"
            add(kind, at, sorted(d.site for d in r.dropped if (d.stage, d.code) == (stage, code)), stage=stage, reason=code)
    signed = {(s.site, s.round, s.attempt) for s in facts.said(RoundSite)}
    unsigned: dict[tuple[int, int], list[str]] = {}
    refused: dict[str, set[str]] = {}
    for site, ledger in facts.ledgers.items():
        for charge in ledger.reserves:
            if charge.run == agreed.run and (site, charge.round, charge.attempt) not in signed:
                unsigned.setdefault((charge.round, charge.attempt), []).append(site)
        for refusal in ledger.refusals:
            if refusal.run == agreed.run:
                refused.setdefault(refusal.code, set()).add(site)
    for at, sites in unsigned.items():
        add("unsigned", at, sites)
    for said in facts.said(Refusal):
        refused.setdefault(said.code, set()).add(said.site)
    for code in sorted(refused):
        add("refused", (0, 0), sorted(refused[code]), reason=code)
    if facts.unaccounted:
        add("unaccounted", (0, 0), facts.unaccounted)
    return sorted(found, key=lambda i: (i["round"], i["attempt"]))
