"""What enforces a lineage's cap: all that was reserved, all that open jobs hold, and what is asked for now.

Guarantee: what `fitting` lets through keeps the composition of every way in which the open jobs can still spend what
they hold within (cap, delta). The first job's schedule was fixed before anything was released, so the accountant (PLD)
decides. A second job may have been chosen after seeing what the first released: from then on a fully adaptive Renyi
filter has to admit everything too (Feldman and Zrnic, arXiv 2008.11193). Where even the end of the first job depended
on its outputs, its PLD and the filter each keep delta, so that both together keep (cap, 2 delta).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from itertools import product

from privacy.accountant import Release, decimal_up, epsilon
from privacy.errors import Refused
from privacy.ledger_chain import Chain
from privacy.ledger_records import Enforced, at_most
from privacy.rdp import RenyiFilter


def fitting(chain: Chain, run: str, ways: Sequence[Sequence[Release]]) -> tuple[str, Enforced]:
    """Epsilon, rounded up, of everything reserved, everything that other runs hold, and the costliest of `ways` in which
    this run goes on; and what enforced the cap. Raises Refused `budget.exhausted`; UsageError as the accountants do."""
    delta, cap = float(chain.opened.delta), chain.opened.cap
    spent = [r.release for r in chain.reserves.values()]
    held = [body.left(chain.drawn.get(other, Counter())) for other, body in chain.encumbrances.items()
            if other != run and other not in chain.closes]
    totals = [[*spent, *(release for part in parts for release in part)] for parts in product(*held, ways)]
    worst = str(max(Decimal(decimal_up(epsilon(total, delta))) for total in totals))
    if not at_most(worst, cap):
        raise exhausted(worst, cap)
    if not chain.is_shared(run):
        return worst, "pld"
    keeper = _filter(chain)
    if not all(keeper.admits(total[:-1], total[-1]) for total in totals if total):
        raise Refused("budget.exhausted", f"With a second job an adaptive filter keeps the cap {cap}, and it does not "
                      "admit this.", "Ask for fewer rounds or more noise; a spent budget never comes back.")
    return worst, "pld+filter"


def _filter(chain: Chain) -> RenyiFilter:
    """Its order suits the first job, if that one was known before anything was released; it never changes."""
    first = next(iter(chain.encumbrances.values()), None)
    known = first is not None and all(seq > first.seq for seq in chain.reserves)
    planned = first.left({})[0] if first is not None and known else []
    return RenyiFilter(float(chain.opened.delta), float(chain.opened.cap), tuple(planned))


def exhausted(total: str, cap: str | float) -> Refused:
    return Refused("budget.exhausted", f"It would bring epsilon to {total}, over the cap {cap}.",
                   "Ask for fewer rounds or more noise; a spent budget never comes back.")
