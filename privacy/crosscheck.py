"""Other people's accountants, to check the project's own: dp-accounting (PLD, RDP) and Opacus (PRV).

They come with the extras and are imported when called. All take the same releases, under add/remove adjacency; groups
are known to the first alone.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from privacy.accountant import INTERVAL, Release
from privacy.errors import CheckFailed, UsageError

PRV_ERROR = 1e-3  # of epsilon: prv's upper bound exceeds its estimate by that
MAX_PRV_EPSILON = 200.0  # Opacus' grid grows with epsilon, to any size


def available() -> bool:
    """Are both packages installed? Nothing is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("dp_accounting", "opacus"))


def pld_name() -> str:
    """Name and version of the accountant behind `pld`, such as "dp-accounting-pld/0.6.0"."""
    _require()
    return f"dp-accounting-pld/{version('dp-accounting')}"


def pld(releases: Iterable[Release], delta: float) -> float:
    """dp-accounting's privacy loss distributions, interval 1e-4, pessimistic; groups included, in half a minute a class.
    Raises UsageError `install.extra`."""
    _require()
    from dp_accounting.pld import PLDAccountant

    return _spent(PLDAccountant(value_discretization_interval=INTERVAL), releases, delta)


def rdp(releases: Iterable[Release], delta: float) -> float:
    """dp-accounting's Renyi accountant at its default orders: valid, and 7 to 70 % loose. Raises UsageError
    `install.extra`; CheckFailed `dp.cross_check` for groups."""
    _require()
    from dp_accounting.rdp import RdpAccountant

    releases = list(releases)
    _alone(releases)
    return _spent(RdpAccountant(), releases, delta)


def prv(releases: Iterable[Release], delta: float) -> float:
    """Opacus' privacy random variables, upper bound. Raises UsageError `install.extra`; CheckFailed
    `dp.cross_check` for groups, where Opacus finds its own discretisation too coarse, and where epsilon is beyond its
    reach."""
    _require()
    from opacus.accountants import PRVAccountant

    releases = [r for r in releases if r.steps]
    if not rdp(releases, delta) <= MAX_PRV_EPSILON:
        raise CheckFailed("dp.cross_check", f"Epsilon exceeds {MAX_PRV_EPSILON}, too much for Opacus' grid.",
                          "Compare with the other accountants.")
    accountant = PRVAccountant()
    accountant.history = [(r.sigma, r.q, r.steps) for r in releases]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta, eps_error=PRV_ERROR, delta_error=delta / 1000))
    except (RuntimeError, ValueError) as e:
        raise CheckFailed("dp.cross_check", f"Opacus could not account for these parameters ({type(e).__name__}).",
                          "Compare with the other accountants.") from e


def _spent(accountant: Any, releases: Iterable[Release], delta: float) -> float:
    for r in releases:
        if r.steps:
            accountant.compose(_event(r), r.steps)
    return float(accountant.get_epsilon(delta))


def _event(r: Release) -> Any:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
    from scipy.stats import binom

    if r.group == 1:
        return PoissonSampledDpEvent(r.q, GaussianDpEvent(r.sigma))
    items = range(r.group + 1)
    return MixtureOfGaussiansDpEvent(r.sigma, items, binom.pmf(items, r.group, r.q))


def _alone(releases: Iterable[Release]) -> None:
    if any(r.group > 1 for r in releases if r.steps):
        raise CheckFailed("dp.cross_check", "This accountant knows no units that own several sampled items.",
                          "Compare with dp-accounting's privacy loss distributions.")


def _require() -> None:
    if not available():
        raise UsageError("install.extra", "dp-accounting and opacus are not installed.", "pip install 'consilo[site]'")
