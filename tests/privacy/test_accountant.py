"""The project's accountant against goldens, closed forms and dp-accounting; bugs are planted to see them caught."""

import math
import random
import time
from decimal import Decimal

import pytest
from dp_accounting.pld import privacy_loss_distribution as dpa
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from privacy import accountant, crosscheck, pld
from privacy.accountant import Release, decimal_up, delta_at, epsilon, round_up
from privacy.errors import CheckFailed, UsageError

GOLDENS = [  # q, sigma, steps -> epsilon at delta 1e-5
    (0.01, 0.6, 100, 3.8156), (0.01, 1.0, 1000, 1.8282), (0.01, 2.0, 5000, 1.4774),
    (0.1, 1.0, 100, 7.0466), (0.1, 2.0, 1000, 8.2793)]
DELTA = 1e-5
COARSE = 1e-3


@pytest.fixture(autouse=True)
def _fresh_cache():
    accountant._epsilon.cache_clear()
    yield
    pld._steps.cache_clear()
    accountant._epsilon.cache_clear()


def exact_delta(q: float, sigma: float, eps: float) -> float:
    """Hockey stick of one step, both directions, in closed form: the loss is monotone in x."""

    def sf(x: float, mean: float) -> float:
        return float(ndtr((mean - x) / sigma))

    def x_at(loss: float) -> float:
        inside = math.expm1(loss) / q + 1
        return -math.inf if inside <= 0 else sigma**2 * math.log(inside) + 0.5

    up, down = x_at(eps), x_at(-eps)
    remove = (1 - q) * sf(up, 0) + q * sf(up, 1) - math.exp(eps) * sf(up, 0)
    mixture_below = 0.0 if down == -math.inf else (1 - q) * (1 - sf(down, 0)) + q * (1 - sf(down, 1))
    add = (0.0 if down == -math.inf else 1 - sf(down, 0)) - math.exp(eps) * mixture_below
    return max(remove, add)


def check_goldens() -> None:
    for q, sigma, steps, want in GOLDENS:
        got = epsilon([Release(q, sigma, steps)], DELTA)
        assert abs(got - want) < 1e-3, (q, sigma, steps, got)


def check_never_below_exact() -> None:
    for q, sigma, eps in [(0.5, 1.6, 0.3), (0.1, 0.7, 1.0), (0.9, 2.0, 0.01), (0.01, 1.0, 0.005), (1.0, 1.0, 1.0)]:
        got, exact = delta_at([Release(q, sigma, 1)], eps), exact_delta(q, sigma, eps)
        assert exact * (1 - 1e-12) <= got <= exact * (1 + 1e-4) + 1e-10, (q, sigma, eps, got, exact)


def test_goldens_of_the_own_accountant():
    check_goldens()


def test_goldens_of_dp_accounting():
    for q, sigma, steps, want in GOLDENS:
        assert abs(crosscheck.pld([Release(q, sigma, steps)], DELTA) - want) < 1e-3


def test_rdp_and_prv_cross_checks_bracket_the_golden():
    releases = [Release(0.01, 1.0, 1000)]
    assert abs(crosscheck.rdp(releases, DELTA) - 2.10) < 0.01
    assert abs(crosscheck.prv(releases, DELTA) - 1.8282) < 2e-3
    with pytest.raises(CheckFailed, match=r"dp\.cross_check"):
        crosscheck.prv([Release(0.5, 1e-3, 5)], DELTA)  # would ask for 300 GB


def test_one_step_is_never_below_the_closed_form():
    check_never_below_exact()


