"""What a budget buys: the noise for an epsilon, and the epsilon of a noise.

Guarantee: `calibrate_schedule` returns the smallest sigma on a lattice of 0.001 with which every way of spending a
schedule is within the target, by the project's own accountant and rounded up as a ledger rounds it; so a ledger never
refuses the schedule that was planned with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache

from privacy.accountant import INTERVAL, MAX_SIGMA, Release, round_up
from privacy.accountant import epsilon as spent
from privacy.errors import UsageError
from privacy.mechanism import DpMechanism, default_delta

LATTICE = 1000  # sigmas per unit
_COARSE = 1e-3  # interval of the first search; its epsilon is an upper bound too
TOLD = (1e-4, 1e-5, 1e-6, 1e-7)  # deltas at which a plan's epsilon is told beside its own

Part = tuple[float, float, int, int]  # q, noise (a factor on sigma), steps, group


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule of `steps` noisy steps at sampling probability `q`.

    noise_to_signal: standard deviation of the noise in one step's mean, along any one direction, as a fraction of the
    clip norm (the longest that the mean gradient can be): sigma / (q N). A vector of d parameters carries noise of
    sqrt(d) times that length; averaging over T steps divides it by sqrt(T). epsilon_at: delta ("1e-5") -> epsilon of the
    same noise, at TOLD and at `delta`, where it is finite.
    """

    sigma: float
    epsilon: float
    delta: float
    steps: int
    q: float
    noise_to_signal: float
    epsilon_at: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def calibrate_schedule(plans: Sequence[Sequence[Part]], delta: float, epsilon: float) -> float:
    """Smallest noise multiplier (a multiple of 0.001) with which each of `plans` costs at most `epsilon` at `delta`.

    A plan is what may be released in all, as parts (q, noise, steps, group) whose noise multiplier is sigma * noise: one
    plan for every way of spending the retries. Raises UsageError `dp.parameter`, `dp.too_many_classes`, `dp.unreachable`.
    """
    if not epsilon > 0:
        raise UsageError("dp.parameter", f"epsilon = {epsilon} is not > 0.", "Set epsilon > 0, or trust=none.")
    if not any(plans) or not all(math.isfinite(noise) and noise > 0 for plan in plans for _, noise, _, _ in plan):
        raise UsageError("dp.parameter", "A schedule needs phases, and noise > 0 in each.", "Correct the schedule.")
    return _calibrated(tuple(dict.fromkeys(map(tuple, plans))), delta, epsilon)


@lru_cache(maxsize=1024)
def _calibrated(plans: tuple[tuple[Part, ...], ...], delta: float, epsilon: float) -> float:
    order = list(plans)

    def fits(interval: float) -> Callable[[int], bool]:
        def within(k: int) -> bool:
            for plan in order:
                releases = [Release(q, k / LATTICE * noise, steps, group) for q, noise, steps, group in plan]
                if round_up(spent(releases, delta, interval=interval)) > epsilon:
                    order.sort(key=lambda other: other is not plan)  # the plan that fails is likely to fail again
                    return False
            return True
        return within

    coarse = _smallest(fits(_COARSE), start=LATTICE)
    return _smallest(fits(INTERVAL), start=coarse) / LATTICE


def calibrate_sigma(q: float, steps: int, delta: float, epsilon: float, group: int = 1) -> float:
    """`calibrate_schedule` of steps that are all alike. Count retries among them."""
    return calibrate_schedule([[(q, 1.0, steps, group)]], delta, epsilon)


def plan(*, records: int, q: float, steps: int, delta: float | None = None, epsilon: float | None = None,
         sigma: float | None = None, unit: str = "record", k_max: int | None = None) -> Plan:
    """Calibrate sigma to an `epsilon`, or tell the epsilon of a `sigma`; exactly one of them is given.

    records: the declared number of sampled items, public: records or, where the unit is a person and `k_max` isn't given,
    persons sampled whole. k_max: sampled records of a person at most. delta: default min(1e-5, 1 / (10 records)). Raises
    UsageError `dp.parameter`, `dp.unsupported`, `dp.unreachable`, `dp.unbounded`, `cli.usage`.
    """
    if (epsilon is None) == (sigma is None):
        raise UsageError("cli.usage", "A plan needs an epsilon or a sigma, and not both.", "Give one of the two.")
    if records < 1:
        raise UsageError("dp.parameter", f"records = {records} is not >= 1.", "Give the number of units.")
    delta = default_delta(records) if delta is None else delta
    group = 1 if k_max is None else k_max
    # Building a mechanism refuses what no mechanism may have, before any search.
    DpMechanism(trust="local", unit=unit, adjacency="add_remove", sampler="poisson", q=q, clip=1.0,
                sigma=1.0 if sigma is None else sigma, steps=steps, delta=delta, n_decl=records,
                sampled="record" if k_max is not None else unit, group=group)
    if epsilon is not None:
        sigma = calibrate_sigma(q, steps, delta, epsilon, group)
    if sigma is None:
        raise UsageError("cli.usage", "A plan needs a sigma.", "Give one.")
    releases = [Release(q, sigma, steps, group)]
    total = finite(round_up(spent(releases, delta)))
    told = {label(d): round_up(spent(releases, d)) for d in sorted({*TOLD, delta}, reverse=True)}
    return Plan(sigma=sigma, epsilon=total, delta=delta, steps=steps, q=q, noise_to_signal=sigma / (q * records),
                epsilon_at={d: e for d, e in told.items() if math.isfinite(e)})


def label(delta: float) -> str:
    """A delta as a short key: 1e-5, not 1e-05 nor 0.00001."""
    digits, _, power = f"{delta:.12e}".partition("e")
    return f"{float(digits):.12g}e{int(power)}"


def finite(epsilon: float) -> float:
    """Raises UsageError `dp.unbounded` for an infinite epsilon."""
    if epsilon == float("inf"):
        raise UsageError("dp.unbounded", "No finite epsilon can be guaranteed for these parameters.",
                         "Use more noise, fewer steps or a larger delta.")
    return epsilon


def _smallest(fits: Callable[[int], bool], *, start: int) -> int:
    """Smallest k >= 1 that fits, for a predicate that stays true: gallop from `start`, then bisect."""
    stride, low, high = 1, start - 1, start
    while not fits(high):
        low, high, stride = high, high + stride, 2 * stride
        if high > MAX_SIGMA * LATTICE:
            raise UsageError("dp.unreachable", "No noise brings that many steps within this epsilon at this delta.",
                             "Raise epsilon or delta, or plan fewer steps.")
    if low < start:  # `start` fits: look for the bracket below it
        while low > 0 and fits(low):
            low, high, stride = max(low - stride, 0), low, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
