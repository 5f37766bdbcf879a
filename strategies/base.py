"""The interface of a rule, and what both sides know before they use one. How it is called: strategies/rules.py.

By default a rule is the mean of the changes of what it trains: `trains` alone makes a rule (linear.py). One that sends
something else overrides `plan` and `parts`, and says with `change` and `apply` what the mean does to the adapter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from privacy.contract import Contract, TensorRange
from privacy.errors import Refused, UsageError, nearest
from strategies.adapter import AdapterSpec, Tensors
from strategies.clip import clip_norm, honest_norm

Named = dict[str, NDArray[np.float32]]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
A, B, CORE, RESIDUAL = ".lora_A.weight", ".lora_B.weight", ".lora_R.weight", ".residual.weight"


@dataclass(frozen=True)
class Part:
    """A tensor that a site sends. range: public bound on the absolute value of each of its coordinates."""

    name: str
    shape: tuple[int, ...]
    range: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What contract and model fix before the first round; both sides derive the same.

    ranks: of the sites' LoRA, in the contract's order, none above the adapter's own. max_norm: public L2 limit of
    a site's update, above 0, perhaps infinite. range, ranges: public bounds on coordinates, by tensor. byzantine: sites
    that a robust rule survives.
    """

    spec: AdapterSpec
    ranks: tuple[int, ...]
    seed: int = 0
    max_norm: float = math.inf
    range: float = 1.0
    ranges: tuple[TensorRange, ...] = ()
    byzantine: int = 1

    def bound(self, name: str) -> float:
        """Public bound on a coordinate: the first pattern that fits, and never more than the norm's limit."""
        own = next((own.range for own in self.ranges if fnmatchcase(name, own.tensor)), self.range)
        return min(own, self.max_norm)

    @property
    def modules(self) -> tuple[str, ...]:
        """Adapted modules: the part of a tensor's name before .lora_A."""
        return tuple(name.removesuffix(A) for name, _ in self.spec.shapes if name.endswith(A))

    @property
    def rank(self) -> int:
        """Of the adapter: the largest that a site may have."""
        return max((shape[0] for name, shape in self.spec.shapes if name.endswith(A)), default=0)

    def shape(self, name: str) -> tuple[int, ...]:
        return dict(self.spec.shapes)[name]


@dataclass(frozen=True)
class Round:
    """What both sides know at a round's start: `old` is the adapter that every site got. no: from 1 on."""

    setup: Setup
    no: int
    old: Tensors


class Rule(ABC):
    """How updates combine: pure functions on named float32 tensors, used after the noisy local training only.

    name: as in a contract. linear: the weighted mean of what sites send is enough, so a secure sum serves; then `instead`
    is empty, otherwise it names the linear rule to use. exact: the new adapter is the mean of the sites' models, not just
    of their factors. weighted: a site counts by its weight. ranked: sites' ranks may differ.
    """

    name: ClassVar[str]
    linear: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    instead: ClassVar[str] = ""
    ranked: ClassVar[bool] = False

    def tensors(self, shapes: Shapes) -> Shapes:
        """Of the adapter, given PEFT's and the head's: a rule may add its own. In canonical order."""
        return shapes

    @abstractmethod
    def trains(self, tensor: str, round_no: int | None = None) -> bool:
        """Whether a site trains the tensor of that name in that round; None: in any round."""

    def changes(self, tensor: str) -> bool:
        """Whether any round changes the tensor. The others stay as `adapter.initial` made them, and sites check that."""
        return self.trains(tensor)

    def trained(self, round_: Round) -> Shapes:
        """Of the round, in canonical order."""
        return tuple((name, shape) for name, shape in round_.setup.spec.shapes if self.trains(name, round_.no))

    def passes(self, setup: Setup) -> int:
        """Secure sums of a round, 1 or 2: the second over exactly the sites of the first."""
        return 1

    def own(self, tensors: Tensors, rank: int) -> Tensors:
        """Of an adapter, what a site with LoRA of that rank has: it starts its training from there."""
        return tensors

    def plan(self, round_: Round, pass_no: int) -> tuple[Part, ...]:
        """What each site sends in that pass (from 1 on), in order. Depends on setup and round number, not on values."""
        return tuple(Part(name, shape, round_.setup.bound(name)) for name, shape in self.trained(round_))

    def parts(self, round_: Round, pass_no: int, new: Tensors, shared: Tensors) -> Named:
        """A site's values of `plan`, within their ranges. new: after its training. shared: from `between`, for pass 2.

        Raises Refused `rule.moved` when a tensor that the round doesn't train isn't the one that the site was given.
        """
        check_still(self, round_, new)
        return clip_norm({n: new[n] - round_.old[n] for n, _ in self.trained(round_)}, round_.setup.max_norm)

    def between(self, round_: Round, means: Tensors) -> Named:
        """What the coordinator broadcasts after pass 1, given its weighted means: the tensors of `shares`."""
        return {}

    def shares(self, setup: Setup) -> Shapes:
        """Names and shapes of what `between` broadcasts, in canonical order."""
        return ()

    def space(self, round_: Round) -> Shapes:
        """Names and shapes of `change`: where the server optimiser works. A name has one shape in all rounds."""
        return self.trained(round_)

    def change(self, round_: Round, means: Tensors) -> Named:
        """The mean change of the model, given the weighted means of all passes."""
        return dict(means)

    def apply(self, round_: Round, change: Tensors) -> Named:
        """The next adapter, complete and in canonical order. change: as a server optimiser left it."""
        return {n: v + change[n] if n in change else v for n, v in ((n, round_.old[n]) for n, _ in round_.setup.spec.shapes)}


