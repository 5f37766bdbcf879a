"""The audit's statistics: against brute force, and on synthetic Gaussian mechanisms. Fixed seeds; alpha is stated."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import linprog

from privacy import audit
from privacy.accountant import Release, epsilon
from privacy.errors import UsageError
from privacy.mechanism import DpMechanism

ALPHA, DELTA = 0.05, 1e-5
Scores = NDArray[np.float64]


def mechanism(**changes: Any) -> DpMechanism:
    base: dict[str, Any] = {"trust": "local", "unit": "record", "adjacency": "add_remove", "sampler": "poisson", "q": 0.5,
                            "clip": 1.0, "sigma": 1.583, "steps": 1, "delta": DELTA, "n_decl": 100}
    return DpMechanism(**(base | changes))


def run(seed: int, m: int, steps: int, *, noise: float = 1.0, clip: float = 1.0, q: float = 0.5,
        sigma: float = 1.583) -> tuple[Scores, NDArray[np.bool_]]:
    """A synthetic mechanism, with bugs: noise and clip are factors on what is claimed."""
    rng = np.random.default_rng(seed)
    included = rng.random(m) < 0.5
    return rng.normal(0, noise * sigma, (steps, m)) + clip * included * (rng.random((steps, m)) < q), included


def most(alpha: float, trials: int) -> int:
    """Rejections that a valid test exceeds in one of 10,000 test suites."""
    return int(stats.binom.ppf(1 - 1e-4, trials, alpha))


# Against brute force


@pytest.mark.parametrize(("m", "guesses", "correct", "eps", "delta"), [
    (100, 100, 75, math.log(3), 0.0), (1000, 100, 75, 0.7, 1e-4), (50, 20, 20, 2.0, 1e-3), (10, 10, 0, 1.0, 1e-2)])
def test_one_run_is_the_papers_appendix_d(m: int, guesses: int, correct: int, eps: float, delta: float) -> None:
    rate, worst, total = 1 / (1 + math.exp(-eps)), 0.0, 0.0
    for i in range(1, correct + 1):
        total += stats.binom.pmf(correct - i, guesses, rate)
        worst = max(worst, total / i)
    want = min(1.0, stats.binom.sf(correct - 1, guesses, rate) + worst * delta * 2 * m)
    assert audit.one_run_p(m, guesses, correct, eps, delta) == pytest.approx(want, rel=1e-9)


def test_one_run_known_answers() -> None:
    assert audit.one_run_p(1, 1, 1, 1.0, 0.0) == pytest.approx(math.e / (1 + math.e))  # randomised response reaches it
    assert audit.one_run_p(100, 100, 75, math.log(3), 0.0) == pytest.approx(0.5535, abs=1e-4)
    assert audit.one_run_epsilon(100, 100, 100, delta=0.0, alpha=0.05) == pytest.approx(
        math.log(0.05**0.01 / (1 - 0.05**0.01)), abs=1e-6)  # rate^100 = alpha
    assert audit.one_run_epsilon(100, 100, 50, delta=0.0, alpha=0.05) == 0.0


@pytest.mark.parametrize("mu", [0.2, 1.0, 3.0])
def test_f_dp_of_one_canary_is_the_best_test_between_two_gaussians(mu: float) -> None:
    assert audit.f_dp_p(1, 1, 1, audit.gaussian_curve(mu)) == pytest.approx(stats.norm.cdf(mu / 2), rel=3e-3)


@pytest.mark.parametrize(("m", "guesses", "correct"), [(6, 6, 5), (6, 6, 6), (12, 12, 9), (12, 6, 6), (30, 20, 17)])
@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_f_dp_is_the_linear_program_over_all_distributions_of_the_count(m: int, guesses: int, correct: int,
                                                                        mu: float) -> None:
    """Maximise P(count >= correct) under r_{i+1} <= 1 - f(h_i) for every i, with f as a maximum of 200 lines."""
    x = np.concatenate([np.linspace(1e-6, 1 - 1e-6, 400), 10.0 ** np.linspace(-12, -3, 60)])
    slope = np.exp(-mu**2 / 2 - mu * stats.norm.ppf(x))  # tangents of 1 - f(x) = Phi(Phi^-1(x) + mu)
    offset = stats.norm.cdf(stats.norm.ppf(x) + mu) - slope * x
    j = np.arange(guesses + 1)
    rows = [(j > i) * j / m - s * (j >= i) * (guesses - j) / m for i in range(guesses) for s in slope]
    found = linprog(-(j >= correct).astype(float), A_ub=np.array(rows), b_ub=np.tile(offset, guesses),
                    A_eq=np.ones((1, guesses + 1)), b_eq=[1.0])
    assert audit.f_dp_p(m, guesses, correct, audit.gaussian_curve(mu)) == pytest.approx(-found.fun, rel=0.01)


def test_claimed_curve_is_the_gaussians_without_sampling_and_never_above_it() -> None:
    curve, exact = audit.claimed_curve(Release(1.0, 2.0, 4)), audit.gaussian_curve(1.0)
    for y in np.linspace(0.01, 0.999, 200):
        assert curve(y) <= exact(y) + 1e-9
        assert curve(y) == pytest.approx(exact(y), abs=2e-3)


def test_epsilon_of_a_gaussian_is_the_accountants() -> None:
    for sigma in (0.5, 1.0, 3.0):
        assert audit.gdp_epsilon(1 / sigma, DELTA) == pytest.approx(epsilon([Release(1.0, sigma, 1)], DELTA), abs=2e-3)
    assert audit.gdp_epsilon(0.0, DELTA) == 0.0


def test_gaussian_estimate_of_a_large_sample() -> None:
    rng = np.random.default_rng(0)
    found = audit.gaussian_epsilon(rng.normal(1, 1, 10**6), rng.normal(0, 1, 10**6), DELTA)
    assert found == pytest.approx(audit.gdp_epsilon(1.0, DELTA), rel=0.02)


# Validity and power on synthetic mechanisms


@pytest.mark.parametrize("mu", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("bound", ["one_run", "f_dp"])
def test_bounds_exceed_the_true_epsilon_at_most_alpha_of_the_time(mu: float, bound: str) -> None:
    """2000 runs of N(mu b, 1) on 200 canaries, where the attacker's guesses are the best there are."""
    @cache
    def lower(guesses: int, correct: int) -> float:
        if bound == "one_run":
            return audit.one_run_epsilon(200, guesses, correct, delta=DELTA, alpha=ALPHA)
        return audit.gdp_epsilon(audit.f_dp_mu(200, guesses, correct, alpha=ALPHA), DELTA)

    found = [lower(*audit.count_correct(scores[0], included))
             for scores, included in (run(seed, 200, 1, sigma=1.0, clip=mu, q=1.0) for seed in range(2000))]
    assert sum(f > audit.gdp_epsilon(mu, DELTA) for f in found) <= most(ALPHA, 2000)
    assert np.median(found) > (0.1 if bound == "one_run" else 0.5) * (mu > 1)  # and they aren't empty


