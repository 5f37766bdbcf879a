"""The project's own accountant: privacy loss distributions on numpy and scipy alone, so that an auditor can recompute.

It knows one thing, the Poisson-subsampled Gaussian under add/remove adjacency, and refuses what it doesn't know.

Guarantee: the epsilon returned is an upper bound of the true one. The loss is discretised by connecting the dots
(Doroshenko et al., arXiv 2207.04380: each cell's P- and Q-mass are both kept), truncated tails count as infinite loss,
and what the FFT wraps around (Chernoff bound) or rounds is added to delta. Both directions are composed; the larger
epsilon is reported. At the default interval it lies within 1e-3 of dp-accounting's, for delta above about 1e-12 times
the steps; below that, the charge for rounding makes it loose, at last infinite. Parameters must be fixed beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtr

from privacy.errors import UsageError

NAME = "consilo-pld/1"
INTERVAL = 1e-4  # grid of the privacy loss, in nats
MAX_CLASSES = 16  # distinct (q, sigma) of one lineage
MAX_STEPS = 10**7
MIN_SIGMA, MAX_SIGMA = 0.03, 1e6  # below: epsilon is infinite; above: counted as MAX_SIGMA
MAX_LOSS = 500.0  # a single step's loss above it counts as infinite: exp() stays in range
MAX_POINTS = 2**21  # longest grid; the interval is doubled until everything fits
_Z = 10.0  # a step's noise is cut at 10 sigma: 8e-24 of mass
_TAIL = 1e-16  # mass that a composed window may leave out on each side
_ROUND = 2.0**-44  # relative error granted to differences of ndtr
_LAMBDAS = 2.0 ** np.arange(-10, 11)  # of the Chernoff bounds; an octave too coarse widens a window by 6 %

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Release:
    """`steps` releases of a Gaussian with noise multiplier `sigma` (relative to the clip norm) on a Poisson sample
    with probability `q`; a privacy unit owns up to `group` of the sampled items. Raises UsageError `dp.parameter`."""

    q: float
    sigma: float
    steps: int
    group: int = 1

    def __post_init__(self) -> None:
        checks = (("q", self.q, 0 < self.q <= 1, "in (0, 1]"),
                  ("sigma", self.sigma, not math.isnan(self.sigma), "a number"),
                  ("steps", self.steps, isinstance(self.steps, int) and 0 <= self.steps <= MAX_STEPS,
                   f"an integer in [0, {MAX_STEPS}]"))
        for name, value, ok, want in checks:
            if not ok:
                raise UsageError("dp.parameter", f"{name} = {value} is not {want}.", f"Set {name} {want}.")


@dataclass(frozen=True)
class _Loss:
    """A discretised loss: `pmf[i]` is the P-mass at loss (first + i) * interval, `infinity` the mass without bound."""

    first: int
    pmf: Array
    infinity: float


@dataclass(frozen=True)
class _Step(_Loss):
    """One release, with log E exp(+-lambda loss) at each of _LAMBDAS."""

    right: Array
    left: Array


def epsilon(releases: Iterable[Release], delta: float, *, interval: float = INTERVAL) -> float:
    """Upper bound of epsilon at `delta` of all releases composed, in nats; not rounded.

    Empty -> 0.0, sigma < MIN_SIGMA -> inf. A coarser `interval` is faster and still an upper bound.
    Raises UsageError `dp.parameter` (delta outside (0, 1)), `dp.too_many_classes`.
    """
    if not 0 < delta < 1:
        raise UsageError("dp.parameter", f"delta = {delta} is not in (0, 1).", "Set delta in (0, 1).")
    return _epsilon(_classes(releases), delta, interval)


def delta_at(releases: Iterable[Release], epsilon: float, *, interval: float = INTERVAL) -> float:
    """Upper bound of delta at `epsilon` >= 0 (the hockey-stick divergence). Raises as `epsilon` does."""
    if not epsilon >= 0:
        raise UsageError("dp.parameter", f"epsilon = {epsilon} is not >= 0.", "Set epsilon >= 0.")
    classes = _classes(releases)
    if not classes:
        return 0.0
    if any(c.sigma < MIN_SIGMA for c in classes):
        return 1.0
    return max(_hockey_stick(loss, epsilon, h) for loss, h in _both(classes, interval))


def round_up(eps: float, digits: int = 4) -> float:
    """`eps` rounded up at that many decimals (inf stays inf)."""
    return float(decimal_up(eps, digits))


def decimal_up(eps: float, digits: int = 4) -> str:
    """`eps` rounded up, as a decimal string with that many decimals: what is printed and written to a ledger."""
    if math.isinf(eps):
        return "inf"
    return str(Decimal(eps).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))


def _classes(releases: Iterable[Release]) -> tuple[Release, ...]:
    """Merged by (q, sigma), in a canonical order."""
    steps: dict[tuple[float, float], int] = {}
    for r in releases:
        if r.steps:
            key = r.q, min(r.sigma, MAX_SIGMA)
            steps[key] = steps.get(key, 0) + r.steps
    if len(steps) > MAX_CLASSES:
        raise UsageError("dp.too_many_classes", f"{len(steps)} distinct (q, sigma) exceed {MAX_CLASSES}.",
                         "Keep q and sigma fixed over a schedule, or open a new lineage.")
    return tuple(Release(q, sigma, n) for (q, sigma), n in sorted(steps.items()))


@lru_cache(maxsize=4096)
def _epsilon(classes: tuple[Release, ...], delta: float, interval: float) -> float:
    if not classes:
        return 0.0
    if any(c.sigma < MIN_SIGMA for c in classes):
        return math.inf
    return max(_invert(loss, delta, h) for loss, h in _both(classes, interval))


def _both(classes: Sequence[Release], interval: float) -> list[tuple[_Loss, float]]:
    """The composed loss of each direction with its interval: doubled from `interval` until the grids fit."""
    h = interval
    while any(_span(c.q, c.sigma, h)[1] - _span(c.q, c.sigma, h)[0] > MAX_POINTS for c in classes):
        h *= 2
    while True:
        directions = [[_steps(c.q, c.sigma, h)[side] for c in classes] for side in (0, 1)]
        counts = [c.steps for c in classes]
        windows = [_window(steps, counts, h) for steps in directions]
        if all(last - first < MAX_POINTS for first, last in windows):
            return [(_compose(steps, counts, window), h)
                    for steps, window in zip(directions, windows, strict=True)]
        h *= 2


# One step ------------------------------------------------------------------------------------------------------------

def _loss_at(x: float, q: float, sigma: float) -> float:
    """log(mixture / N(0, sigma^2)) at x, where the mixture is (1 - q) N(0, sigma^2) + q N(1, sigma^2)."""
    ratio = (2 * x - 1) / (2 * sigma * sigma)
    return ratio if q == 1 else float(np.logaddexp(math.log1p(-q), math.log(q) + ratio))


def _span(q: float, sigma: float, h: float) -> tuple[int, int]:
    """First and last grid index of a step's loss (mixture against N(0, sigma^2))."""
    low, high = _loss_at(-_Z * sigma, q, sigma), _loss_at(1 + _Z * sigma, q, sigma)
    return math.floor(max(low, -MAX_LOSS) / h), math.ceil(min(max(high, h), MAX_LOSS) / h)


