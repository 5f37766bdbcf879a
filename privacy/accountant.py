"""The project's own accountant: privacy loss distributions on numpy and scipy alone, so that an auditor can recompute.

It knows one thing, the Gaussian on a Poisson sample under add/remove adjacency, of which a privacy unit owns one item
or a public number of them, and refuses what it doesn't know.

Guarantee: the epsilon returned is an upper bound of the true one (privacy.pld says how). Both directions are composed;
the larger epsilon is reported. At the default interval it lies within 1e-3 of dp-accounting's (2e-3 for groups), for
delta above about 1e-12 times the steps; below that, the charge for rounding makes it loose, at last infinite.
Parameters must be fixed beforehand; where they depend on what was released, privacy.rdp has the filter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache

from privacy.errors import UsageError
from privacy.pld import Kind, compose, hockey_stick, hopeless, invert

NAME = "consilo-pld/1"
INTERVAL = 1e-4  # grid of the privacy loss, in nats
MAX_CLASSES = 16  # distinct (q, sigma, group) of one lineage
MAX_STEPS = 10**7
MAX_GROUP = 1000
MAX_SIGMA = 1e6  # above: counted as MAX_SIGMA


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
                   f"an integer in [0, {MAX_STEPS}]"),
                  ("group", self.group, isinstance(self.group, int) and 1 <= self.group <= MAX_GROUP,
                   f"an integer in [1, {MAX_GROUP}]"))
        for name, value, ok, want in checks:
            if not ok:
                raise UsageError("dp.parameter", f"{name} = {value} is not {want}.", f"Set {name} {want}.")


def epsilon(releases: Iterable[Release], delta: float, *, interval: float = INTERVAL) -> float:
    """Upper bound of epsilon at `delta` of all releases composed, in nats; not rounded.

    Empty -> 0.0, hardly any noise (pld.MIN_SIGMA) -> inf. A coarser `interval` is faster and still an upper bound.
    Raises UsageError `dp.parameter` (delta outside (0, 1)), `dp.too_many_classes`, `dp.unsupported` (a mixture that
    can't be resolved).
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
    if any(hopeless(kind) for kind, _ in classes):
        return 1.0
    return max(hockey_stick(loss, epsilon) for loss in compose(classes, interval))


def round_up(eps: float, digits: int = 4) -> float:
    """`eps` rounded up at that many decimals (inf stays inf)."""
    return float(decimal_up(eps, digits))


def decimal_up(eps: float, digits: int = 4) -> str:
    """`eps` rounded up, as a decimal string with that many decimals: what is printed and written to a ledger."""
    if math.isinf(eps):
        return "inf"
    return str(Decimal(eps).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))


def _classes(releases: Iterable[Release]) -> tuple[tuple[Kind, int], ...]:
    """Steps of each kind, in a canonical order. Without sampling, a group is one item that weighs as much."""
    steps: dict[Kind, int] = {}
    for r in releases:
        if r.steps:
            sigma = min(r.sigma, MAX_SIGMA)
            kind = Kind(r.q, sigma, r.group) if r.q < 1 else Kind(r.q, sigma / r.group, 1)
            steps[kind] = steps.get(kind, 0) + r.steps
    if len(steps) > MAX_CLASSES:
        raise UsageError("dp.too_many_classes", f"{len(steps)} distinct (q, sigma, group) exceed {MAX_CLASSES}.",
                         "Keep q and sigma fixed over a schedule, or open a new lineage.")
    return tuple(sorted(steps.items()))


@lru_cache(maxsize=4096)
def _epsilon(classes: tuple[tuple[Kind, int], ...], delta: float, interval: float) -> float:
    if not classes:
        return 0.0
    if any(hopeless(kind) for kind, _ in classes):
        return math.inf
    return max(invert(loss, delta) for loss in compose(classes, interval))
