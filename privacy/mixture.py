"""The dominating pair of one release: a mixture of Gaussians against one Gaussian, its loss and the inverse of it.

Items are sampled with probability q and a privacy unit owns up to `group` of them, each of norm at most 1 after scaling
by the clip. Whatever their directions, removing or adding the unit is no easier to see than in the scalar pair

    mixture = sum over i of Binomial(group, q)(i) N(i, sigma^2)    against    N(0, sigma^2)

(Ganesh, arXiv 2401.10294; Choquette-Choo et al., arXiv 2310.15526, corollary 4.7). One item makes it the subsampled
Gaussian. Large counts that occur with probability < 1e-22 are left out of the mixture and reported as `lost`: that raises
the loss where N(0, sigma^2) is the numerator, and is counted as infinite loss where the mixture is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from privacy.errors import UsageError

CUT = 10.0  # noise is cut at so many sigma: 8e-24 of mass
EDGE = 1e-9  # largest error of an inverted loss
_RARE = Decimal("1e-22")
_SHARP = 2.0**17  # a loss is exact to _SHARP ulp of 1, some 3e-11
_TABLE = 4097  # points that the inversion starts from

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Mixture:
    """weights[i], log_weights[i]: of i sampled items, i = 0, 1, ... reach: no x above it matters."""

    q: float
    sigma: float
    group: int
    weights: tuple[float, ...]
    log_weights: tuple[float, ...]
    lost: float
    reach: float

    @property
    def sharp(self) -> bool:
        """Is the loss so steep that doubles can't resolve it? So little noise has no epsilon worth telling."""
        top = len(self.weights) - 1
        return self.group > 1 and top * (2 * self.reach + top) > 2 * self.sigma**2 * _SHARP

    def loss(self, x: float) -> float:
        """log(mixture / N(0, sigma^2)) at x: it grows with x and is convex."""
        if self.group == 1:
            ratio = (2 * x - 1) / (2 * self.sigma**2)
            return ratio if self.q == 1 else float(np.logaddexp(math.log1p(-self.q), math.log(self.q) + ratio))
        return float(self._loss(np.array([x]))[0])

    def tangents(self, x: Array) -> tuple[Array, Array]:
        """Loss and its slope at each x."""
        return self._tangents(x, self._loss(x))

    def edges(self, losses: Array) -> Array:
        """x at which the loss has these (ascending) values, shape (n,): -inf where it is larger everywhere.

        One item: in closed form. More: Newton, to EDGE, within [-CUT sigma, reach] only; a value beyond is given its
        nearer end. Raises UsageError `dp.unsupported` where it doesn't converge.
        """
        q, sigma = self.q, self.sigma
        if self.group > 1:
            return self._newton(losses)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            x = losses * sigma**2 + 0.5 if q == 1 else sigma**2 * np.log1p(np.expm1(losses) / q) + 0.5
        if q < 1:
            x[losses <= math.log1p(-q)] = -np.inf
        return x

    def _loss(self, x: Array) -> Array:
        terms = [w + i * (2 * x - i) / (2 * self.sigma**2) for i, w in enumerate(self.log_weights)]
        return np.asarray(np.logaddexp.reduce(terms))

    def _tangents(self, x: Array, near: Array) -> tuple[Array, Array]:
        """Likewise; relative to a loss `near` it, so nothing overflows."""
        total, slope = np.zeros(len(x)), np.zeros(len(x))
        for i, w in enumerate(self.log_weights):
            term = np.exp(w - near + i * (2 * x - i) / (2 * self.sigma**2))
            total += term
            slope += i * term
        return near + np.log(total), slope / total / self.sigma**2

    def _newton(self, losses: Array) -> Array:
        table = np.linspace(-CUT * self.sigma, self.reach, _TABLE)
        known = self._loss(table)
        x = np.interp(losses, known, table)  # the chord of a convex function: left of the root, or at an end
        right = table[np.minimum(np.searchsorted(known, losses), _TABLE - 1)]
        left = np.flatnonzero((losses > known[0]) & (losses < known[-1]))
        for _ in range(60):
            loss, slope = self._tangents(x[left], losses[left])
            gap = loss - losses[left]
            far = np.abs(gap) > EDGE / 10
            if not far.any():
                return x
            left = left[far]
            x[left] = np.minimum(x[left] - gap[far] / slope[far], right[left])  # from the right of the root it is monotone
        raise UsageError("dp.unsupported", f"The loss of {self.group} items at q = {self.q}, sigma = {self.sigma} "
                         "can't be inverted.", "Use more noise or a smaller group.")


@lru_cache(maxsize=64)
def mixture(q: float, sigma: float, group: int, *, whole: bool = False) -> Mixture:
    """For sigma > 0 and q in (0, 1]; with group > 1, q < 1 (at q = 1 it is one Gaussian, of noise sigma / group). whole:
    leave no count out."""
    if group == 1:
        log_q = math.log1p(-q) if q < 1 else -math.inf
        return Mixture(q, sigma, 1, (1 - q, q), (log_q, math.log(q)), 0.0, 1 + CUT * sigma)
    weights, log_weights, lost = _binomial(q, group, Decimal(0) if whole else _RARE)
    low, high = 0.0, len(weights) - 1 + CUT * sigma
    for _ in range(40):  # the least x that leaves no more above it than one Gaussian leaves above CUT sigma
        middle = (low + high) / 2
        above = sum(w * float(ndtr((i - middle) / sigma)) for i, w in enumerate(weights))
        low, high = (middle, high) if above > ndtr(-CUT) else (low, middle)
    return Mixture(q, sigma, group, weights, log_weights, lost, high)


def _binomial(q: float, n: int, rare: Decimal) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Binomial(n, q) less upper counts that are `rare` in all, its logarithms, the mass left out; to the last digit."""
    with localcontext(prec=50):
        yes, no = Decimal(q), 1 - Decimal(q)
        exact = [math.comb(n, i) * yes**i * no**(n - i) for i in range(n + 1)]
        lost = Decimal(0)
        while len(exact) > 2 and lost + exact[-1] <= rare:
            lost += exact.pop()
        return tuple(map(float, exact)), tuple(float(w.ln()) for w in exact), float(lost)
