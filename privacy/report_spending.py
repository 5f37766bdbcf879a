"""What differential privacy says of a run: each site's spending against its budgets, the odds, and the figures.

Figures of a site with a ledger are the ledger's, this run recomputed. Of a site whose ledger never came there is only
what it signed: a lower bound of what it spent, marked `ledger: false` everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from functools import cache
from typing import Any

from privacy.accountant import Release, decimal_up, delta_at, epsilon
from privacy.contract import Contract
from privacy.predicates import Acceptance, Round
from privacy.report_plots import MAX_EPSILON, Bar, Charge, sites_plot, spending_plot, trade_off, trade_off_plot
from privacy.verify_run import ULP
from privacy.verify_trust import Facts

COARSE = 1e-3  # accountant interval; faster than the verifier's 1e-4 and still an upper bound
MAX_ROUNDS_LEFT = 1000  # the search stops there: "more than"
CURVE_POINTS = 24


def spending(facts: Facts, agreed: Contract) -> tuple[dict[str, Any], dict[str, str]]:
    """(budget, sites, who is over, who shows no ledger, odds; figures by name)."""
    p = agreed.privacy
    sites = [_site(facts, agreed, site.name) for site in agreed.sites if site.name in facts.spending]
    report: dict[str, Any] = {
        "budget": {"epsilon": f"{p.epsilon:g}", "unit": p.unit, "adjacency": p.adjacency, "sampler": p.sampler,
                   "clip": f"{p.clip:g}", "q": f"{p.q:g}", "steps": p.local_steps, "sampled": p.sampled, "draws": p.draws,
                   "k_max": p.k_max, "phases": len(agreed.phases())},
        "sites": sites, "over": [s["name"] for s in sites if s["over"]], "unaccounted": list(facts.unaccounted),
        "unseen": sorted({s.name for s in agreed.sites} - facts.spending.keys()), "odds": None}
    if not sites:
        return report, {}
    worst = max((s.name for s in agreed.sites if s.name in facts.spending), key=lambda name: facts.spending[name].alone)
    releases, delta = _own(facts, agreed, worst), agreed.site(worst).delta
    grid = [facts.spending[worst].alone * 1.25 * i / CURVE_POINTS for i in range(CURVE_POINTS + 1)]
    deltas = [delta_at(releases, e, interval=COARSE) for e in grid]
    report["odds"] = {"site": worst, **odds(grid, deltas, facts.spending[worst].alone, delta)}
    budget = p.epsilon or 0.0
    caps = {float(site["cap"]) for site in sites}
    lines = {"budget of the run": budget, **({"cap of the data": caps.copy().pop()} if len(caps) == 1 else {})}
    bars = [Bar(s["name"], float(s["run_alone"]), float(s["spent"]), float(s["cap"]), s["ledger"]) for s in sites]
    return report, {"spending": spending_plot(_charges(facts, agreed), lines), "sites": sites_plot(bars, budget),
                    "trade_off": trade_off_plot(*trade_off(grid, deltas))}


def _site(facts: Facts, agreed: Contract, name: str) -> dict[str, Any]:
    ledger, spent, terms = facts.ledgers.get(name), facts.spending[name], agreed.site(name)
    own, cap = _own(facts, agreed, name), _cap(facts, name)
    others = ledger is not None and (ledger.commitments > 0 or any(r.run != agreed.run for r in ledger.reserves))
    last = agreed.mechanism(name, agreed.privacy.rounds)
    one = Release(last.q, last.sigma, last.steps, last.group)
    over = spent.alone > (agreed.privacy.epsilon or 0.0) + ULP or spent.spent > cap
    return {"name": name, "organisation": facts.peers[name].organisation, "n_decl": terms.n_decl,
            "sigma": f"{terms.sigma:g}", "delta": _delta(terms.delta), "charges": len(own), "ledger": ledger is not None,
            "spent": _up(spent.spent), "run_alone": decimal_up(spent.alone), "cap": _up(cap), "over": over,
            "remaining": None if ledger is None else str(max(Decimal(0), Decimal(repr(cap)) - Decimal(_up(spent.spent)))),
            "other_runs": others,
            "rounds_left": None if others or ledger is None else _rounds_left(tuple(own), one, cap, terms.delta),
            "at_other_deltas": {_delta(d): decimal_up(_epsilon(tuple(own), d))
                                for d in (terms.delta / 10, terms.delta / 1000)}}


def _own(facts: Facts, agreed: Contract, site: str) -> list[Release]:
    """What the site released in this run: every reserve, or for want of a ledger every attempt that it signed."""
    if site in facts.ledgers:
        return [r.release for r in facts.ledgers[site].reserves if r.run == agreed.run]
    used = [agreed.mechanism(site, s.round) for s in facts.trained(site)]
    return [Release(m.q, m.sigma, m.steps, m.group) for m in used]


def _cap(facts: Facts, site: str) -> float:
    """Of the site's data, as its ledger and its acceptance say: the verifier has compared them."""
    return next(float(a.cap) for a in facts.said(Acceptance) if a.site == site)


def _charges(facts: Facts, agreed: Contract) -> dict[str, list[Charge]]:
    """Cumulative epsilon by site, as its ledger claims, or for want of one its statements."""
    done = {(r.round, r.attempt) for r in facts.said(Round) if r.outcome == "done"}
    found: dict[str, list[Charge]] = {}
    for site in (s.name for s in agreed.sites if s.name in facts.spending):
        ledger = facts.ledgers.get(site)
        claims = facts.trained(site) if ledger is None else [r for r in ledger.reserves if r.run == agreed.run]
        found[site if ledger else f"{site} (no ledger)"] = [
            Charge(float(c.epsilon), (c.round, c.attempt) in done) for c in claims]
    return found


@cache
def _epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """Sites of equal size have equal figures."""
    return epsilon(releases, delta, interval=COARSE)


@cache
def _rounds_left(spent: tuple[Release, ...], one: Release, cap: float, delta: float) -> int:
    """How many more rounds like the last one fit under the cap; MAX_ROUNDS_LEFT if at least as many."""
    low, high = 0, MAX_ROUNDS_LEFT + 1
    while high - low > 1:
        middle = (low + high) // 2
        more = Release(one.q, one.sigma, one.steps * middle, one.group)
        fits = Decimal(decimal_up(epsilon([*spent, more], delta, interval=COARSE))) <= Decimal(repr(cap))
        low, high = (middle, high) if fits else (low, middle)
    return low


def odds(epsilons: Sequence[float], deltas: Sequence[float], eps: float, delta: float) -> dict[str, str]:
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
