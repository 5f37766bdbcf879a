"""Empirical lower bounds on epsilon from one run with canaries, and whether the claimed mechanism can have done it.

A canary is a record that was included or not by a fair coin and has a score, which is larger where it was included. A
bound holds with its confidence whatever the other records are; it says what leaked to this attack, never that no more did.

one_run  Steinke, Nasr, Jagielski (arXiv 2305.08846): any (epsilon, delta) mechanism.
f_dp     Mahloujifar, Melis, Chaudhuri (arXiv 2410.22235): a whole trade-off curve, so fewer canaries say more.
gaussian Andrew et al. (arXiv 2302.03098): fits a Gaussian to each side; an estimate without a confidence.

Three tests of the claimed mechanism decide, each at a third of alpha (Bonferroni):

noise        excluded canaries' scores vary less than the claimed noise alone would make them; chi-square, exact.
sensitivity  an included canary adds more to a step than q * clip; normal, from all included canaries and steps.
f_dp         more correct guesses than the claimed mechanism's trade-off curve allows.

The bounds alone are too weak to decide at a few hundred canaries: to refute epsilon = 8 at 95 %, one_run wants some 9000
guesses without a mistake, and f_dp allows that rarely, by chance, much leaks at once (noise / 4 gives p = 0.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from privacy.accountant import Release, decimal_up, delta_at, epsilon
from privacy.calibration import finite
from privacy.canonical import decimal
from privacy.errors import UsageError
from privacy.mechanism import DpMechanism

FORMAT = "consilo.audit/1"
STATEMENT = ("A lower bound, not an assurance: a violation refutes the claimed mechanism at the stated confidence; "
             "consistent says only that this attack found no more leakage than was claimed.")
MIN_CANARIES = 32  # so that both sides of the coins have some
LINES = 65  # of the claimed trade-off curve; between them it is counted lower than it is
MAX_MU = 40.0
Inverse = Callable[[float], float]  # y -> least x with 1 - f(x) >= y, of a trade-off curve f
Scores = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one audited run showed. Epsilons are at the claimed delta; p_*: p-values of the tests that decide."""

    mechanism: DpMechanism
    steps: int
    alpha: float
    canaries: int
    included: int
    guesses: int
    correct: int
    claimed: float
    one_run: float
    f_dp: float
    gaussian: float
    p_f_dp: float
    p_noise: float
    p_sensitivity: float

    @property
    def level(self) -> float:
        """Of each of the three tests."""
        return self.alpha / 3

    @property
    def violation(self) -> bool:
        return min(self.p_f_dp, self.p_noise, self.p_sensitivity) <= self.level

    def as_dict(self) -> dict[str, Any]:
        """The JSON document, without seed. Claimed epsilon is rounded up, lower bounds down, p-values up."""
        m = self.mechanism
        return {"format": FORMAT, "statement": STATEMENT, "verdict": "violation" if self.violation else "consistent",
                "confidence": decimal(round(1 - self.alpha, 12)), "canaries": self.canaries, "included": self.included,
                "guesses": self.guesses, "correct": self.correct,
                "claimed": {"epsilon": decimal_up(self.claimed), "delta": decimal(m.delta), "sigma": decimal(m.sigma),
                            "clip": decimal(m.clip), "q": decimal(m.q), "steps": self.steps},
                "lower_bound": {"one_run": decimal_down(self.one_run), "f_dp": decimal_down(self.f_dp)},
                "estimate": {"gaussian": decimal_down(self.gaussian)},
                "tests": {"level": decimal_down(self.level, 6), "f_dp": decimal_up(self.p_f_dp, 6),
                          "noise": decimal_up(self.p_noise, 6), "sensitivity": decimal_up(self.p_sensitivity, 6)}}