class PlaintextRule(Rule):
    """A rule that needs to see what every single site sends: in simulations, or where each site's policy allows it."""

    linear = False

    @abstractmethod
    def combine(self, round_: Round, sent: Sequence[Tensors], weights: Sequence[float]) -> Named:
        """In place of `change`: what each site sent, and its weight."""


def adapter_spec(rule: Rule, shapes: Shapes) -> AdapterSpec:
    """Of the rule's adapter, given PEFT's tensors and the head's."""
    return AdapterSpec(every := rule.tensors(shapes), frozenset(name for name, _ in every if rule.trains(name)))


def ranks(rule: Rule, contract: Contract) -> tuple[int, ...]:
    """Of the sites' LoRA, in the contract's order. Raises UsageError `rule.rank`."""
    names, given = [s.name for s in contract.sites], {own.site: own.r for own in contract.rule.ranks}
    for name, r in given.items():
        if name not in names or r > contract.lora.r:
            raise UsageError("rule.rank", f"Rank {r} of {name!r} is none of a site, or above lora.r = {contract.lora.r}.",
                             "Set lora.r to the largest rank, and rule.ranks for sites that have less.")
    if given and not rule.ranked:
        raise UsageError("rule.rank", f"Under rule {rule.name!r} all sites have the rank lora.r.",
                         "Leave rule.ranks empty, or use rule=exact or hetero.")
    return tuple(given.get(name, contract.lora.r) for name in names)


def setup(rule: Rule, contract: Contract, spec: AdapterSpec) -> Setup:
    """What the contract implies. Raises UsageError `rule.rank`, and `encoding.range` for a range that no tensor has; also
    as `Contract.mechanism`."""
    terms, secagg = contract.rule, contract.secagg
    limit = terms.max_norm or max(
        honest_norm(contract.mechanism(site.name, no), spec.dim, terms.local_lr)
        for site in contract.sites for no in range(1, contract.privacy.rounds + 1))
    made = Setup(spec=spec, ranks=ranks(rule, contract), seed=contract.lora.seed, max_norm=limit, range=secagg.range,
                 ranges=secagg.ranges, byzantine=terms.byzantine)
    passes = [(no, pass_no) for no in (1, 2) for pass_no in range(1, rule.passes(made) + 1)]
    sent = [part.name for no, pass_no in passes for part in rule.plan(Round(made, no, {}), pass_no)]
    for own in secagg.ranges:
        if not any(fnmatchcase(name, own.tensor) for name in sent):
            raise UsageError("encoding.range", f"No site sends a tensor called {own.tensor!r}.", nearest(own.tensor, sent))
    return made


def widened(shapes: Shapes, rank: int) -> Shapes:
    """PEFT's tensors and the head of a model of any rank, as they are in the adapter, of rank `rank`."""
    return tuple((n, (rank, s[1]) if n.endswith(A) else (s[0], rank) if n.endswith(B) else s) for n, s in shapes)


def after_training(rule: Rule, round_: Round, rank: int, change: NDArray[np.float32]) -> Named:
    """A site's adapter after training, in its own rank. change: of all that any round trains, float32 (spec.dim,); what
    this round doesn't train stays bit by bit."""
    moved = round_.setup.spec.add(round_.old, change)
    kept = {n: v if rule.trains(n, round_.no) else round_.old[n] for n, v in moved.items()}
    return dict(rule.own(kept, rank))


def check_still(rule: Rule, round_: Round, new: Tensors) -> None:
    """Bit by bit: means of factors are means of products only where the other factor is everyone's.

    Raises Refused `rule.moved`.
    """
    for name, _ in round_.setup.spec.shapes:
        if not rule.trains(name, round_.no) and new[name].tobytes() != round_.old[name].tobytes():
            raise Refused("rule.moved", f"Tensor {name!r} moved, which {rule.name} doesn't train in round {round_.no}.",
                          "Start the site's training from the adapter that it was given.")


def flatten(values: Tensors, order: Sequence[Part] | Shapes) -> NDArray[np.float32]:
    """One vector, float32, in the order of a plan or space: what is encoded, and what an optimiser steps on."""
    names = [p.name if isinstance(p, Part) else p[0] for p in order]
    return np.concatenate([np.zeros(0, np.float32), *(values[n].ravel() for n in names)]).astype(np.float32, copy=False)


def unflatten(vector: NDArray[np.float32], order: Sequence[Part] | Shapes) -> Named:
    """Inverse of `flatten`. Raises Refused `rule.vector` for another length."""
    shapes = [(p.name, p.shape) if isinstance(p, Part) else p for p in order]
    ends = np.cumsum([math.prod(shape) for _, shape in shapes], dtype=np.int64)
    if vector.shape != (int(ends[-1]) if shapes else 0,):
        raise Refused("rule.vector", f"A vector of shape {vector.shape} doesn't fit the rule's plan.",
                      "Both sides must plan from the same contract and round.")
    return {n: part.reshape(shape) for (n, shape), part in zip(shapes, np.split(vector, ends[:-1]), strict=True)}


def segments(plan: Sequence[Part]) -> tuple[tuple[int, float], ...]:
    """(count, range) of a plan as `secagg.encoding.Encoding` takes it: neighbours of one range are one segment."""
    out: list[tuple[int, float]] = []
    for part in plan:
        count = part.size + (out.pop()[0] if out and out[-1][1] == part.range else 0)
        out.append((count, part.range))
    return tuple(out)
