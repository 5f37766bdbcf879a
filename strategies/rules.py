"""Rules: how updates combine (the noun `Rule`), by name. The interface is strategies/base.py.

A round of any rule, on both sides of one weighted mean (a secure sum where the rule is linear):

    both         round_ = Round(setup(rule, contract, spec), round_no, adapter)   # spec = adapter_spec(rule, model's shapes)
    site         new = train(rule.own(adapter, rank))                       # noise is added here; all below is
                 for pass_no in 1..rule.passes(setup):                      # post-processing of `new`
                     plan = rule.plan(round_, pass_no)
                     vector = flatten(rule.parts(round_, pass_no, new, shared), plan)
                     -> Encoding(ranges=segments(plan)).encode(vector, weight), masked
    coordinator  means |= unflatten(Encoding(...).decode_mean(total, weights), plan)
                 shared = rule.between(round_, means)                       # broadcast, before pass 2
                 ...
                 change = rule.change(round_, means)
                 adapter = rule.apply(round_, stepped(change))              # server optimiser, on rule.space(round_)

`plan` depends on contract and round number alone, so both sides size the encoding before anything is trained. The second
pass is a secure sum of its own over exactly the sites of the first (ADR 0008). Linearity is explicit: a linear rule is
given means and nothing else, so secure aggregation, DP and rounding to few bits compose with it without special cases.
strategies/federate.py runs such a round in one process; a new rule is proven by strategies/conformance.py.
"""

from __future__ import annotations

from privacy.errors import UsageError, nearest
from strategies.base import PlaintextRule, Rule
from strategies.exact import Exact
from strategies.fedsb import FedSb
from strategies.hetero import Hetero
from strategies.linear import FedIt, Ffa, RoLora
from strategies.plaintext import FlexLora, Flora, Krum, Median, TrimmedMean

RULES: dict[str, Rule] = {r.name: r for r in (Ffa(), FedIt(), RoLora(), Exact(), FedSb(), Hetero(), Flora(), FlexLora(),
                                              Krum(), TrimmedMean(), Median())}
__all__ = ["RULES", "PlaintextRule", "Rule", "rule"]


def rule(name: str, *, secure: bool) -> Rule:
    """Look a rule up. Raises UsageError `rule.unknown`, `rule.not_linear`."""
    try:
        found = RULES[name]
    except KeyError:
        raise UsageError("rule.unknown", f"There is no rule {name!r}.", nearest(name, RULES)) from None
    if secure and not found.linear:
        raise UsageError("rule.not_linear", f"Rule {name!r} needs single updates, which secure aggregation hides.",
                         f"Use rule={found.instead}, which is linear.")
    return found