@pytest.mark.parametrize("eps", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 10, 1000, 100_000])
def test_composed_gaussian_is_never_below_the_closed_form(steps, eps):
    sigma = 2.0 * math.sqrt(steps)  # q = 1: `steps` of them are one Gaussian with sigma 2
    exact = float(ndtr(1 / 4 - 2 * eps) - math.exp(eps) * ndtr(-1 / 4 - 2 * eps))  # 0.06, 0.007, 1e-10
    got = delta_at([Release(1.0, sigma, steps)], eps)
    # The grid adds at most h^2 / 4 of variance a step, the FFT is charged some 1e-14 a step.
    assert exact <= got <= exact * (1 + 3e-8 * steps + 1e-6) + 1e-10 + 1e-13 * steps


def test_random_parameters_agree_with_dp_accounting_and_never_beat_its_optimistic_estimate():
    rng = random.Random(20240607)
    for _ in range(10):
        q, sigma = rng.choice([1.0, 0.5, 10 ** rng.uniform(-3, -0.3)]), rng.uniform(0.7, 4)
        steps = rng.choice([1, 3, 22, 200])
        delta = 10 ** rng.uniform(-9, -3)
        own = epsilon([Release(q, sigma, steps)], delta)
        theirs, optimistic = (dpa.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=1e-4, pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic).self_compose(steps).get_epsilon_for_delta(delta)
            for pessimistic in (True, False))
        assert abs(own - theirs) < 2e-3, (q, sigma, steps, delta, own, theirs)
        assert own >= optimistic, (q, sigma, steps, delta, own, optimistic)


def test_classes_compose_as_in_dp_accounting():
    releases = [Release(0.5, 2.0, 5), Release(0.1, 1.0, 10), Release(1.0, 8.0, 3)]
    assert abs(epsilon(releases, DELTA) - crosscheck.pld(releases, DELTA)) < 1e-3


def test_order_and_splitting_of_releases_do_not_matter():
    parts = [Release(0.5, 1.6, 7), Release(0.1, 1.0, 4), Release(0.5, 1.6, 15)]
    merged = [Release(0.1, 1.0, 4), Release(0.5, 1.6, 22)]
    assert epsilon(parts, DELTA) == epsilon(merged, DELTA) == epsilon(iter(merged[::-1]), DELTA)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(q=st.floats(1e-3, 0.9), sigma=st.floats(0.6, 6), steps=st.integers(1, 300))
def test_more_sampling_steps_or_less_noise_costs_more(q, sigma, steps):
    def at(q: float, sigma: float, steps: int) -> float:
        return epsilon([Release(q, sigma, steps)], DELTA, interval=COARSE)

    base = at(q, sigma, steps)
    slack = 1e-4 + 1e-3 * base  # of the coarse grid
    assert at(min(1.0, q * 1.1), sigma, steps) >= base - slack
    assert at(q, sigma * 1.1, steps) <= base + slack
    assert at(q, sigma, steps + 10) >= base - slack


@settings(max_examples=20, deadline=None, derandomize=True)
@given(q=st.floats(1e-2, 1), sigma=st.floats(0.6, 6), steps=st.integers(1, 100), power=st.floats(-8, -2))
def test_epsilon_and_delta_invert_each_other(q, sigma, steps, power):
    delta, release = 10**power, [Release(q, sigma, steps)]
    eps = epsilon(release, delta, interval=COARSE)
    at = delta_at(release, eps, interval=COARSE)
    assert at <= delta * (1 + 1e-6) and (eps == 0 or at >= delta * (1 - 1e-6))


def test_a_coarser_interval_is_an_upper_bound():
    for q, sigma, steps, _ in GOLDENS:
        assert epsilon([Release(q, sigma, steps)], DELTA, interval=COARSE) >= epsilon(
            [Release(q, sigma, steps)], DELTA) - 1e-6


