"""The report of a run: one HTML file (English and Chinese side by side) and the same facts as JSON.

Guarantees: it is made from facts that `privacy.verify` established, never from unverified files; a bundle that fails
gives a page that says FAILED and shows nothing of its content; with trust=none there is no epsilon on the page. The
same bundle gives the same bytes. Text from the bundle is escaped, and the page asks for no other resource.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import jinja2

from privacy.accountant import Release, decimal_up, delta_at, epsilon
from privacy.canonical import canonical
from privacy.contract import Contract
from privacy.files import FileLayer
from privacy.predicates import BEFORE_SUM, Acceptance, ContractSignature, Round, RoundSite
from privacy.predicates import Release as Released
from privacy.report_plots import MAX_EPSILON, Charge, spending_plot, trade_off, trade_off_plot
from privacy.verify import Verdict, examine
from privacy.verify_trust import Facts

SCHEMA = "consilo.report/1"
FINE, COARSE = 1e-4, 1e-3  # accountant intervals; the coarse one is faster and still an upper bound
MAX_ROUNDS_LEFT = 1000  # the search stops there: "more than"
CURVE_POINTS = 24


def write_report(bundle: Path, out: Path, *, ca: str | None = None) -> Path:
    """Verify a bundle and write report.html and report.json into the folder `out`; returns the path of the page.

    ca: the root's fingerprint from outside the bundle; without it the report says UNANCHORED. Raises UsageError
    `bundle.missing`, `verify.fingerprint`; a bundle that fails verification gives a report that says so."""
    verdict, facts = examine(bundle, ca)
    report, figures = _contents(verdict, facts, bundle)
    out.mkdir(parents=True, exist_ok=True)
    files = FileLayer()
    files.write_atomic(out / "report.json", canonical(report))
    files.write_atomic(out / "report.html", _page(report, figures).encode())
    return out / "report.html"


def _page(report: dict[str, Any], figures: dict[str, str]) -> str:
    """Only the figures, which this package draws, go into the page without escaping."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
                                   autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                   lstrip_blocks=True, keep_trailing_newline=True)
    return templates.get_template("report.html.j2").render(r=report, figures=figures)


