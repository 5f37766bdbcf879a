"""Units that own several sampled items: the tight mixture against dp-accounting, closed forms and naive group privacy."""

import math
import random

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as dpa
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import binom

from privacy import accountant, crosscheck, mixture, pld
from privacy.accountant import Release, delta_at, epsilon
from privacy.errors import CheckFailed, UsageError

DELTA = 1e-5
COARSE = 1e-3


@pytest.fixture(autouse=True)
def _fresh_cache():
    def clear():
        for cached in (mixture.mixture, pld._steps, accountant._epsilon):
            cached.cache_clear()

    clear()
    yield clear
    clear()


def exact_delta(q: float, sigma: float, group: int, eps: float) -> float:
    """Hockey stick of one step by brute force: integrate (P - e^eps Q)+ in each direction on a fine grid of x."""
    x = np.linspace(-30 * sigma, group + 30 * sigma, 100_001)
    density = [np.exp(-((x - i) / sigma) ** 2 / 2) / sigma / math.sqrt(2 * math.pi) for i in range(group + 1)]
    mix = sum(w * d for w, d in zip(binom.pmf(range(group + 1), group, q), density, strict=True))
    width = x[1] - x[0]
    return float(max(np.maximum(mix - math.exp(eps) * density[0], 0).sum(),
                     np.maximum(density[0] - math.exp(eps) * mix, 0).sum()) * width)


def check_one_step() -> None:
    for q, sigma, group, eps in [(0.5, 3.0, 4, 0.5), (0.1, 1.0, 3, 1.0), (0.9, 8.0, 5, 0.2), (0.01, 0.7, 8, 0.5)]:
        got = delta_at([Release(q, sigma, 1, group)], eps, interval=COARSE)
        exact = exact_delta(q, sigma, group, eps)
        assert exact * (1 - 1e-6) <= got <= exact * (1 + 1e-3) + 1e-8, (q, sigma, group, got, exact)


def test_one_step_is_never_below_brute_force():
    check_one_step()


@pytest.mark.parametrize(("q", "sigma", "steps", "group"), [(0.5, 6.0, 20, 3), (0.1, 3.0, 50, 4), (0.02, 4.0, 300, 16)])
def test_groups_agree_with_dp_accounting(q, sigma, steps, group):
    items = range(group + 1)
    theirs = dpa.from_mixture_gaussian_mechanism(
        sigma, items, binom.pmf(items, group, q), value_discretization_interval=1e-3)
    own = epsilon([Release(q, sigma, steps, group)], DELTA)
    assert abs(own - theirs.self_compose(steps).get_epsilon_for_delta(DELTA)) < 2e-3


def test_the_cross_check_knows_groups_and_the_others_refuse_them():
    releases = [Release(0.5, 60.0, 3, 2)]
    assert abs(crosscheck.pld(releases, DELTA) - epsilon(releases, DELTA)) < 2e-3
    for other in (crosscheck.prv, crosscheck.rdp):
        with pytest.raises(CheckFailed, match=r"dp\.cross_check"):
            other(releases, DELTA)


@pytest.mark.parametrize("group", [2, 7, 1000])
def test_without_sampling_a_group_is_a_gaussian_of_that_sensitivity(group):
    """Exactly, and without a seam: the mixture just below q = 1 comes to the same."""
    full = epsilon([Release(1.0, 4.0 * group, 5, group)], DELTA)
    assert full == epsilon([Release(1.0, 4.0, 5)], DELTA)
    assert abs(epsilon([Release(1 - 1e-12, 4.0 * group, 5, group)], DELTA) - full) < 1e-5


def test_a_group_of_one_is_a_record():
    assert epsilon([Release(0.01, 1.0, 100, 1)], DELTA) == epsilon([Release(0.01, 1.0, 100)], DELTA)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(q=st.floats(1e-3, 0.95), sigma=st.floats(1, 20), steps=st.integers(1, 50), group=st.integers(1, 12))
def test_a_larger_group_costs_more_and_less_than_naive(q, sigma, steps, group):
    def at(sigma, group):
        return epsilon([Release(q, sigma, steps, group)], DELTA, interval=COARSE)

    base = at(sigma, group)
    slack = 1e-4 + 1e-3 * base
    assert at(sigma, group + 1) >= base - slack
    # Whoever owns k items is never better off than a k times larger vector sampled as one, with the chance that any is.
    bound = epsilon([Release(min(1.0, q * group), sigma / group, steps)], DELTA, interval=COARSE)
    assert base <= bound + slack


def test_naive_group_privacy_is_far_looser():
    """k records as k neighbours in a row: (k e, (e^(k e) - 1) / (e^e - 1) d). 182 where the mixture tells 21."""
    step, group = [Release(0.01, 1.0, 1000)], 8

    def holds(eps: float) -> bool:
        return delta_at(step, eps) * sum(math.exp(i * eps) for i in range(group)) <= DELTA

    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    tight = epsilon([Release(0.01, 1.0, 1000, group)], DELTA)
    assert abs(epsilon(step, DELTA) - 1.8282) < 1e-3
    assert abs(tight - 20.8953) < 1e-3  # dp-accounting: 20.89530
    assert group * high > 8 * tight, (group * high, tight)


