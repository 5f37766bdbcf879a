"""Fixed-point encoding of an update into Z_2^32: weight, scale, stochastic rounding, two's complement.

|decoded weighted mean - true weighted mean| <= C / (2^(b-1) - 1) * n w_cap / sum(w) for values inside the range C; a
value outside is clipped to it. Rounding randomness comes from a CSPRNG and is drawn once per update.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from privacy.errors import Aborted, UsageError

RING_BITS = 32
WEIGHT_STEPS = 2**16  # weights relative to w_cap = 1 are rounded to multiples of 1/WEIGHT_STEPS


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """bits: b. range: C, the public bound on every coordinate. Raises UsageError `encoding.overflow` at planning."""

    bits: int
    range: float
    cohort: int

    def __post_init__(self) -> None:
        if self.cohort * self.top >= 2 ** (RING_BITS - 1):
            raise UsageError("encoding.overflow",
                             f"{self.cohort} sites * (2^{self.bits - 1} - 1) don't fit a {RING_BITS}-bit ring.",
                             f"Lower secure_aggregation.bits to {RING_BITS - max(1, self.cohort).bit_length()} or less.")

    @property
    def top(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    def encode(self, update: NDArray[np.float32], weight: float) -> NDArray[np.uint32]:
        """Encode a float vector. Raises Aborted `encoding.not_finite` for NaN or infinity."""
        if not np.isfinite(update).all():
            raise Aborted("encoding.not_finite", "The update holds a value that is not finite.",
                          "Check learning rate and clip; the reserved budget stays spent.")
        scaled = update.astype(np.float64) * (rounded_weight(weight) * self.top / self.range)
        np.clip(scaled, -self.top, self.top, out=scaled)
        key = Cipher(ChaCha20(secrets.token_bytes(32), bytes(16)), mode=None).encryptor()
        uniform = np.frombuffer(key.update(bytes(4 * update.size)), "<u4") * 2.0**-32
        return np.floor(scaled + uniform).astype(np.int64).astype(np.uint32)

    def decode_mean(self, total: NDArray[np.uint32], weights: Sequence[float]) -> NDArray[np.float32]:
        """Weighted mean of the updates whose encodings add up to `total`."""
        mass = sum(rounded_weight(w) for w in weights)
        return (total.view(np.int32) * (self.range / (self.top * mass))).astype(np.float32)


def rounded_weight(weight: float) -> float:
    """w / w_cap on its public lattice; exact in binary floating point."""
    return max(1, round(weight * WEIGHT_STEPS)) / WEIGHT_STEPS
