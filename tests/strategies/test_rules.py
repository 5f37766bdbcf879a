"""Every rule, and the documented example, keeps every promise of the conformance kit; the table's figures hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from privacy.contract import RuleTerms, TensorRange
from privacy.errors import Refused, UsageError
from strategies import conformance as kit
from strategies.adapter import Tensors, initial
from strategies.base import CORE, A, B, Named, Part, Round, Rule, Setup, adapter_spec, segments
from strategies.exact import Exact
from strategies.example import Rotated
from strategies.federate import federate
from strategies.fedsb import FedSb, public_start
from strategies.hetero import Hetero
from strategies.linear import FedIt, Ffa, RoLora
from strategies.merge import product
from strategies.optimizers import stepped
from strategies.plaintext import Krum, Median, TrimmedMean
from strategies.product import best_rank
from strategies.rules import RULES, rule

ALL: list[Rule] = [*RULES.values(), Rotated()]


@pytest.mark.parametrize("prove", kit.PROPERTIES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("one", ALL, ids=lambda r: r.name)
def test_rule_conforms(one: Rule, prove: Callable[[Rule], None]) -> None:
    prove(one)


class NoMask(Hetero):
    """Planted: padded with zeros and divided by everyone's weight."""

    def change(self, round_: Round, means: Tensors) -> Named:
        return {n: v for n, v in means.items() if n != "ranks"}


def test_each_component_of_hetero_is_the_mean_of_the_sites_that_train_it() -> None:
    """With unequal ranks; padding with zeros and dividing by everyone's weight shrinks what few sites train."""
    ranks, weights = (1, 3, 2, 3, 1), kit.WEIGHTS

    def worst(one: Rule) -> float:
        error = 0.0
        for world in kit.worlds(one, kit.setup_for(one, ranks=ranks)):
            got, old = world.next(), world.round_.old
            for j in range(kit.RANK):
                own = [k for k, r in enumerate(ranks) if r > j]
                for m in world.round_.setup.modules:
                    want = np.average([world.news[k][m + A][j] for k in own], axis=0, weights=[weights[k] for k in own])
                    error = max(error, float(np.abs(got[m + A][j] - want).max()))
                    want = np.average([world.news[k][m + B][:, j] for k in own], axis=0, weights=[weights[k] for k in own])
                    error = max(error, float(np.abs(got[m + B][:, j] - want).max()))
            assert got.keys() == old.keys()
        return error

    assert worst(Hetero()) < 1e-6
    assert worst(NoMask()) > 1e-2


def test_exact_is_exact_when_one_site_alone_has_most_of_the_rank() -> None:
    """Seven components of B A that the others don't train add to the rank that the sketch must hold."""
    one, ranks, weights = Exact(), (8, 1, 1), (1.0, 0.5, 0.25)
    shapes = (("layer.query" + A, (8, 96)), ("layer.query" + B, (96, 8)))
    setup = Setup(spec=adapter_spec(one, shapes), ranks=ranks, max_norm=1e3, range=1e3)
    rng = np.random.default_rng(0)
    old = {n: v + rng.normal(0, 0.3, v.shape).astype(np.float32) for n, v in initial(setup.spec, 0).items()}
    round_ = Round(setup, 1, old)
    begun = [one.own(round_.old, r) for r in ranks]
    news = [{n: v + rng.normal(0, 0.1, v.shape).astype(np.float32) if one.trains(n) else v for n, v in t.items()}
            for t in begun]
    after = federate(one, setup, 1, old, news, weights).adapter
    moved = [product(new, "layer.query") - product(t, "layer.query") for new, t in zip(news, begun, strict=True)]
    want = product(old, "layer.query") + np.average(moved, axis=0, weights=weights)
    assert one.passes(setup) == 2
    assert np.linalg.norm(product(after, "layer.query") - want) < kit.TOLERANCE * np.linalg.norm(want)


def test_component_that_no_survivor_trains_stays() -> None:
    one = Hetero()
    for world in kit.worlds(one, kit.setup_for(one, ranks=(1, 2, 2, 1, 1))):
        after = world.next()
        for m in world.round_.setup.modules:
            np.testing.assert_array_equal(after[m + A][2], world.round_.old[m + A][2])


