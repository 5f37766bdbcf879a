"""`DpMechanism`: the one frozen object that trainer, accountant, ledger and report read, so that they can't drift apart.

One round at one site is `steps` releases of a Poisson-subsampled Gaussian: sample items with probability `q`, clip each
item's gradient to L2 norm `clip`, sum, add noise of standard deviation `sigma * clip`, divide by the public constant
`q * n_decl`. What an item is, and how many of them one privacy unit owns:

unit    sampled  item                                                                           items of a unit
record  record   one record                                                                     1
person  person   a person: the mean gradient of min(draws, n_p) of its records (2407.07737)     1
person  record   one record, a person's records cut to `group` for the life of the lineage      group
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from privacy.errors import UsageError

SAMPLERS = ("poisson",)
ADJACENCIES = ("add_remove",)
UNITS = ("record", "person")
TRUSTS = ("local", "none")
MAX_GROUP = 1000


@dataclass(frozen=True, kw_only=True)
class DpMechanism:
    """What is released in one round by one site.

    q: sampling probability, (0, 1]. clip: L2 norm. sigma: noise multiplier, relative to clip. steps: noisy steps a
    round. delta: of the (epsilon, delta) that is reported. n_decl: declared items, public. group, draws: as above.
    Raises UsageError `dp.parameter` (a value that can't be right) and `dp.unsupported` (a sampler, unit or adjacency
    that the accountant doesn't know).
    """

    trust: Literal["local", "none"]
    unit: str
    adjacency: str
    sampler: str
    q: float
    clip: float
    sigma: float
    steps: int
    delta: float
    n_decl: int
    sampled: str = "record"
    group: int = 1
    draws: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (("trust", self.trust, TRUSTS), ("unit", self.unit, UNITS),
                                   ("adjacency", self.adjacency, ADJACENCIES), ("sampler", self.sampler, SAMPLERS),
                                   ("sampled", self.sampled, UNITS)):
            if value not in known:
                raise UsageError("dp.unsupported", f"{name}={value!r} is not covered by the accountant.",
                                 f"Use {name}={' or '.join(known)}.")
        private = self.trust != "none"
        whole = self.unit == self.sampled  # one item a unit
        checks = (
            ("q", self.q, math.isfinite(self.q) and 0 < self.q <= 1, "in (0, 1]"),
            ("clip", self.clip, math.isfinite(self.clip) and self.clip > 0, "finite and > 0"),
            ("steps", self.steps, self.steps >= 1, ">= 1"),
            ("n_decl", self.n_decl, self.n_decl >= 1, ">= 1"),
            ("sigma", self.sigma, math.isfinite(self.sigma) and (self.sigma > 0 if private else self.sigma == 0),
             "> 0 (or 0 with trust=none)"),
            ("sampled", self.sampled, self.unit == "person" or whole, "record when the unit is a record"),
            ("group", self.group, self.group == 1 if whole else 1 <= self.group <= MAX_GROUP, "1 unless a person's records "
             f"are sampled one by one (then 1..{MAX_GROUP})"),
            ("draws", self.draws, self.draws >= 1 if self.sampled == "person" else self.draws == 1,
             ">= 1 (1 unless persons are sampled)"),
            ("delta", self.delta, 0 < self.delta < 1 / max(self.n_decl, 1), "in (0, 1/n_decl)"),
        )
        for name, number, ok, want in checks:
            if not ok:
                raise UsageError("dp.parameter", f"{name} = {number} is not {want}.", f"Set {name} {want}.")

    @property
    def private(self) -> bool:
        return self.trust != "none"

    @property
    def denominator(self) -> float:
        """The public constant that every noisy sum is divided by: q * n_decl."""
        return self.q * self.n_decl


def default_delta(n_decl: int) -> float:
    """min(1e-5, 1 / (10 n_decl)), in units of privacy."""
    return min(1e-5, 1.0 / (10 * n_decl))


def declared(n: int) -> int:
    """A count rounded to one significant digit: what a contract may say of a site's size."""
    if n < 1:
        raise UsageError("data.empty", "A site with no units can't take part.", "Check the data file and its columns.")
    scale: int = 10 ** (len(str(n)) - 1)
    return max(1, int(n / scale + 0.5)) * scale