@lru_cache(maxsize=32)
def _steps(q: float, sigma: float, h: float) -> tuple[_Step, _Step]:
    """One step, removing a unit (P = mixture) and adding one (P = N(0, sigma^2)).

    The loss grows with x, so a grid cell is an interval in x; adding is removing with P and Q exchanged and the grid
    mirrored.
    """
    first, last = _span(q, sigma, h)
    losses = np.arange(first, last + 1) * h
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        x = losses * sigma**2 + 0.5 if q == 1 else sigma**2 * np.log1p(np.expm1(losses) / q) + 0.5
    if q < 1:
        x[losses <= math.log1p(-q)] = -np.inf
    plain, plain_tail, plain_out = _masses(x / sigma)
    shifted, shifted_tail, shifted_out = _masses((x - 1) / sigma)
    mix, mix_tail = (1 - q) * plain + q * shifted, (1 - q) * plain_tail + q * shifted_tail
    mix_below, mix_above = ((1 - q) * a + q * b for a, b in zip(plain_out, shifted_out, strict=True))
    below, above = plain_out
    return (_connect(first, mix, plain, mix_tail, plain_tail, mix_below, mix_above, h),
            _connect(-last, plain[::-1], mix[::-1], plain_tail[::-1], mix_tail[::-1], above, below, h))


def _masses(z: Array) -> tuple[Array, Array, tuple[float, float]]:
    """N(0, 1) mass of each cell between edges `z`, the larger number it was subtracted from, the mass outside."""
    cdf, sf = ndtr(z), ndtr(-z)
    upper = z[:-1] > 0  # differences on the near tail keep their relative accuracy
    mass = np.where(upper, sf[:-1] - sf[1:], cdf[1:] - cdf[:-1])
    return mass, np.where(upper, sf[:-1], cdf[1:]), (float(cdf[0]), float(sf[-1]))