def test_rolora_alternates_and_momentum_moves_no_frozen_factor() -> None:
    """A momentum that keeps turning would move the factor that the sites took as everyone's."""
    one, terms = RoLora(), RuleTerms(optimizer="fedavgm", momentum=0.9, server_lr=0.5)
    setup = kit.setup_for(one)
    old, state, rng = initial(setup.spec, 0), {}, np.random.default_rng(0)
    for no in range(1, 6):
        news = [{n: v + rng.normal(0, 0.1, v.shape).astype(np.float32) if one.trains(n, no) else v for n, v in old.items()}
                for _ in range(3)]
        got = federate(one, setup, no, old, news, (1, 1, 1), terms=terms, state=state)
        frozen, free = (A, B) if no % 2 else (B, A)
        for m in setup.modules:
            assert got.adapter[m + frozen].tobytes() == old[m + frozen].tobytes()
            assert got.adapter[m + free].tobytes() != old[m + free].tobytes()
        old, state = got.adapter, dict(got.state)
    zero = {n: np.zeros(s, np.float32) for n, s in setup.spec.shapes}
    assert all(v.any() for v in stepped(terms, zero, state)[0].values())  # what a step on all tensors would do


def test_unsynchronised_a_is_refused_where_accuracy_would_not_show_it() -> None:
    """Each silo's own A: B A still fits its data, but the mean of B belongs to no A."""
    one = Ffa()
    setup = kit.setup_for(one)
    old = initial(setup.spec, 0)
    trained = {n: np.ones_like(v) for n, v in old.items() if n.endswith(B)}
    news = [{**initial(setup.spec, seed), **trained} for seed in (0, 1)]
    with pytest.raises(Refused, match=r"rule\.moved.*lora_A"):
        federate(one, setup, 1, old, news, (1, 1))


def test_linear_alternative_is_named_for_each_plaintext_rule() -> None:
    for name, one in RULES.items():
        if one.linear:
            assert rule(name, secure=True) is one
            continue
        with pytest.raises(UsageError, match=f"rule={one.instead}") as caught:
            rule(name, secure=True)
        assert caught.value.code == "rule.not_linear"
        assert RULES[one.instead].linear
        assert rule(name, secure=False) is one


@pytest.mark.parametrize("one", [Krum(), TrimmedMean(), Median()], ids=lambda r: r.name)
@pytest.mark.case(37)
def test_robust_rule_survives_a_poisoned_site_and_a_mean_does_not(one: Rule) -> None:
    setup = kit.setup_for(one, max_norm=1e9)
    rng, old = np.random.default_rng(0), initial(setup.spec, 0)
    truth = {n: rng.normal(size=v.shape).astype(np.float32) if one.trains(n) else v for n, v in old.items()}
    news = [{n: v + rng.normal(0, 0.01, v.shape).astype(np.float32) if one.trains(n) else v for n, v in truth.items()}
            for _ in range(4)]
    for factor in (-1.0, 100.0, -1e4):
        poisoned = [*news, {n: (v * np.float32(factor)) if one.trains(n) else v for n, v in truth.items()}]
        after = federate(one, setup, 1, old, poisoned, (1,) * 5).adapter
        assert max(float(np.abs(after[n] - v).max()) for n, v in truth.items()) < 0.1
        mean = federate(Ffa(), setup, 1, old, poisoned, (1,) * 5).adapter
        assert max(float(np.abs(mean[n] - v).max()) for n, v in truth.items()) > 0.3
        outvoting = federate(one, setup, 1, old, poisoned, (1, 1, 1, 1, 1000)).adapter
        assert all(outvoting[n].tobytes() == v.tobytes() for n, v in after.items())


@pytest.mark.parametrize(("one", "sites"), [(Krum(), 4), (TrimmedMean(), 2), (Median(), 2)],
                         ids=lambda x: getattr(x, "name", str(x)))
def test_robust_rule_with_too_few_sites_is_refused(one: Rule, sites: int) -> None:
    setup = kit.setup_for(one)
    old = initial(setup.spec, 0)
    with pytest.raises(UsageError) as caught:
        federate(one, setup, 1, old, [old] * sites, (1,) * sites)
    assert caught.value.code == "rule.too_few_sites"
    federate(one, setup, 1, old, [old] * (sites + 1), (1,) * (sites + 1))


def test_krum_takes_one_update_as_it_is() -> None:
    for world in kit.worlds(Krum()):
        after = world.next()
        assert any(all(np.allclose(after[n], new[n], atol=1e-7) for n in after) for new in world.news)


