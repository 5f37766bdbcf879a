"""What a budget buys: the noise for an epsilon, and the epsilon of a noise.

Guarantee: `calibrate_sigma` returns the smallest sigma on a lattice of 0.001 whose epsilon, by the project's own
accountant and rounded up as a ledger rounds it, is within the target; so a ledger never refuses the schedule that was
planned with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

from privacy.accountant import INTERVAL, MAX_SIGMA, Release, round_up
from privacy.accountant import epsilon as spent
from privacy.errors import UsageError
from privacy.mechanism import DpMechanism, default_delta

LATTICE = 1000  # sigmas per unit
_COARSE = 1e-3  # interval of the first search; its epsilon is an upper bound too


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule of `steps` noisy steps at sampling probability `q`.

    noise_to_signal: standard deviation of the noise in one step's mean, along any one direction, as a fraction of the
    clip norm (the longest that the mean gradient can be): sigma / (q N). A vector of d parameters carries noise of
    sqrt(d) times that length; averaging over T steps divides it by sqrt(T).
    """

    sigma: float
    epsilon: float
    delta: float
    steps: int
    q: float
    noise_to_signal: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@lru_cache(maxsize=1024)
def calibrate_sigma(q: float, steps: int, delta: float, epsilon: float) -> float:
    """Smallest noise multiplier (a multiple of 0.001) with which `steps` steps cost at most `epsilon` at `delta`.

    Count retries among the steps. Raises UsageError `dp.parameter`, `dp.unreachable`.
    """
    if not epsilon > 0:
        raise UsageError("dp.parameter", f"epsilon = {epsilon} is not > 0.", "Set epsilon > 0, or trust=none.")

    def fits(interval: float) -> Callable[[int], bool]:
        return lambda k: round_up(spent([Release(q, k / LATTICE, steps)], delta, interval=interval)) <= epsilon

    coarse = _smallest(fits(_COARSE), start=LATTICE)
    return _smallest(fits(INTERVAL), start=coarse) / LATTICE


def plan(*, records: int, q: float, steps: int, delta: float | None = None, epsilon: float | None = None,
         sigma: float | None = None) -> Plan:
    """Calibrate sigma to an `epsilon`, or tell the epsilon of a `sigma`; exactly one of them is given.

    records: the declared number of units, public. delta: default min(1e-5, 1 / (10 records)). Raises UsageError
    `dp.parameter`, `dp.unreachable`, `dp.unbounded`, `cli.usage`.
    """
    if (epsilon is None) == (sigma is None):
        raise UsageError("cli.usage", "A plan needs an epsilon or a sigma, and not both.", "Give one of the two.")
    if records < 1:
        raise UsageError("dp.parameter", f"records = {records} is not >= 1.", "Give the number of units.")
    delta = default_delta(records) if delta is None else delta
    # Building a mechanism refuses what no mechanism may have, before any search.
    DpMechanism(trust="local", unit="record", adjacency="add_remove", sampler="poisson", q=q, clip=1.0,
                sigma=1.0 if sigma is None else sigma, steps=steps, delta=delta, n_decl=records)
    if epsilon is not None:
        sigma = calibrate_sigma(q, steps, delta, epsilon)
    if sigma is None:
        raise UsageError("cli.usage", "A plan needs a sigma.", "Give one.")
    total = finite(round_up(spent([Release(q, sigma, steps)], delta)))
    return Plan(sigma=sigma, epsilon=total, delta=delta, steps=steps, q=q, noise_to_signal=sigma / (q * records))


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
