"""One round of any rule in one process: the sites' trained adapters in, the next adapter out. No network, no secrets.

The same functions in the same order as over the network; `mean` stands for what is there a secure sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privacy.contract import RuleTerms
from privacy.secagg.encoding import Encoding
from strategies.adapter import Tensors
from strategies.base import Named, Part, PlaintextRule, Round, Rule, Setup, flatten, segments, unflatten
from strategies.optimizers import stepped

Vector = NDArray[np.float32]
Mean = Callable[[Sequence[Part], Sequence[Vector], Sequence[float]], Vector]
PLAIN = RuleTerms(optimizer="fedavg", server_lr=1.0)  # the mean itself


@dataclass(frozen=True)
class Next:
    """The adapter after a round, and the server optimiser's state by tensor."""

    adapter: Named
    state: Mapping[str, Vector] = field(default_factory=dict)


def federate(rule: Rule, setup: Setup, round_no: int, old: Tensors, news: Sequence[Tensors], weights: Sequence[float], *,
             terms: RuleTerms = PLAIN, state: Mapping[str, Vector] | None = None, mean: Mean | None = None) -> Next:
    """old: what every site got. news: each site's after training, in its own rank. weights: relative, above 0.

    Raises as the rule's own functions do, and Refused `adapter.tensor` when the rule makes no adapter of its spec.
    """
    round_ = Round(setup, round_no, old)
    shared: Named = {}
    means: Named = {}
    if isinstance(rule, PlaintextRule):
        change = rule.combine(round_, [rule.parts(round_, 1, new, {}) for new in news], weights)
    else:
        for pass_no in range(1, rule.passes(setup) + 1):
            plan = rule.plan(round_, pass_no)
            vectors = [flatten(rule.parts(round_, pass_no, new, shared), plan) for new in news]
            means |= unflatten((mean or plain_mean)(plan, vectors, weights), plan)
            if pass_no < rule.passes(setup):
                shared = rule.between(round_, means)
        change = rule.change(round_, means)
    change, after = stepped(terms, change, state or {})
    return Next(setup.spec.check(rule.apply(round_, change)), after)


def plain_mean(plan: Sequence[Part], vectors: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """In float64, rounded once."""
    total = sum(w * v.astype(np.float64) for w, v in zip(weights, vectors, strict=True))
    return np.asarray(total / sum(weights), np.float32)


def encoded_mean(bits: int = 24, ring: int = 32) -> Mean:
    """Through the fixed-point encoding of secure aggregation, without the masks: they cancel in the sum."""
    def mean(plan: Sequence[Part], vectors: Sequence[Vector], weights: Sequence[float]) -> Vector:
        encoding = Encoding(bits=bits, ring=ring, cohort=len(vectors), ranges=segments(plan))
        total = np.zeros(encoding.dim, encoding.dtype)
        for vector, weight in zip(vectors, weights, strict=True):
            total += encoding.encode(vector, weight)
        return encoding.decode_mean(total, weights)

    return mean