def _connect(first: int, p: Array, q: Array, p_tail: Array, q_tail: Array, below: float, above: float,
             h: float) -> _Step:
    """Split each cell's P-mass between its two ends so that its Q-mass is kept; rounding errors move mass upwards."""
    ratio = np.exp(np.arange(first, first + len(p)) * h)
    slack = _ROUND * (p_tail + q_tail * ratio)
    upper = np.clip((p - q * ratio + slack) / -math.expm1(-h), 0, p)
    pmf = np.zeros(len(p) + 1)
    pmf[1:] += upper
    pmf[:-1] += p - upper
    pmf[0] += below
    losses = np.arange(first, first + len(pmf)) * h
    with np.errstate(divide="ignore"):
        log_pmf = np.log(pmf)
    return _Step(first, pmf, above,
                 np.array([_log_sum_exp(log_pmf + t * losses) for t in _LAMBDAS]),
                 np.array([_log_sum_exp(log_pmf - t * losses) for t in _LAMBDAS]))


def _log_sum_exp(values: Array) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))


# Composition ---------------------------------------------------------------------------------------------------------

def _window(steps: Sequence[_Step], counts: Sequence[int], h: float) -> tuple[int, int]:
    """Grid indices that leave out at most _TAIL on either side (Chernoff), or the whole support if that is shorter."""
    pairs = list(zip(steps, counts, strict=True))
    room = -math.log(_TAIL)
    high = np.min((sum(n * s.right for s, n in pairs) + room) / _LAMBDAS)
    low = -np.min((sum(n * s.left for s, n in pairs) + room) / _LAMBDAS)
    return (max(math.floor(low / h), sum(n * s.first for s, n in pairs)),
            min(math.ceil(high / h), sum(n * (s.first + len(s.pmf) - 1) for s, n in pairs)))


def _compose(steps: Sequence[_Step], counts: Sequence[int], window: tuple[int, int]) -> _Loss:
    """The composed loss on a window, by FFT. Mass right of the window wraps to small losses, so its bound is added
    to `infinity`; mass left of it wraps to larger ones, which is pessimistic already."""
    first, last = window
    size = next_fast_len(max(last - first + 1, 2), real=True)
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    for step, count in zip(steps, counts, strict=True):
        folded = np.zeros(-(-len(step.pmf) // size) * size)
        folded[:len(step.pmf)] = step.pmf
        spectrum *= _power(rfft(folded.reshape(-1, size).sum(axis=0)), count)
    start = sum(n * s.first for s, n in zip(steps, counts, strict=True))
    pmf = np.roll(irfft(spectrum, size), (start - first) % size)
    # |error|_1 <= sqrt(size) |error|_2, and each factor of the spectrum is off by about log2(size) ulp.
    energy = float((spectrum.real**2 + spectrum.imag**2).sum())
    rounding = 4 * np.finfo(float).eps * math.log2(size) * sum(counts) * (1 + math.sqrt(energy))
    infinity = sum(n * s.infinity for s, n in zip(steps, counts, strict=True))
    return _Loss(first, np.maximum(pmf, 0), infinity + _TAIL + rounding)


def _power(base: NDArray[np.complex128], exponent: int) -> NDArray[np.complex128]:
    """base ** exponent by squaring: several times faster than numpy's complex power."""
    out: NDArray[np.complex128] | None = None
    while True:
        if exponent & 1:
            out = base.copy() if out is None else out * base
        exponent >>= 1
        if not exponent:
            return np.ones_like(base) if out is None else out
        base = base * base


# Reading a composed loss ---------------------------------------------------------------------------------------------

def _hockey_stick(loss: _Loss, eps: float, h: float) -> float:
    """infinity + sum over losses l > eps of (1 - exp(eps - l)) pmf(l)."""
    losses = np.arange(loss.first, loss.first + len(loss.pmf)) * h
    above = losses > eps
    return min(1.0, loss.infinity + float((-np.expm1(eps - losses[above]) * loss.pmf[above]).sum()))


def _invert(loss: _Loss, delta: float, h: float) -> float:
    """Smallest eps >= 0 whose hockey stick is at most delta: bisection over grid points, exact within a cell."""
    if loss.infinity >= delta:
        return math.inf
    last = loss.first + len(loss.pmf) - 1
    if last <= 0:
        return 0.0
    weights = -np.expm1(-h * np.arange(1, last + 1))

    def above(k: int) -> Array:
        return loss.pmf[max(k + 1 - loss.first, 0):]

    def at(k: int) -> float:  # without BLAS, whose threads cost more than they bring here
        tail = above(k)
        skipped = last - k - len(tail)
        return loss.infinity + float((weights[skipped:last - k] * tail).sum())

    if at(0) <= delta:
        return 0.0
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) > delta else (low, middle)
    mass = loss.infinity + float(above(low).sum())
    return low * h + math.log((mass - delta) / (mass - at(low)))
