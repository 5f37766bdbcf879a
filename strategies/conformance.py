"""The kit that proves a rule: run every property on it, as tests/strategies/test_rules.py does.

    @pytest.mark.parametrize("prove", PROPERTIES)
    def test_my_rule(prove):
        prove(MyRule())

Each raises CheckFailed `rule.conformance` with the property that doesn't hold. They run three rounds of five sites on an
adapter with a wide and a narrow module and a head, with unequal weights; training is a random change of what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privacy.contract import RuleTerms
from privacy.errors import CheckFailed, Refused
from strategies.adapter import HEAD, Tensors, initial
from strategies.base import A, B, Named, Part, PlaintextRule, Round, Rule, Setup, adapter_spec, flatten
from strategies.clip import norm
from strategies.federate import encoded_mean, federate, plain_mean
from strategies.merge import effective

TOLERANCE = 1e-6  # of the norm: float32 rounding, and no more
WIDE, NARROW = (48, 56), (12, 20)
RANK = 3
WEIGHTS = (1.0, 0.25, 0.5, 0.875, 0.375)  # on the lattice that secure aggregation rounds weights to
LIMIT = 1.0
Effect = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class World:
    """One round before its aggregation: `news` are the sites' adapters after training."""

    rule: Rule
    round_: Round
    news: tuple[Tensors, ...]

    def next(self, weights: Sequence[float] = WEIGHTS) -> Named:
        return federate(self.rule, self.round_.setup, self.round_.no, self.round_.old, self.news, weights).adapter


def setup_for(rule: Rule, *, ranks: tuple[int, ...] = (RANK,) * len(WEIGHTS), max_norm: float = 1e3) -> Setup:
    shapes = [(f"layer.{i}.query{kind}", shape) for i, (m, n) in enumerate((WIDE, NARROW))
              for kind, shape in ((A, (RANK, n)), (B, (m, RANK)))]
    spec = adapter_spec(rule, (*shapes, (HEAD[0], (4, 12)), (HEAD[1], (4,))))
    return Setup(spec=spec, ranks=ranks, seed=7, max_norm=max_norm, range=1e3)


def worlds(rule: Rule, setup: Setup | None = None, *, size: float = 0.1) -> Iterator[World]:
    """Three rounds that follow each other. size: standard deviation of what training changes."""
    setup = setup or setup_for(rule)
    old, rng = initial(setup.spec, setup.seed), np.random.default_rng(3)
    for no in (1, 2, 3):
        round_ = Round(setup, no, old)
        news = tuple(_trained(rule, round_, rank, rng, size) for rank in setup.ranks)
        world = World(rule, round_, news)
        yield world
        old = world.next()


def adapter_is_complete(rule: Rule) -> None:
    """PEFT's tensors all stay; what is trained may change; the start adds nothing to the base model."""
    setup = setup_for(rule)
    names = {name for name, _ in setup.spec.shapes}
    _hold(names >= {m + kind for m in setup.modules for kind in (A, B)} | set(HEAD), "the rule's adapter lacks PEFT tensors")
    _hold(all(rule.changes(n) for n in names if rule.trains(n)), "a trained tensor may not change")
    _hold(all(rule.trains(n) for w in worlds(rule) for n, _ in rule.trained(w.round_)), "trains(None) misses a tensor")
    _hold(not any(v.any() for v in effective(initial(setup.spec, 0)).values()), "the start changes the base model")


def plan_is_public(rule: Rule) -> None:
    """It depends on setup and round number, not on any value; ranges are finite, names differ."""
    for world in worlds(rule):
        other = replace(world.round_, old=world.news[0])
        for pass_no in range(1, rule.passes(world.round_.setup) + 1):
            plan = rule.plan(world.round_, pass_no)
            _hold(plan == rule.plan(other, pass_no), "the plan depends on the adapter's values")
            _hold(len({p.name for p in plan}) == len(plan) > 0, "parts share a name, or there are none")
            _hold(all(0 < p.range < np.inf for p in plan), "a part has no public range")