def _contents(verdict: Verdict, facts: Facts, bundle: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(what report.json holds, SVG by name). Without a valid contract, or after a FAIL: the verification alone."""
    name = shlex.quote(bundle.resolve().name)
    report: dict[str, Any] = {
        "schema": SCHEMA, "verification": verdict.as_dict(),
        "command": f"fl-privacy verify {name} --ca {facts.ca if verdict.anchored else 'SHA256'}"}
    if verdict.verdict == "FAIL" or facts.contract is None:
        return {**report, "title": _title("FAILED", "未通过", "this evidence does not hold", "证据不成立")}, {}
    agreed = facts.contract
    private, hidden = agreed.privacy.trust != "none", agreed.secagg.enabled
    report |= {"title": _titles(private, hidden), "private": private, "secure_aggregation": hidden, "run": agreed.run,
               "contract": _contract(facts, agreed),
               "rounds": _rounds(facts, agreed), "incidents": _incidents(facts, agreed),
               "approvals": [{"organisation": facts.peers[a.site].organisation,
                              **a.model_dump(include={"site", "approved_by", "approved", "approver", "policy", "code"})}
                             for a in facts.said(Acceptance)],
               "release": [r.model_dump(exclude={"run", "contract"}) for r in facts.said(Released)]}
    if not private:
        return report, {}
    return _with_privacy(report, facts, agreed)


def _contract(facts: Facts, agreed: Contract) -> dict[str, Any]:
    """code: the version that the contract names; code_digest: what every site states to have installed."""
    engineer = next(facts.peers[e.who] for e in facts.events if isinstance(e.predicate, ContractSignature))
    return {"digest": agreed.digest, "purpose": agreed.purpose, "expires": agreed.expires,
            "signed_by": {"name": engineer.name, "organisation": engineer.organisation},
            "sign_off": [s.model_dump() for s in agreed.sign_off], "metrics": list(agreed.metrics),
            "code": agreed.code_version, "code_digest": agreed.code, "data": agreed.data.name,
            "fields": list(agreed.data.fields), "labels": len(agreed.data.labels), "rule": agreed.rule.name,
            "model": agreed.model.weights, "sites": len(agreed.sites), "threshold": agreed.secagg.threshold,
            "survivors": agreed.secagg.survivors, "hiding_set": agreed.secagg.survivors - 1, "suite": agreed.secagg.suite}


def _titles(private: bool, hidden: bool) -> dict[str, str]:
    if not private:
        return _title("NON-PRIVATE", "无隐私保护", "training report" if hidden else "INDIVIDUAL UPDATES VISIBLE",
                      "训练报告" if hidden else "各机构的更新可见")
    if not hidden:
        return _title("INDIVIDUAL UPDATES VISIBLE", "各机构的更新可见", "privacy report", "隐私报告")
    return _title("Privacy report", "隐私报告", "differential privacy with secure aggregation", "差分隐私与安全聚合")


def _title(en: str, zh: str, sub_en: str, sub_zh: str) -> dict[str, str]:
    return {"en": en, "zh": zh, "sub_en": sub_en, "sub_zh": sub_zh}


def _rounds(facts: Facts, agreed: Contract) -> dict[str, Any]:
    attempts = facts.said(Round)
    sums = [len(r.sites) for r in attempts if r.outcome == "done"]
    full = sum(n == len(agreed.sites) for n in sums)
    return {"planned": agreed.privacy.rounds, "retries": agreed.privacy.retries, "done": len(sums),
            "void": len(attempts) - len(sums), "full": full, "partial": len(sums) - full}


def _incidents(facts: Facts, agreed: Contract) -> list[dict[str, Any]]:
    """Void attempts, who dropped out where, charges without any statement, refusals (of no round in particular)."""
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
    for code in sorted(refused):
        add("refused", (0, 0), sorted(refused[code]), reason=code)
    return sorted(found, key=lambda i: (i["round"], i["attempt"]))


def _with_privacy(report: dict[str, Any], facts: Facts, agreed: Contract) -> tuple[dict[str, Any], dict[str, str]]:
    """Add what differential privacy says: sites, budget, odds, figures."""
    p = agreed.privacy
    sites = [_site(facts, agreed, site.name) for site in agreed.sites if site.name in facts.ledgers]
    report |= {"budget": {"epsilon": f"{p.epsilon:g}", "unit": p.unit, "adjacency": p.adjacency,
                          "sampler": p.sampler, "clip": f"{p.clip:g}", "q": f"{p.q:g}", "steps": p.local_steps,
                          "sampled": p.sampled, "draws": p.draws, "k_max": p.k_max, "phases": len(agreed.phases())},
               "sites": sites, "unseen": sorted({s.name for s in agreed.sites} - facts.ledgers.keys())}
    if not sites:
        return {**report, "odds": None}, {}
    worst = max(facts.spending, key=lambda name: facts.spending[name].alone)
    releases = _own(facts, agreed, worst)
    ledger = facts.ledgers[worst]
    grid = [facts.spending[worst].alone * 1.25 * i / CURVE_POINTS for i in range(CURVE_POINTS + 1)]
    deltas = [delta_at(releases, e, interval=COARSE) for e in grid]
    report["odds"] = {"site": worst, **_odds(grid, deltas, facts.spending[worst].alone, ledger.delta)}
    done = {(r.round, r.attempt) for r in facts.said(Round) if r.outcome == "done"}
    charges = {site: [Charge(float(r.epsilon), (r.round, r.attempt) in done) for r in ledger.reserves
                      if r.run == agreed.run] for site, ledger in facts.ledgers.items()}
    caps = {f"cap of {site['name']}": float(site["cap"]) for site in sites}
    one_cap = {"cap of the data": next(iter(caps.values()))} if len(set(caps.values())) == 1 else {}
    figures = {"spending": spending_plot(charges, {"budget of the run": p.epsilon or 0.0, **one_cap}),
               "trade_off": trade_off_plot(*trade_off(grid, deltas))}
    return report, figures


def _site(facts: Facts, agreed: Contract, name: str) -> dict[str, Any]:
    ledger, spending, terms = facts.ledgers[name], facts.spending[name], agreed.site(name)
    own, others = _own(facts, agreed, name), ledger.commitments > 0 or any(r.run != agreed.run for r in ledger.reserves)
    last = agreed.mechanism(name, agreed.privacy.rounds)
    one = Release(last.q, last.sigma, last.steps, last.group)
    return {"name": name, "organisation": facts.peers[name].organisation, "n_decl": terms.n_decl,
            "sigma": f"{terms.sigma:g}", "delta": _delta(ledger.delta), "charges": len(own),
            "spent": _up(spending.spent), "run_alone": decimal_up(spending.alone), "cap": _up(ledger.cap),
            "remaining": str(max(Decimal(0), Decimal(repr(ledger.cap)) - Decimal(_up(spending.spent)))),
            "other_runs": others,
            "rounds_left": None if others else _rounds_left(own, one, ledger.cap, ledger.delta),
            "at_other_deltas": {_delta(d): decimal_up(epsilon(own, d, interval=COARSE))
                                for d in (ledger.delta / 10, ledger.delta / 1000)}}


def _own(facts: Facts, agreed: Contract, site: str) -> list[Release]:
    return [r.release for r in facts.ledgers[site].reserves if r.run == agreed.run]


def _rounds_left(spent: Sequence[Release], one: Release, cap: float, delta: float) -> int:
    """How many more rounds like the last one fit under the cap; MAX_ROUNDS_LEFT if at least as many."""
    low, high = 0, MAX_ROUNDS_LEFT + 1
    while high - low > 1:
        middle = (low + high) // 2
        more = Release(one.q, one.sigma, one.steps * middle, one.group)
        fits = Decimal(decimal_up(epsilon([*spent, more], delta, interval=COARSE))) <= Decimal(repr(cap))
        low, high = (middle, high) if fits else (low, middle)
    return low


def _odds(epsilons: Sequence[float], deltas: Sequence[float], eps: float, delta: float) -> dict[str, str]:
    """Of 100 people each, how many would the best attacker, who errs equally often both ways, take to be in the data?

    Odds as in Nanayakkara et al., "What Are the Chances?", USENIX Security 2023. The error is at least
    (1 - delta) / (1 + e^epsilon) for every pair that holds, so the largest counts; shares are rounded against us."""
    error = max((1 - d) / (1 + math.exp(min(e, MAX_EPSILON))) for e, d in zip(epsilons, deltas, strict=True))
    pair = (1 - delta) / (1 + math.exp(min(eps, MAX_EPSILON)))
    return {"out": _floor(100 * error), "in": _ceil(100 * (1 - error)), "pair_in": _ceil(100 * (1 - pair)),
            "epsilon": decimal_up(eps), "delta": _delta(delta)}


def _floor(share: float) -> str:
    return str(math.floor(share)) if share >= 1 else f"{math.floor(share * 100) / 100:g}"


def _ceil(share: float) -> str:
    return str(math.ceil(share)) if share <= 99 else f"{math.ceil(share * 100) / 100:g}"


def _up(value: float) -> str:
    """Rounded up at 4 decimals, from the shortest decimal that reads back: a claim of 1.9207 stays 1.9207."""
    return str(Decimal(repr(value)).quantize(Decimal("0.0001"), rounding=ROUND_CEILING))


def _delta(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-")