def test_records_and_groups_compose_in_one_lineage():
    parts = [Release(0.1, 3.0, 10, 4), Release(0.5, 8.0, 3), Release(0.1, 3.0, 5, 2)]
    total = epsilon(parts, DELTA)
    assert total == epsilon([parts[1], parts[2], Release(0.1, 3.0, 4, 4), Release(0.1, 3.0, 6, 4)], DELTA)
    assert max(epsilon([p], DELTA) for p in parts) < total < sum(epsilon([p], DELTA) for p in parts)
    with pytest.raises(UsageError, match=r"dp\.too_many_classes"):
        epsilon([Release(0.1, 3.0, 1, k) for k in range(1, 18)], DELTA)


@pytest.mark.parametrize("group", [0, -1, 1001, 1.5])
def test_refuses_groups_that_cannot_be(group):
    with pytest.raises(UsageError, match=r"dp\.parameter"):
        Release(0.5, 1.0, 1, group)


def test_inverted_losses_are_where_they_should_be():
    rng = random.Random(7)
    for _ in range(30):
        q, sigma, group = rng.choice([10 ** rng.uniform(-6, -0.01), 0.5]), 10 ** rng.uniform(-1, 2), rng.randint(2, 40)
        pair = mixture.mixture(q, sigma, group)
        if pair.sharp:
            continue
        low, high = pair.loss(-mixture.CUT * sigma), pair.loss(pair.reach)
        losses = np.linspace(low, high, 999)[1:-1]
        x = pair.edges(losses)
        assert (np.diff(x) >= 0).all() and max(abs(pair.loss(float(x[i])) - losses[i]) for i in range(0, 997, 83)) < 1e-9


def test_limits_of_groups():
    assert epsilon([Release(1e-300, 1.0, 10, 16)], DELTA) == 0.0
    assert epsilon([Release(0.5, 0.01, 1, 2)], DELTA) == math.inf  # no noise to speak of
    assert epsilon([Release(0.5, 0.05, 1, 1000)], DELTA) == math.inf  # too sharp for doubles
    assert 0 < epsilon([Release(0.5, 1e9, 10, 1000)], DELTA) < 1e-2


def gdp_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """The central limit's answer: mu = q sqrt(T (exp(1 / sigma^2) - 1)), as if composed losses were Gaussian."""
    mu = q * math.sqrt(steps * math.expm1(1 / sigma**2))
    low, high = 0.0, 100.0
    for _ in range(60):
        eps = (low + high) / 2
        held = ndtr(-eps / mu + mu / 2) - math.exp(eps) * ndtr(-eps / mu - mu / 2) <= delta
        low, high = (low, eps) if held else (eps, high)
    return high


def test_gdp_reports_too_little_and_nothing_here_offers_it():
    """Against a lower bound of epsilon: dp-accounting's optimistic estimate."""
    q, sigma, steps = 0.01, 0.6, 10
    lower = dpa.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=1e-3,
                                        pessimistic_estimate=False, use_connect_dots=False).self_compose(steps)
    assert gdp_epsilon(q, sigma, steps, DELTA) < lower.get_epsilon_for_delta(DELTA) / 2
    offered = [name.lower() for module in (accountant, crosscheck, pld) for name in dir(module)]
    assert not [name for name in offered if "gdp" in name or "clt" in name or "replace" in name]


# Planted bugs ---------------------------------------------------------------------------------------------------------

def test_planted_record_level_figure_for_a_person_is_caught(_fresh_cache, monkeypatch):
    """Group read as one: what a person-level report would claim if k_max were lost on the way."""
    honest = mixture.mixture
    monkeypatch.setattr(pld, "mixture", lambda q, sigma, group: honest(q, sigma, 1))
    with pytest.raises(AssertionError):
        check_one_step()


def test_planted_loss_of_the_top_count_is_caught(_fresh_cache, monkeypatch):
    """The rare event that all of a person's records are sampled, dropped without being counted as lost."""
    honest = mixture._binomial

    def cut(q, n, rare):
        weights, logs, lost = honest(q, n, rare)
        return weights[:-1], logs[:-1], lost

    monkeypatch.setattr(mixture, "_binomial", cut)
    with pytest.raises(AssertionError):
        check_one_step()


def test_planted_edges_off_by_a_cell_are_caught(_fresh_cache, monkeypatch):
    honest = mixture.Mixture.edges
    monkeypatch.setattr(mixture.Mixture, "edges", lambda self, losses: honest(self, losses + COARSE))
    with pytest.raises(AssertionError):
        check_one_step()