def judge(scores: Scores, included: NDArray[np.bool_], mechanism: DpMechanism, *, alpha: float) -> Finding:
    """scores: float (steps, m), each step's release along each canary's direction, in units of the clip norm. included:
    bool (m,), fair coins.

    The sign of every direction is to be drawn afresh for each step, and a row is to hold one release: what other records
    add is then symmetric about zero and independent of that step's noise, which the tests of noise and sensitivity need.
    Raises UsageError `dp.parameter` (shapes, alpha), `dp.unbounded` (no finite epsilon is claimed).
    """
    steps, m = scores.shape
    sides = included.shape == (m,) and min(included.sum(), m - included.sum()) >= 2
    if not sides or m < MIN_CANARIES or not 0 < alpha < 1 or not np.isfinite(scores).all():
        raise UsageError("dp.parameter", "The scores don't fit an audit.",
                         f"Give finite scores of at least {MIN_CANARIES} canaries, two on each side, and alpha in (0, 1).")
    release = Release(mechanism.q, mechanism.sigma, steps, mechanism.group)
    claimed, delta = finite(epsilon([release], mechanism.delta)), mechanism.delta
    total = scores.sum(axis=0)
    guesses, correct = count_correct(total, included)
    return Finding(mechanism=mechanism, steps=steps, alpha=alpha, canaries=m, included=int(included.sum()),
                   guesses=guesses, correct=correct, claimed=claimed,
                   one_run=one_run_epsilon(m, guesses, correct, delta=delta, alpha=alpha),
                   f_dp=gdp_epsilon(f_dp_mu(m, guesses, correct, alpha=alpha), delta),
                   gaussian=gaussian_epsilon(total[included], total[~included], delta),
                   p_f_dp=f_dp_p(m, guesses, correct, claimed_curve(release)),
                   p_noise=noise_p(scores[:, ~included], mechanism),
                   p_sensitivity=sensitivity_p(scores[:, included], mechanism))


def count_correct(scores: Scores, included: NDArray[np.bool_]) -> tuple[int, int]:
    """(guesses, correct). The upper half of the scores, float (m,), is guessed included, the lower half not."""
    half = len(scores) // 2
    order = np.argsort(scores, kind="stable")
    return 2 * half, int((~included[order[:half]]).sum() + included[order[len(scores) - half:]].sum())


# Steinke et al. ------------------------------------------------------------------------------------------------------

def one_run_p(m: int, guesses: int, correct: int, eps: float, delta: float) -> float:
    """Bound on P(that many correct guesses or more) under (eps, delta)-DP: Theorem 5.2, as in their Appendix D."""
    rate = 1 / (1 + math.exp(-eps))
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))
    worst = float((below / np.arange(1, correct + 1)).max(initial=0.0))
    return min(1.0, float(stats.binom.sf(correct - 1, guesses, rate)) + 2 * m * delta * worst)


def one_run_epsilon(m: int, guesses: int, correct: int, *, delta: float, alpha: float) -> float:
    """Largest epsilon that is refuted at `alpha`; 0.0 if none is. Confidence 1 - alpha."""
    return _largest(lambda eps: one_run_p(m, guesses, correct, eps, delta) <= alpha, 50.0)


# Mahloujifar et al. --------------------------------------------------------------------------------------------------

def f_dp_refuted(m: int, guesses: int, correct: int, curve: Inverse, level: float) -> bool:
    """Would a mechanism with this trade-off curve let an attacker of `guesses` guesses among m canaries have `correct`
    or more of them right with a probability below `level`? Algorithm 3, for two alternatives a canary.

    With p_j the probability of j correct guesses, r_i = sum over j >= i of j/m p_j and h_i = sum over j >= i of
    (guesses - j)/m p_j, their theorem says r_{i+1} <= 1 - f(h_i); all of it together must stay within guesses / m.
    """
    r, h = level * correct / m, level * (guesses - correct) / m
    for i in range(correct - 1, -1, -1):
        if r + h > guesses / m:
            return True
        least = max(h, curve(r))
        r, h = r + i / (guesses - i) * (least - h), least
    return r + h > guesses / m


def f_dp_p(m: int, guesses: int, correct: int, curve: Inverse) -> float:
    """Upper bound of P(that many correct guesses or more) under a trade-off curve, not below 1e-12."""
    if not f_dp_refuted(m, guesses, correct, curve, 1.0):
        return 1.0
    low, high = -12.0, 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if f_dp_refuted(m, guesses, correct, curve, 10.0**middle) else (middle, high)
    return float(10.0**high)


