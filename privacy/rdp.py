"""Renyi accounting of the same releases as `privacy.accountant`, and the filter for parameters chosen along the way.

One release's divergence at an integer order a, log(moment) / (a - 1), where moment = E[(P / Q)^a] under Q:

removing  P is the mixture of `privacy.mixture`, Q = N(0, sigma^2). Expanding the a-th power gives a finite sum (Mironov,
          Talwar and Zhang, arXiv 1908.10530, for one item): exact, in logarithms.
adding    P and Q exchanged. For one item it is never larger (same paper, theorem 5). For groups it is bounded from above:
          log(P / Q) is concave in x, so in each cell its tangent is above it, and integrates in closed form.

The larger of the two is charged, so the guarantee holds in both directions. It costs 7 to 70 % of epsilon against the
privacy loss distribution, which is why the latter is reported and this one decides only where it must.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, log_ndtr, logsumexp

from privacy.accountant import Release
from privacy.errors import UsageError
from privacy.mixture import Mixture, mixture
from privacy.pld import MIN_SIGMA

ORDERS = np.arange(2, 257)
MAX_GROUP = 64  # the work grows with its square
_CELLS = 4096  # of the bound when a unit is added; its error falls with their square
_FAR = 40.0  # sigmas below which one cell is enough

Array = NDArray[np.floating]


def divergences(releases: Iterable[Release]) -> Array:
    """Renyi divergence of all releases together at each of ORDERS, shape (255,), in nats.

    Sums are bounds for adaptively chosen releases too, if their total was bounded beforehand at that order. Raises
    UsageError `dp.unsupported` for a sampled group of more than MAX_GROUP items.
    """
    total = np.zeros(len(ORDERS))
    for r in releases:
        if r.steps:
            total = total + r.steps * _one(r.q, r.sigma, r.group)
    return total


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """Epsilon at `delta`, the best of ORDERS, for parameters fixed beforehand. Empty -> 0.0. Raises UsageError
    `dp.parameter`, `dp.unsupported`."""
    total = divergences(releases)
    surcharge = conversion(delta)
    return max(0.0, float((total + surcharge).min())) if total.any() else 0.0


def conversion(delta: float) -> Array:
    """What epsilon exceeds the divergence by, at each of ORDERS: log(1 - 1/a) - log(a delta) / (a - 1).

    Canonne, Kamath and Steinke, arXiv 2004.00010, proposition 12; Balle et al., arXiv 1905.09982, theorem 21. Raises
    UsageError `dp.parameter`.
    """
    if not 0 < delta < 1:
        raise UsageError("dp.parameter", f"delta = {delta} is not in (0, 1).", "Set delta in (0, 1).")
    return np.asarray(np.log1p(-1 / ORDERS) - np.log(ORDERS * delta) / (ORDERS - 1))


@dataclass(frozen=True)
class RenyiFilter:
    """Decides before each release whether it still fits a cap, when parameters may depend on what was released before.

    Guarantee (Feldman and Zrnic, arXiv 2008.11193, theorem 4.3): whatever chooses the next (q, sigma, steps, group), with
    all earlier outputs in sight, the sequence of releases that `admits` let through is (cap, delta)-DP under add/remove,
    stopping times included. It needs three things: `admits` is asked before anything of a release is sampled; everything
    that was released counts in `so_far`; and delta, cap and planned never change.

    Why one order: the theorem bounds the divergence at an order fixed beforehand by `budget`, on every path. Taking the
    best of several orders afterwards would let one path end within the budget of one order and another within that of
    another, so that no order is bounded over all paths; the union of m such filters is sound at delta / m each, not at
    delta. Here delta isn't split: the order is the one with which `planned`, public releases known before the first one,
    can be repeated most often within the cap; without a plan, the unsampled Gaussian's. Any plan is sound; a good guess
    admits more.

    Raises UsageError `dp.parameter` (cap not > 0), `dp.unreachable` (no order leaves a budget), `dp.unsupported`.
    """

    delta: float
    cap: float
    planned: tuple[Release, ...] = ()
    order: int = field(init=False)
    budget: float = field(init=False)

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise UsageError("dp.parameter", f"cap = {self.cap} is not > 0.", "Set a cap > 0.")
        budgets = self.cap - conversion(self.delta)
        cost = divergences(self.planned) if self.planned else ORDERS.astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            best = int(np.argmax(np.where(budgets > 0, budgets / cost, -math.inf)))
        if not budgets[best] > 0:
            raise UsageError("dp.unreachable", f"No Renyi order converts to epsilon {self.cap} at delta {self.delta}.",
                             "Raise the cap or delta.")
        object.__setattr__(self, "order", int(ORDERS[best]))
        object.__setattr__(self, "budget", float(budgets[best]))

    def spent(self, releases: Iterable[Release]) -> float:
        """Their divergence at the filter's order: what `budget` bounds."""
        return float(divergences(releases)[self.order - ORDERS[0]])

    def admits(self, so_far: Sequence[Release], coming: Release) -> bool:
        """May `coming` be released after `so_far`? Raises UsageError `dp.unsupported` as `divergences` does."""
        return self.spent([*so_far, coming]) <= self.budget