def parts_fit_the_plan(rule: Rule) -> None:
    """Names, shapes, float32, within their ranges and the norm's limit however far training went; a pure function."""
    for world in worlds(rule, setup_for(rule, max_norm=LIMIT), size=5.0):
        before = [{n: v.copy() for n, v in t.items()} for t in (world.round_.old, *world.news)]
        for plan, sent in _passes(world):
            for parts in sent:
                got, want = {n: v.shape for n, v in parts.items()}, {p.name: p.shape for p in plan}
                _hold(got == want and all(v.dtype == np.float32 for v in parts.values()), "parts differ from the plan")
                _hold(all((np.abs(parts[p.name]) <= p.range).all() for p in plan), "a value is outside its public range")
            if rule.passes(world.round_.setup) == 1:
                counted = [{n: v for n, v in parts.items() if n in dict(rule.space(world.round_))} for parts in sent]
                _hold(all(norm(c) <= LIMIT for c in counted), "an update is longer than the limit")
        same = [all(np.array_equal(old[n], t[n]) for n in t) for old, t in
                zip(before, (world.round_.old, *world.news), strict=True)]
        _hold(all(same), "the rule wrote into its inputs")


def only_what_may_move_moves(rule: Rule) -> None:
    """What a round doesn't train stays bit by bit, unless it is the server's own; the new adapter has the spec's form."""
    for world in worlds(rule):
        after = world.round_.setup.spec.check(world.next())
        for name, old in world.round_.old.items():
            free = rule.trains(name, world.round_.no) or (rule.changes(name) and not rule.trains(name))
            _hold(free or after[name].tobytes() == old.tobytes(), f"{name} moved in round {world.round_.no}")


def moved_tensors_are_refused(rule: Rule) -> None:
    """A site that starts from another frozen tensor is found: no metric would show it."""
    for world in worlds(rule):
        still = [n for n, _ in world.round_.setup.spec.shapes if not rule.trains(n, world.round_.no)]
        for name in still:
            moved = {**world.news[0], name: world.news[0][name] + np.float32(1e-3)}
            try:
                rule.parts(world.round_, 1, moved, {})
            except Refused as e:
                _hold(e.code == "rule.moved", "another error for a tensor that moved")
            else:
                _hold(False, f"{name} may differ between sites")


def order_does_not_matter(rule: Rule) -> None:
    for world in worlds(rule):
        turned = replace(world, news=world.news[::-1])
        _same(world.next(), turned.next(WEIGHTS[::-1]), "the order of sites matters")


def identical_sites_give_that_site(rule: Rule) -> None:
    for world in worlds(rule):
        _same(replace(world, news=world.news[:1] * len(WEIGHTS)).next(), world.news[0], "identical sites give another model")


def nothing_learnt_changes_nothing(rule: Rule) -> None:
    for world in worlds(rule):
        idle = replace(world, news=tuple(rule.own(world.round_.old, r) for r in world.round_.setup.ranks))
        _same(idle.next(), world.round_.old, "a round without training changes the model")


def weight_counts(rule: Rule) -> None:
    """A site of weight 2 is two sites; a rule that isn't weighted says so."""
    for world in worlds(rule):
        one = [*world.news, world.news[1], world.news[1]]
        twice = replace(world, news=tuple(one)).next((1,) * 7)
        _same(world.next((1, 3, 1, 1, 1)), twice, "a weight is not what it says") if rule.weighted else _same(
            world.next(), world.next((1,) * 5), "a rule that isn't weighted uses weights")


def exact_means_exact(rule: Rule) -> None:
    """The new model moves by the weighted mean of what the sites' models moved; also with ranks that differ."""
    for setup in _setups(rule) if rule.exact else ():
        for world in worlds(rule, setup):
            begun = effective(world.round_.old)
            moved = [_minus(effective(new), effective(rule.own(world.round_.old, rank)))
                     for new, rank in zip(world.news, setup.ranks, strict=True)]
            want = {n: v + sum(w * m[n] for w, m in zip(WEIGHTS, moved, strict=True)) / sum(WEIGHTS)
                    for n, v in begun.items()}
            _close(effective(world.next()), want, "the new model isn't the mean of the sites' models")


