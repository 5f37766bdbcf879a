"""Compression that stays linear: stochastic rounding to 8 or 4 bits on ONE public grid, so that integers add up.

Each value x becomes floor(x / step + u), u uniform in [0, 1), step = range / (2^(bits-1) - 1): its expectation is x, its
error below a step. With a grid per site or per tensor, sums of integers would mean nothing; values that a client picks
itself (top-k) aren't linear either. Under secure aggregation the encoding does the same (secure_aggregation.bits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Grid:
    """bits: 2 to 8. range: public bound on every value, above 0. Raises UsageError `rounding.grid`."""

    bits: int
    range: float

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or not 0 < self.range < np.inf:
            raise UsageError("rounding.grid", f"{self.bits} bits over a range of {self.range} make no grid.",
                             "Use 2 to 8 bits and a finite range above 0.")

    @property
    def step(self) -> float:
        return self.range / float(2 ** (self.bits - 1) - 1)

    def round(self, values: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int8]:
        """int8, of any shape; a value outside the range counts as its bound. rng: private to the caller, new each time."""
        inside = np.clip(values.astype(np.float64), -self.range, self.range)
        top = 2 ** (self.bits - 1) - 1
        return np.clip(np.floor(inside / self.step + rng.random(values.shape)), -top, top).astype(np.int8)

    def mean(self, rounded: Sequence[NDArray[np.int8]], weights: Sequence[float]) -> NDArray[np.float32]:
        """Weighted mean of the values, from the weighted sum of integers alone."""
        total = sum(w * r.astype(np.float64) for w, r in zip(weights, rounded, strict=True))
        return np.asarray(total * (self.step / sum(weights)), np.float32)