def f_dp_mu(m: int, guesses: int, correct: int, *, alpha: float) -> float:
    """Largest mu whose Gaussian trade-off curve (N(0, 1) against N(mu, 1)) is refuted at `alpha`; 0.0 if none is."""
    return _largest(lambda mu: f_dp_refuted(m, guesses, correct, gaussian_curve(mu), alpha), MAX_MU)


def gaussian_curve(mu: float) -> Inverse:
    return lambda y: float(ndtr(ndtri(y) - mu))


def claimed_curve(release: Release) -> Inverse:
    """From the accountant's delta(eps), an upper bound: f is the maximum of the lines 1 - delta - e^eps x and
    e^-eps (1 - delta - x), so 1 - f is inverted line by line. Raises UsageError `dp.unbounded`."""
    eps = np.linspace(0, 1, LINES)**2 * finite(epsilon([release], 1e-6))
    delta = np.array([delta_at([release], e, interval=1e-3) for e in eps])
    grow, shrink = np.exp(eps), np.exp(-eps)
    return lambda y: max(0.0, float(((y - delta) * shrink).max()), float((1 - delta - (1 - y) * grow).max()))


def gdp_epsilon(mu: float, delta: float) -> float:
    """epsilon at `delta` of N(0, 1) against N(mu, 1) (Dong, Roth, Su, arXiv 1905.02383, Corollary 2.13)."""
    def excess(eps: float) -> float:
        return float(ndtr(mu / 2 - eps / mu) - math.exp(eps + log_ndtr(-mu / 2 - eps / mu)) - delta)

    return 0.0 if mu == 0 or excess(0.0) <= 0 else float(brentq(excess, 0.0, mu * mu / 2 + mu * 40))


# Andrew et al. -------------------------------------------------------------------------------------------------------

def gaussian_epsilon(inside: Scores, outside: Scores, delta: float) -> float:
    """epsilon at `delta` of two Gaussians with the means and deviations of the scores: an estimate, not a bound."""
    (m1, s1), (m0, s0) = ((float(x.mean()), float(x.std(ddof=1))) for x in (inside, outside))
    x = np.linspace(min(m0, m1) - 10 * max(s0, s1), max(m0, m1) + 10 * max(s0, s1), 20_001)
    p, q = stats.norm.logpdf(x, m1, s1), stats.norm.logpdf(x, m0, s0)

    def excess(eps: float) -> float:  # the hockey stick, the worse of both directions
        worst = max(float((np.exp(a) * -np.expm1(np.minimum(eps + b - a, 0))).sum()) for a, b in ((p, q), (q, p)))
        return worst * float(x[1] - x[0]) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, float(np.abs(p - q).max())))


# The mechanism itself ------------------------------------------------------------------------------------------------

def noise_p(excluded: Scores, mechanism: DpMechanism) -> float:
    """P(chi-square at most the scores' sum of squares), small where the noise is too small. excluded: (steps, canaries).

    What other records add, even in answer to earlier steps' noise, makes a score a noncentral Gaussian and the sum
    stochastically larger: the test stays valid.
    """
    squares = float(((excluded / mechanism.sigma)**2).sum())
    return float(stats.chi2.cdf(squares, excluded.size)) if excluded.size else 1.0


def sensitivity_p(included: Scores, mechanism: DpMechanism) -> float:
    """P(normal at least the scores' sum), small where a canary adds more than q * clip to a step. included: (steps,
    canaries). The variance is the observed one, which counts what other records add, or the mechanism's if that is larger.
    """
    if not included.size:
        return 1.0
    mean = mechanism.q * mechanism.group
    least = included.size * (mechanism.sigma**2 + mean * (1 - mechanism.q))
    excess = included - mean
    return float(stats.norm.sf(excess.sum() / math.sqrt(max(float((excess**2).sum()), least))))


def decimal_down(value: float, digits: int = 4) -> str:
    """`value` rounded down, as a decimal string with that many decimals."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))


def _largest(refuted: Callable[[float], bool], limit: float) -> float:
    """Largest value in [0, limit] that is refuted, from below, for a predicate that holds up to some value."""
    low, high = 0.0, limit
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
