"""Privacy loss distributions on numpy and scipy alone: discretise one release, compose by FFT, read epsilon and delta.

Guarantee: every result is an upper bound. The loss is discretised by connecting the dots (Doroshenko et al., arXiv
2207.04380: each cell's P- and Q-mass are both kept), truncated tails count as infinite loss, and what the FFT wraps
around (Chernoff bound) or rounds is added to delta. What is released is `privacy.mixture`'s pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtr

from privacy.mixture import CUT, Mixture, mixture

MIN_SIGMA = 0.03  # below: the loss counts as infinite
MAX_LOSS = 500.0  # a single step's loss above it counts as infinite: exp() stays in range
MAX_POINTS = 2**21  # longest grid; the interval is doubled until everything fits
MAX_WORK = 2**23  # points of one step's grid times components of its mixture; likewise
_TAIL = 1e-16  # mass that a composed window may leave out on each side
_ROUND = 2.0**-44  # relative error granted to differences of ndtr; an edge off by t misplaces t^2 / interval, less
_LAMBDAS = 2.0 ** np.arange(-10, 11)  # of the Chernoff bounds; an octave too coarse widens a window by 6 %

Array = NDArray[np.floating]


class Kind(NamedTuple):
    """One release: sampling probability, noise multiplier, sampled items that a privacy unit owns at most."""

    q: float
    sigma: float
    group: int


@dataclass(frozen=True)
class Loss:
    """A discretised loss: `pmf[i]` is the P-mass at loss (first + i) * interval, `infinity` the mass without bound."""

    first: int
    pmf: Array
    infinity: float
    interval: float


@dataclass(frozen=True)
class _Step(Loss):
    """One release, with log E exp(+-lambda loss) at each of _LAMBDAS."""

    right: Array
    left: Array


def hopeless(kind: Kind) -> bool:
    """Is there so little noise that its loss counts as infinite?"""
    return kind.sigma < MIN_SIGMA or mixture(*kind).sharp


def compose(classes: Sequence[tuple[Kind, int]], interval: float) -> list[Loss]:
    """The loss of all (kind, steps) together, when a unit is removed and when one is added. `interval` is doubled until
    the grids fit. At least one class, none hopeless. Raises UsageError `dp.unsupported` as Mixture.edges does."""
    counts = [n for _, n in classes]
    while True:
        if all(_fits(mixture(*kind), interval) for kind, _ in classes):
            directions = [[_steps(kind, interval)[side] for kind, _ in classes] for side in (0, 1)]
            windows = [_window(steps, counts, interval) for steps in directions]
            if all(last - first < MAX_POINTS for first, last in windows):
                return [_compose(steps, counts, window) for steps, window in zip(directions, windows, strict=True)]
        interval *= 2


# One step ------------------------------------------------------------------------------------------------------------

def _fits(pair: Mixture, h: float) -> bool:
    first, last = _span(pair, h)
    return last - first <= min(MAX_POINTS, MAX_WORK // len(pair.weights))


def _span(pair: Mixture, h: float) -> tuple[int, int]:
    """First and last grid index of a step's loss (mixture against N(0, sigma^2))."""
    low, high = pair.loss(-CUT * pair.sigma), pair.loss(pair.reach)
    return math.floor(max(low, -MAX_LOSS) / h), math.ceil(min(max(high, h), MAX_LOSS) / h)


@lru_cache(maxsize=32)
def _steps(kind: Kind, h: float) -> tuple[_Step, _Step]:
    """One step, removing a unit (P = mixture) and adding one (P = N(0, sigma^2)).

    The loss grows with x, so a grid cell is an interval in x; adding is removing with P and Q exchanged and the grid
    mirrored.
    """
    pair = mixture(*kind)
    first, last = _span(pair, h)
    x = pair.edges(np.arange(first, last + 1) * h)
    size = last - first
    mix, mix_tail, mix_below, mix_above = np.zeros(size), np.zeros(size), 0.0, pair.lost
    for i, weight in enumerate(pair.weights):
        mass, tail, below, above = _masses((x - i) / kind.sigma)
        mix, mix_tail = mix + weight * mass, mix_tail + weight * tail
        mix_below, mix_above = mix_below + weight * below, mix_above + weight * above
    plain, plain_tail, below, above = _masses(x / kind.sigma)
    return (_connect(first, mix, plain, mix_tail, plain_tail, mix_below, mix_above, h),
            _connect(-last, plain[::-1], mix[::-1], plain_tail[::-1], mix_tail[::-1], above, below, h))


def _masses(z: Array) -> tuple[Array, Array, float, float]:
    """N(0, 1) mass of each cell between edges `z`, what it was subtracted from, the mass below and above."""
    cdf, sf = ndtr(z), ndtr(-z)
    upper = z[:-1] > 0  # differences on the near tail keep their relative accuracy
    mass = np.where(upper, sf[:-1] - sf[1:], cdf[1:] - cdf[:-1])
    return mass, np.where(upper, sf[:-1], cdf[1:]), float(cdf[0]), float(sf[-1])


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
    return _Step(first, pmf, above, h,
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


def _compose(steps: Sequence[_Step], counts: Sequence[int], window: tuple[int, int]) -> Loss:
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
    return Loss(first, np.maximum(pmf, 0), infinity + _TAIL + rounding, steps[0].interval)


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

def hockey_stick(loss: Loss, eps: float) -> float:
    """infinity + sum over losses l > eps of (1 - exp(eps - l)) pmf(l)."""
    losses = np.arange(loss.first, loss.first + len(loss.pmf)) * loss.interval
    above = losses > eps
    return min(1.0, loss.infinity + float((-np.expm1(eps - losses[above]) * loss.pmf[above]).sum()))


def invert(loss: Loss, delta: float) -> float:
    """Smallest eps >= 0 whose hockey stick is at most delta: bisection over grid points, exact within a cell."""
    if loss.infinity >= delta:
        return math.inf
    last, h = loss.first + len(loss.pmf) - 1, loss.interval
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