def test_limits():
    assert epsilon([], DELTA) == epsilon([Release(0.5, 1.0, 0)], DELTA) == 0.0
    assert epsilon([Release(0.5, 0.0, 1)], DELTA) == math.inf == epsilon([Release(1.0, 1e-300, 1)], DELTA)
    assert epsilon([Release(0.5, 1.0, 10)], 1e-300) == math.inf  # beyond double precision: said, not guessed
    assert epsilon([Release(1e-300, 1.0, 10)], DELTA) == 0.0
    assert delta_at([], 1.0) == 0.0 and delta_at([Release(0.5, 0.0, 1)], 1.0) == 1.0
    full = epsilon([Release(1.0, 1.0, 5)], DELTA)
    assert abs(epsilon([Release(1 - 1e-12, 1.0, 5)], DELTA) - full) < 1e-6  # no seam at q = 1


@pytest.mark.parametrize("arguments", [
    (0.0, 1.0, 1), (1.01, 1.0, 1), (math.nan, 1.0, 1), (0.5, math.nan, 1), (0.5, 1.0, -1), (0.5, 1.0, 1.5),
    (0.5, 1.0, 10**9)])
def test_refuses_parameters_that_cannot_be(arguments):
    with pytest.raises(UsageError, match=r"dp\.parameter"):
        Release(*arguments)


def test_refuses_delta_outside_and_too_many_classes():
    for delta in (0.0, 1.0, -1e-5, math.nan):
        with pytest.raises(UsageError, match=r"dp\.parameter"):
            epsilon([Release(0.5, 1.0, 1)], delta)
    with pytest.raises(UsageError, match=r"dp\.parameter"):
        delta_at([], math.nan)
    with pytest.raises(UsageError, match=r"dp\.too_many_classes"):
        epsilon([Release(0.5, 1.0 + i, 1) for i in range(17)], DELTA)


@given(st.floats(0, 1e4))
def test_printed_epsilon_is_rounded_up(eps):
    printed = Decimal(decimal_up(eps))
    assert 0 <= printed - Decimal(eps) <= Decimal("0.0001") and round_up(eps) == float(printed)


def test_printing_limits():
    assert decimal_up(8.0) == "8.0000" and decimal_up(math.inf) == "inf" and round_up(1.23001, 2) == 1.24


def test_cost_of_an_evaluation():
    """Targets: 50 ms warm, 10 s for 10,000 steps in 16 classes. CPU time, and loose: the machine is shared."""
    epsilon([Release(0.5, 1.6, 1)], DELTA)
    start = time.process_time()
    for steps in range(10, 20):
        epsilon([Release(0.5, 1.6, steps)], DELTA)
    assert time.process_time() - start < 1.5
    start = time.process_time()
    epsilon([Release(0.01 + 0.001 * i, 1 + 0.1 * i, 625) for i in range(16)], DELTA)
    assert time.process_time() - start < 10


# Planted bugs ---------------------------------------------------------------------------------------------------------

def test_planted_rounding_down_is_caught(monkeypatch):
    """All mass at the lower end of its cell: epsilon would be an estimate from below."""
    honest = pld._connect

    def low(first, p, q, p_tail, q_tail, below, above, h):
        step = honest(first, p, q, p_tail, q_tail, below, above, h)
        step.pmf[:-1], step.pmf[-1] = p, 0
        step.pmf[0] += below
        return step

    monkeypatch.setattr(pld, "_connect", low)
    pld._steps.cache_clear()
    with pytest.raises(AssertionError):
        check_never_below_exact()


def test_planted_single_direction_is_caught(monkeypatch):
    """Only 'a unit is added': the bound is too low for the unit that leaves."""
    both = accountant.compose
    monkeypatch.setattr(accountant, "compose", lambda classes, interval: both(classes, interval)[1:])
    with pytest.raises(AssertionError):
        check_goldens()


def test_planted_wrapped_tail_is_caught(monkeypatch):
    """A window half as wide wraps the right tail to small losses without charging for it."""
    window = pld._window

    def narrow(steps, counts, h):
        first, last = window(steps, counts, h)
        return first, first + (last - first) // 2

    monkeypatch.setattr(pld, "_window", narrow)
    with pytest.raises(AssertionError):
        check_goldens()