def test_deciding_tests_reject_the_honest_at_most_at_their_level() -> None:
    honest = mechanism()
    runs = [run(seed, 64, 8) for seed in range(2000)]
    for p in ([audit.noise_p(z[:, ~b], honest) for z, b in runs], [audit.sensitivity_p(z[:, b], honest) for z, b in runs]):
        for level in (0.05, 0.01):
            assert sum(np.array(p) <= level) <= most(level, len(p))
        assert sum(np.array(p) <= 0.05) >= 50  # neither is so timid that it couldn't fail


def test_other_records_that_answer_to_the_noise_raise_no_alarm() -> None:
    """Training pulls back what noise did to a coordinate: totals then vary less than the noise, single steps don't."""
    honest, alarms, totals = mechanism(), 0, 0
    for seed in range(500):
        (scores, included), rng = run(seed, 64, 20), np.random.default_rng(seed)
        signs, place = rng.choice([-1.0, 1.0], scores.shape), np.zeros(64)
        raw = scores * signs
        for t in range(20):
            raw[t] -= 0.5 * place
            place = place + raw[t]
        z = raw * signs
        alarms += min(audit.noise_p(z[:, ~included], honest), audit.sensitivity_p(z[:, included], honest)) <= ALPHA / 2
        totals += audit.noise_p(raw.sum(axis=0)[None, ~included] / math.sqrt(20), honest) <= ALPHA / 2
    assert alarms <= most(ALPHA, 500)
    assert totals > 400


def test_other_records_that_move_canaries_much_raise_no_alarm() -> None:
    """Symmetric, ten times the noise, and of one size for all canaries of a step."""
    honest, alarms = mechanism(), 0
    for seed in range(1000):
        (scores, included), rng = run(seed, 64, 20), np.random.default_rng(seed)
        z = scores + rng.choice([-1.0, 1.0], scores.shape) * rng.normal(0, 16, (20, 1))
        alarms += min(audit.noise_p(z[:, ~included], honest), audit.sensitivity_p(z[:, included], honest)) <= ALPHA / 2
    assert alarms <= most(ALPHA, 1000)


@pytest.mark.parametrize("bug", [{"noise": 0.25}, {"clip": 4.0}, {"noise": 0.8}, {"q": 1.0}, {}])
def test_verdict(bug: dict[str, float]) -> None:
    found = [audit.judge(*run(seed, 200, 20, **bug), mechanism(), alpha=0.01).violation for seed in range(20)]
    assert all(found) if bug else not any(found)


def test_person_with_several_records_may_add_each_of_them() -> None:
    grouped = mechanism(unit="person", sampled="record", group=3, sigma=5.0)
    rng = np.random.default_rng(0)
    included = rng.random(200) < 0.5
    scores = rng.normal(0, 5.0, (20, 200)) + included * rng.binomial(3, 0.5, (20, 200))
    assert audit.judge(scores, included, grouped, alpha=0.01).violation is False
    assert audit.judge(scores, included, mechanism(sigma=5.0), alpha=0.01).violation is True


# The document


def test_document_rounds_bounds_down_and_claims_up_and_assures_nothing() -> None:
    found = audit.judge(*run(0, 200, 20), mechanism(), alpha=0.05)
    document = found.as_dict()
    assert document["format"] == "consilo.audit/1"
    assert (document["verdict"], document["confidence"]) == ("consistent", "0.95")
    assert document["statement"].startswith("A lower bound, not an assurance")
    assert document["claimed"] == {"epsilon": "7.7888", "delta": "1e-05", "sigma": "1.583", "clip": "1.0", "q": "0.5",
                                   "steps": 20}
    assert float(document["claimed"]["epsilon"]) >= found.claimed
    assert 0 < float(document["lower_bound"]["f_dp"]) <= found.f_dp
    assert float(document["lower_bound"]["one_run"]) <= found.one_run
    assert audit.decimal_down(1.23459) == "1.2345"


@pytest.mark.parametrize("case", ["few", "shape", "one side", "nan", "alpha"])
def test_scores_that_do_not_fit(case: str) -> None:
    scores, included = run(0, 31 if case == "few" else 64, 4)
    if case == "shape":
        included = included[1:]
    if case == "one side":
        included = np.ones(64, bool)
    if case == "nan":
        scores[0, 0] = np.nan
    with pytest.raises(UsageError) as caught:
        audit.judge(scores, included, mechanism(), alpha=1.0 if case == "alpha" else ALPHA)
    assert caught.value.code == "dp.parameter"