@lru_cache(maxsize=256)
def _one(q: float, sigma: float, group: int) -> Array:
    """One release at each of ORDERS."""
    if sigma < MIN_SIGMA:
        return np.full(len(ORDERS), math.inf)
    if q == 1:
        return np.asarray(ORDERS * (group / sigma)**2 / 2)
    if group == 1:
        return _sampled(q, sigma)
    if group > MAX_GROUP:
        raise UsageError("dp.unsupported", f"Renyi accounting of {group} sampled items a unit is not built.",
                         f"Keep k_max <= {MAX_GROUP}, or sample whole persons.")
    return np.maximum(_removing(q, sigma, group), _adding(mixture(q, sigma, group)))


def _sampled(q: float, sigma: float) -> Array:
    """moment = sum over j of Binomial(a, q)(j) exp(j (j - 1) / (2 sigma^2))."""
    out = np.empty(len(ORDERS))
    for at, order in enumerate(ORDERS):
        j = np.arange(order + 1)
        out[at] = logsumexp(_log_binomial(int(order), q) + j * (j - 1) / (2 * sigma**2)) / (order - 1)
    return out


def _removing(q: float, sigma: float, group: int) -> Array:
    """moment = sum over s of c(s) exp(s^2 / (2 sigma^2)), where c(s) is the coefficient of y^s in the a-th power of
    sum over i of Binomial(group, q)(i) exp(-i^2 / (2 sigma^2)) y^i."""
    base = _log_binomial(group, q) - np.arange(group + 1)**2 / (2 * sigma**2)
    power, out = base, np.empty(len(ORDERS))
    for at, order in enumerate(ORDERS):
        longer = np.full(len(power) + group, -math.inf)
        for i, b in enumerate(base):
            part = longer[i:i + len(power)]
            np.logaddexp(part, power + b, out=part)
        power = longer
        out[at] = logsumexp(power + np.arange(len(power))**2 / (2 * sigma**2)) / (order - 1)
    return out


def _adding(pair: Mixture) -> Array:
    """moment = integral of N(0, sigma^2)(x) exp(-(a - 1) loss(x)), whose loss is convex: at least its tangent at the
    middle of each cell. With a straight loss the integral over a cell is a difference of normal distributions."""
    sigma, out = pair.sigma, np.empty(len(ORDERS))
    edges = np.linspace(-_FAR * sigma, pair.reach, _CELLS + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    loss, slope = pair.tangents(middle)
    edges[0], edges[-1] = -math.inf, math.inf
    for at, order in enumerate(ORDERS):
        tilt = (order - 1) * slope * sigma
        height = -(order - 1) * (loss - slope * middle) + tilt**2 / 2
        out[at] = logsumexp(height + _log_mass(edges[:-1] / sigma + tilt, edges[1:] / sigma + tilt)) / (order - 1)
    return out


def _log_mass(low: Array, high: Array) -> Array:
    """log N(0, 1) mass of each (low, high)."""
    flip = low > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    top = log_ndtr(high)
    return np.asarray(top + np.log(-np.expm1(log_ndtr(low) - top)))


def _log_binomial(n: int, q: float) -> Array:
    """log Binomial(n, q)(i) for i = 0..n; q < 1."""
    i = np.arange(n + 1)
    return np.asarray(gammaln(n + 1) - gammaln(i + 1) - gammaln(n - i + 1) + i * math.log(q) + (n - i) * math.log1p(-q))
