"""Renyi accounting of the same releases as `privacy.accountant`, and the filter for parameters chosen along the way.

One release's divergence at an order a is log(moment) / (a - 1), where moment = E[(P / Q)^a] under Q:

removing  P is the mixture of `privacy.mixture`, Q = N(0, sigma^2). At an integer order expanding the power gives a finite
          sum (Mironov, Talwar and Zhang, arXiv 1908.10530, for one item): exact, in logarithms. Between integers it is
          bounded from above: log(P / Q) is convex in x, so in each cell its chord is above it, and a straight loss
          integrates in closed form.
adding    P and Q exchanged. For one item it is never larger (same paper). For groups it is bounded likewise,
          with tangents.

The larger of the two is charged, so the guarantee holds in both directions, up to rounding (some 1e-12 a release). It
costs 7 to 70 % of epsilon against the privacy loss distribution, for groups up to several times; so the latter is
reported, and this one decides only where it must.
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

ORDERS = np.concatenate([np.arange(11, 110) / 10, np.arange(11, 257)])  # the small ones matter where epsilon is large
_WHOLE = [i for i, order in enumerate(ORDERS) if order == round(order)]
_BROKEN = [i for i in range(len(ORDERS)) if i not in _WHOLE]
MAX_GROUP = 64  # the work grows with its square
_CELLS = 8192  # of the bounds; their error falls with its square
_FAR = 40.0  # sigmas below which one cell is enough

Array = NDArray[np.floating]


def divergences(releases: Iterable[Release]) -> Array:
    """Renyi divergence of all releases together at each of ORDERS, shape (345,), in nats.

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

    Guarantee (Feldman and Zrnic, arXiv 2008.11193): whatever chooses the next (q, sigma, steps, group), with
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
    order: float = field(init=False)
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
        object.__setattr__(self, "order", float(ORDERS[best]))
        object.__setattr__(self, "budget", float(budgets[best]))

    def spent(self, releases: Iterable[Release]) -> float:
        """Their divergence at the filter's order: what `budget` bounds."""
        return float(divergences(releases)[np.searchsorted(ORDERS, self.order)])

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
    if group > MAX_GROUP:
        raise UsageError("dp.unsupported", f"Renyi accounting of {group} sampled items a unit is not built.",
                         f"Keep k_max <= {MAX_GROUP}, or sample whole persons.")
    pair, out = mixture(q, sigma, group, whole=True), np.empty(len(ORDERS))
    out[_WHOLE] = _sampled(q, sigma) if group == 1 else _removing(q, sigma, group)
    out[_BROKEN] = _chords(pair)
    return out if group == 1 else np.maximum(out, _tangents(pair))


def _sampled(q: float, sigma: float) -> Array:
    """At whole orders: moment = sum over j of Binomial(a, q)(j) exp(j (j - 1) / (2 sigma^2))."""
    out = []
    for order in range(2, 257):
        j = np.arange(order + 1)
        out.append(logsumexp(_log_binomial(order, q) + j * (j - 1) / (2 * sigma**2)) / (order - 1))
    return np.array(out)


def _removing(q: float, sigma: float, group: int) -> Array:
    """At whole orders: moment = sum over s of c(s) exp(s^2 / (2 sigma^2)), where c(s) is the coefficient of y^s in the
    a-th power of sum over i of Binomial(group, q)(i) exp(-i^2 / (2 sigma^2)) y^i."""
    base = _log_binomial(group, q) - np.arange(group + 1)**2 / (2 * sigma**2)
    power, out = base, []
    for order in range(2, 257):
        longer = np.full(len(power) + group, -math.inf)
        for i, b in enumerate(base):
            part = longer[i:i + len(power)]
            np.logaddexp(part, power + b, out=part)
        power = longer
        out.append(logsumexp(power + np.arange(len(power))**2 / (2 * sigma**2)) / (order - 1))
    return np.array(out)


def _chords(pair: Mixture) -> Array:
    """At broken orders: moment = integral of N(0, sigma^2)(x) exp(a loss(x)). Left of the cells the loss is at most its
    value there; right of them it rises by at most group / sigma^2."""
    edges = np.linspace(-_FAR * pair.sigma, ORDERS[_BROKEN[-1]] * pair.group + _FAR * pair.sigma, _CELLS + 1)
    loss, _ = pair.tangents(edges)
    slope = np.concatenate([[0.0], np.diff(loss) / np.diff(edges), [pair.group / pair.sigma**2]])
    at, loss = np.concatenate([edges[:1], edges]), np.concatenate([loss[:1], loss])
    return np.array([_integral(edges, order * (loss - slope * at), order * slope, pair.sigma) / (order - 1)
                     for order in ORDERS[_BROKEN]])


def _tangents(pair: Mixture) -> Array:
    """At all orders: moment = integral of N(0, sigma^2)(x) exp(-(a - 1) loss(x)), bounded by tangents in cell centres."""
    edges = np.linspace(-_FAR * pair.sigma, pair.group + _FAR * pair.sigma, _CELLS + 1)
    middle = np.concatenate([edges[:1], (edges[:-1] + edges[1:]) / 2, edges[-1:]])
    loss, slope = pair.tangents(middle)
    return np.array([_integral(edges, (order - 1) * (slope * middle - loss), (1 - order) * slope, pair.sigma) / (order - 1)
                     for order in ORDERS])


def _integral(edges: Array, height: Array, slope: Array, sigma: float) -> float:
    """log of the integral of N(0, sigma^2)(x) exp(height + slope x) over x, with a (height, slope) for each cell between
    `edges` and one on either side of them."""
    low, high = np.append(-math.inf, edges), np.append(edges, math.inf)
    shift = slope * sigma
    return float(logsumexp(height + shift**2 / 2 + _log_mass(low / sigma - shift, high / sigma - shift)))


def _log_mass(low: Array, high: Array) -> Array:
    """log N(0, 1) mass of each (low, high)."""
    flip = low > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    top = log_ndtr(high)
    with np.errstate(divide="ignore"):
        return np.asarray(top + np.log(-np.expm1(log_ndtr(low) - top)))


def _log_binomial(n: int, q: float) -> Array:
    """log Binomial(n, q)(i) for i = 0..n; q < 1."""
    i = np.arange(n + 1)
    return np.asarray(gammaln(n + 1) - gammaln(i + 1) - gammaln(n - i + 1) + i * math.log(q) + (n - i) * math.log1p(-q))