def optimizers_agree(rule: Rule) -> None:
    """FedAvgM without momentum and with rate 1 is FedAvg, bit by bit."""
    for world in worlds(rule):
        terms = RuleTerms(optimizer="fedavgm", momentum=0.0, server_lr=1.0)
        other = federate(rule, world.round_.setup, world.round_.no, world.round_.old, world.news, WEIGHTS, terms=terms)
        same = all(v.tobytes() == other.adapter[n].tobytes() for n, v in world.next().items())
        _hold(same, "FedAvgM(0, 1) isn't FedAvg")


def linear_means_secure(rule: Rule) -> None:
    """Each pass's secure sum is its plain one within C / (2^(b-1) - 1) * K / sum(w); one that isn't linear names another."""
    if isinstance(rule, PlaintextRule) or not rule.linear:
        _hold(isinstance(rule, PlaintextRule) and not rule.linear, "linear and PlaintextRule contradict each other")
        _hold(bool(rule.instead), "no linear rule is named")
        return
    for setup in _setups(rule):
        for world in worlds(rule, setup):
            for plan, sent in _passes(world):
                vectors = [flatten(parts, plan) for parts in sent]
                for bits, ring in ((24, 32), (8, 16)):
                    error = encoded_mean(bits, ring)(plan, vectors, WEIGHTS) - plain_mean(plan, vectors, WEIGHTS)
                    ranges = np.concatenate([np.full(p.size, p.range) for p in plan])
                    bound = ranges * (len(WEIGHTS) / sum(WEIGHTS) / (2 ** (bits - 1) - 1) + 2.0**-23)
                    _hold(bool((np.abs(error) <= bound).all()), "the secure sum differs from the plain one")


PROPERTIES: tuple[Callable[[Rule], None], ...] = (
    adapter_is_complete, plan_is_public, parts_fit_the_plan, only_what_may_move_moves, moved_tensors_are_refused,
    order_does_not_matter, identical_sites_give_that_site, nothing_learnt_changes_nothing, weight_counts, exact_means_exact,
    optimizers_agree, linear_means_secure)


def _trained(rule: Rule, round_: Round, rank: int, rng: np.random.Generator, size: float) -> Named:
    return {n: v + rng.normal(0, size, v.shape).astype(np.float32) if rule.trains(n, round_.no) else v
            for n, v in rule.own(round_.old, rank).items()}


def _setups(rule: Rule) -> list[Setup]:
    """Equal ranks, and unequal ones where the rule can start a site with less."""
    even = setup_for(rule)
    begun = initial(even.spec, 0)
    smaller = rule.own(begun, 1)
    ragged = any(smaller[n].shape != v.shape for n, v in begun.items())
    return [even, setup_for(rule, ranks=(1, 3, 2, 3, 1))] if ragged else [even]


def _passes(world: World) -> Iterator[tuple[Sequence[Part], list[Named]]]:
    """The plan of each pass, and what the sites send in it."""
    rule, round_ = world.rule, world.round_
    shared: Named = {}
    means: Named = {}
    for pass_no in range(1, rule.passes(round_.setup) + 1):
        plan = rule.plan(round_, pass_no)
        sent = [rule.parts(round_, pass_no, new, shared) for new in world.news]
        yield plan, sent
        means |= {p.name: np.average([s[p.name] for s in sent], axis=0, weights=WEIGHTS).astype(np.float32) for p in plan}
        shared = rule.between(round_, means)


def _minus(a: Effect, b: Effect) -> Effect:
    return {n: v - b[n] for n, v in a.items()}


def _same(one: Tensors, other: Tensors, what: str) -> None:
    _close(effective(one), effective(other), what)


def _close(got: Effect, want: Effect, what: str) -> None:
    for name, value in want.items():
        size = max(float(np.linalg.norm(value)), float(np.linalg.norm(got[name])))
        error = float(np.linalg.norm(got[name] - value))
        _hold(error <= TOLERANCE * size, f"{what} ({name}: off by {error / max(size, 1e-300):.1e})")


def _hold(holds: bool, what: str) -> None:
    if not holds:
        raise CheckFailed("rule.conformance", f"The rule breaks a promise: {what}.", "docs/strategies.md says why it must.")