def test_basis_that_deviates_is_refused_by_the_site() -> None:
    one = Exact()
    world = next(kit.worlds(one))
    round_ = world.round_
    means = {p.name: np.zeros(p.shape, np.float32) + 1 for p in one.plan(round_, 1)}
    good = one.between(round_, means)
    one.parts(round_, 2, world.news[0], good)
    name = next(iter(good))
    for bad in ({}, {name: good[name][:, :-1]}, {name: good[name].astype(np.float64)}, {name: good[name] * np.float32(2)},
                {name: good[name] * np.float32("nan")}):
        with pytest.raises(Refused) as caught:
            one.parts(round_, 2, world.news[0], bad)
        assert caught.value.code == "rule.basis"


@pytest.mark.parametrize("one", [Hetero(), Exact()], ids=lambda r: r.name)
@pytest.mark.case(13)
def test_site_with_a_rank_that_no_site_has_is_refused(one: Rule) -> None:
    setup = kit.setup_for(one, ranks=(1, 3, 3, 3, 3))
    round_ = Round(setup, 1, initial(setup.spec, 0))
    with pytest.raises(Refused) as caught:
        one.parts(round_, 1, one.own(round_.old, 2), {})
    assert caught.value.code == "rule.site_rank"


def test_uploads_are_as_small_as_promised() -> None:
    """r(m+n), r m, r^2, w(m+n): what the table of docs/strategies.md says, head aside."""
    def count(one: Rule, no: int = 1) -> int:
        setup = kit.setup_for(one)
        round_ = Round(setup, no, initial(setup.spec, 0))
        parts = [p for i in range(one.passes(setup)) for p in one.plan(round_, i + 1)]
        return sum(p.size for p in parts if not p.name.startswith("head"))

    (m, n), (m2, n2), r = kit.WIDE, kit.NARROW, kit.RANK
    assert count(FedIt()) == r * (m + n + m2 + n2)
    assert count(Ffa()) == count(RoLora()) == r * (m + m2)
    assert count(RoLora(), 2) == r * (n + n2)
    assert count(FedSb()) == 2 * r * r
    assert count(Exact()) == (5 * r + 4) * (m + n) + m2 * n2
    assert Exact().passes(kit.setup_for(Exact())) == 2


def test_best_rank_is_eckart_young() -> None:
    total = np.random.default_rng(0).normal(size=(20, 12))
    left, right = best_rank(total, 4)
    np.testing.assert_allclose(np.linalg.norm(total - left @ right.astype(np.float64)),
                               np.linalg.norm(np.linalg.svd(total)[1][4:]), rtol=1e-6)
    np.testing.assert_allclose(right @ right.T, np.eye(4), atol=1e-6)


def test_fedsb_starts_from_public_gradients() -> None:
    setup = kit.setup_for(FedSb())
    rng = np.random.default_rng(0)
    gradients = {m: rng.normal(size=(setup.shape(m + B)[0], setup.shape(m + A)[1])).astype(np.float32)
                 for m in setup.modules}
    start = setup.spec.check(public_start(setup.spec, 0, gradients))
    for m, g in gradients.items():
        best = np.linalg.norm(np.linalg.svd(g)[1][:kit.RANK])
        np.testing.assert_allclose(np.linalg.norm(start[m + B].T @ g @ start[m + A].T), best, rtol=1e-5)
        assert not start[m + CORE].any()
    for bad in ({}, {m: g.T for m, g in gradients.items()}, {m: g * np.float32("inf") for m, g in gradients.items()}):
        with pytest.raises(UsageError) as caught:
            public_start(setup.spec, 0, bad)
        assert caught.value.code == "rule.public_start"


def test_segments_join_neighbours_of_one_range() -> None:
    assert segments((Part("a", (2, 3), 1.0), Part("b", (4,), 1.0), Part("c", (1,), 2.0), Part("d", (5,), 1.0))) == (
        (10, 1.0), (1, 2.0), (5, 1.0))


def test_first_range_that_fits_and_never_more_than_the_norm() -> None:
    setup = Setup(spec=kit.setup_for(Ffa()).spec, ranks=(3,), max_norm=4.0, range=9.0,
                  ranges=(TensorRange(tensor="head.*", range=2.0), TensorRange(tensor="head.bias", range=1.0)))
    assert (setup.bound("head.bias"), setup.bound("x"), setup.bound("head.weight")) == (2.0, 4.0, 2.0)
