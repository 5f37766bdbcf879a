"""Renyi accounting against dp-accounting and brute force, and the filter against releases chosen along the way."""

import itertools
import logging
import math
import random

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy.special import logsumexp

from privacy import accountant, rdp
from privacy.accountant import Release
from privacy.errors import UsageError
from privacy.mixture import mixture
from privacy.rdp import ORDERS, RenyiFilter, divergences, epsilon

DELTA = 1e-5
GOLDENS = [  # q, sigma, steps -> epsilon at delta 1e-5 by Renyi orders
    (0.01, 0.6, 100, 4.83), (0.01, 1.0, 1000, 2.10), (0.01, 2.0, 5000, 1.61), (0.1, 1.0, 100, 7.90), (0.1, 2.0, 1000, 8.94)]
BELOW_60 = np.flatnonzero(ORDERS <= 60)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("absl").setLevel(logging.ERROR)
    rdp._one.cache_clear()
    yield
    rdp._one.cache_clear()


def theirs(q: float, sigma: float, steps: int, orders=None) -> float:
    account = RdpAccountant(orders)
    account.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
    return float(account.get_epsilon(DELTA))


def brute(q: float, sigma: float, group: int, order: float) -> tuple[float, float]:
    """Both directions of one release by quadrature: (removing, adding)."""
    x, width = np.linspace(-60 * sigma, order * group + 60 * sigma, 200_001, retstep=True)
    i = np.arange(group + 1)
    weights = np.array([math.comb(group, k) * q**k * (1 - q) ** (group - k) for k in i])
    terms = np.log(weights)[:, None] + i[:, None] * (2 * x - i[:, None]) / (2 * sigma**2)
    loss = logsumexp(terms, axis=0)
    density = -((x / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(width)
    return (float(logsumexp(density + order * loss)) / (order - 1),
            float(logsumexp(density - (order - 1) * loss)) / (order - 1))


def check_brute() -> None:
    for q, sigma, group in [(0.1, 1.0, 1), (0.01, 0.6, 1), (0.01, 1.0, 3), (0.5, 6.0, 4), (0.9, 5.0, 3)]:
        own = divergences([Release(q, sigma, 1, group)])
        for at in np.searchsorted(ORDERS, [1.1, 1.5, 2.0, 3.4, 8.0, 10.9, 12.0]):
            want = max(brute(q, sigma, group, float(ORDERS[at])))
            assert want * (1 - 1e-9) - 1e-12 <= own[at] <= want * (1 + 1e-2), (q, sigma, group, ORDERS[at], own[at], want)


def test_whole_orders_are_those_of_dp_accounting():
    for q, sigma, steps, _ in GOLDENS:
        own = (divergences([Release(q, sigma, steps)]) + rdp.conversion(DELTA))[[o == round(o) for o in ORDERS]].min()
        assert abs(own - theirs(q, sigma, steps, list(range(2, 257)))) < 1e-6


def test_goldens():
    """dp-accounting's broken orders are bounds too, and looser by up to 0.005 here."""
    for q, sigma, steps, want in GOLDENS:
        own, other = epsilon([Release(q, sigma, steps)], DELTA), theirs(q, sigma, steps)
        assert abs(own - want) < 0.006 and other - 5e-3 < own < other + 1e-3
        assert own > accountant.epsilon([Release(q, sigma, steps)], DELTA)


def test_a_release_is_never_below_brute_force():
    check_brute()


@pytest.mark.parametrize(("q", "sigma", "group"), [(0.01, 1.0, 8), (0.1, 4.0, 16), (0.5, 12.0, 5)])
def test_groups_bound_the_privacy_loss_distribution(q, sigma, group):
    for steps in (1, 30):
        tight = accountant.epsilon([Release(q, sigma, steps, group)], DELTA, interval=1e-3)
        assert tight < epsilon([Release(q, sigma, steps, group)], DELTA) < 5 * tight


def test_adding_never_costs_more_for_one_item():
    """The theorem that one item relies on, seen in the bound that groups use."""
    for q, sigma in [(0.01, 1.0), (0.3, 0.7), (0.9, 4.0)]:
        assert (rdp._tangents(mixture(q, sigma, 1)) <= divergences([Release(q, sigma, 1)]) * (1 + 1e-2)).all()


def test_divergences_add_up_grow_with_the_order_and_with_the_group():
    one, two = Release(0.1, 2.0, 3), Release(0.2, 3.0, 2, 4)
    assert np.allclose(divergences([one, two, one]), 2 * divergences([one]) + divergences([two]), rtol=1e-12)
    curves = [divergences([Release(0.05, 3.0, 1, group)]) for group in (1, 2, 3, 8)]
    assert all((np.diff(curve) >= 0).all() for curve in curves)
    assert all((more > less).all() for less, more in itertools.pairwise(curves))


def test_limits():
    assert epsilon([], DELTA) == epsilon([Release(0.5, 1.0, 0)], DELTA) == 0.0
    assert epsilon([Release(0.5, 0.0, 1)], DELTA) == epsilon([Release(1.0, 1e-300, 1)], DELTA) == math.inf
    assert np.allclose(divergences([Release(1.0, 6.0, 2, 3)]), 2 * ORDERS / 8, rtol=1e-12)
    near = divergences([Release(1 - 1e-12, 6.0, 2, 3)])[BELOW_60]
    assert np.allclose(near, 2 * ORDERS[BELOW_60] / 8, rtol=1e-3)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(UsageError, match=r"dp\.parameter"):
            epsilon([Release(0.5, 1.0, 1)], delta)
    with pytest.raises(UsageError, match=r"dp\.unsupported"):
        divergences([Release(0.5, 1.0, 1, 65)])


# The filter -----------------------------------------------------------------------------------------------------------

def walk(admits, moves) -> list[Release]:
    """Whatever `moves` proposes is released if admitted."""
    done: list[Release] = []
    for release in moves:
        if admits(done, release):
            done.append(release)
    return done


def check_some_order_holds_on_every_path(admits, budgets) -> None:
    """Two paths that an adaptive client may take after the same start: one order's budget must hold on both."""
    rare, plain = Release(0.01, 0.8, 1), Release(0.5, 30.0, 50)
    paths = [walk(admits, [release] * 1000) for release in (rare, plain)]
    if not all(paths):
        pytest.fail("a path is empty")
    worst = np.max([divergences(path) for path in paths], axis=0)
    assert (worst <= budgets + 1e-9).any()


def test_filter_bounds_one_order_whatever_is_chosen():
    guard = RenyiFilter(DELTA, 4.0)
    check_some_order_holds_on_every_path(guard.admits, 4.0 - rdp.conversion(DELTA))


def test_best_order_afterwards_attack():
    """Admitting while any order has budget left: which order that is depends on what the outputs made one choose."""
    budgets = 4.0 - rdp.conversion(DELTA)

    def any_order(so_far, coming):
        return bool((divergences([*so_far, coming]) <= budgets).any())

    with pytest.raises(AssertionError):
        check_some_order_holds_on_every_path(any_order, budgets)


def test_filter_stops_at_the_cap_and_its_paths_cost_less_than_the_cap():
    rng, guard = random.Random(3), RenyiFilter(DELTA, 3.0)
    done = walk(guard.admits, (Release(rng.choice([0.02, 0.1, 0.3]), rng.choice([1.0, 3.0]), rng.choice([1, 5]),
                                       rng.choice([1, 2])) for _ in range(120)))
    assert 5 < len(done) < 120 and guard.spent(done) <= guard.budget
    assert accountant.epsilon(done, DELTA, interval=1e-3) < 3.0
    assert not guard.admits(done, Release(1.0, 0.5, 1)) and not guard.admits([], Release(0.5, 0.0, 1))
    assert guard.admits([], Release(0.5, 5.0, 0))


def test_a_plan_chooses_the_order_before_and_admits_what_renyi_accounting_would():
    schedule = Release(0.01, 0.6, 100)
    cap = epsilon([schedule], DELTA) * 1.0001
    planned, blind = RenyiFilter(DELTA, cap, (schedule,)), RenyiFilter(DELTA, cap)
    one = Release(0.01, 0.6, 1)
    assert len(walk(planned.admits, [one] * 120)) == 100 > len(walk(blind.admits, [one] * 120)) > 0
    assert planned == RenyiFilter(DELTA, cap, (schedule,)) and planned.order == RenyiFilter(DELTA, cap, (one,)).order
    assert planned.budget == pytest.approx(cap - rdp.conversion(DELTA)[np.searchsorted(ORDERS, planned.order)])


@pytest.mark.parametrize(("arguments", "code"), [
    ((DELTA, 0.0), "dp.parameter"), ((DELTA, math.nan), "dp.parameter"), ((0.0, 1.0), "dp.parameter"),
    ((1e-300, 1.0), "dp.unreachable"), ((DELTA, 8.0, (Release(0.5, 1.0, 1, 100),)), "dp.unsupported")])
def test_filters_that_cannot_be(arguments, code):
    with pytest.raises(UsageError) as caught:
        RenyiFilter(*arguments)
    assert caught.value.code == code


# Planted bugs ---------------------------------------------------------------------------------------------------------

def test_planted_flat_cells_are_caught(monkeypatch):
    """Without the cells' slopes the loss is taken at a cell's lower end: a figure from below."""
    honest = rdp._integral
    monkeypatch.setattr(rdp, "_integral", lambda edges, height, slope, sigma: honest(edges, height, slope * 0.9, sigma))
    with pytest.raises(AssertionError):
        check_brute()


def test_planted_group_as_one_item_is_caught(monkeypatch):
    honest = rdp._one
    monkeypatch.setattr(rdp, "_one", lambda q, sigma, group: honest(q, sigma, 1))
    with pytest.raises(AssertionError):
        check_brute()
    monkeypatch.setattr(rdp, "_one", honest)
