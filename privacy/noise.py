"""Randomness of the mechanism, all from a CSPRNG: Poisson sampling and Gaussian noise on a lattice.

Float noise is porous (Mironov, CCS 2012), so contributions are rounded to a lattice of pitch gamma = clip * 2^-20 and
summed as integers; the noise is a rounded Gaussian on the same lattice. Rounding moves one contribution by at most
gamma sqrt(dim) / 2, so the noise is larger by the factor 1 + 2^-20 sqrt(dim).

The noise is the exact rounding of the inverse CDF at 128 random bits: floats decide where they are sure, and 60 digits
where the value lies within `UNSURE` of a rounding boundary (2 in a million). Rounding a sum of lattice points and a
Gaussian is post-processing of that sum, so what is left is the grid of 2^-128: |z| reaches 13, and up to |z| = 12 the
probability of no lattice point is off by more than 2^-20 of itself; beyond, the mass is below 10^-32 a coordinate, far
under the tails that the accountant charges to delta. No state is kept, stored or restored.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from scipy.special import ndtri

LATTICE_BITS = 20
BLOCK = 2**16  # normals at a time: 1 MiB of keystream
SAMPLED = 2**18  # units at a time: memory doesn't follow their number
UNSURE = 2.0**-20  # of a lattice point; the float's own error is below 2^-24


def random_words(n: int) -> NDArray[np.uint64]:
    """n uniform 64-bit words from ChaCha20 under a fresh key of the operating system."""
    stream = Cipher(ChaCha20(secrets.token_bytes(32), bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * n)), "<u8")


def poisson_sample(units: int, q: float) -> NDArray[np.int64]:
    """Indices of the sampled units: each one independently with probability floor(q 2^64) / 2^64 <= q."""
    limit, found = min(int(math.ldexp(q, 64)), 2**64 - 1), [np.zeros(0, np.int64)]
    for start in range(0, units, SAMPLED):
        words = random_words(min(SAMPLED, units - start))
        found.append(start + np.flatnonzero(words <= limit if q == 1 else words < limit))
    return np.concatenate(found)


def rounded_normal(n: int, scale: float) -> NDArray[np.int64]:
    """round(scale * z) of n standard normals z, int64 (n,). scale: standard deviation in lattice points, below 2^40."""
    out = np.empty(n, np.int64)
    for start in range(0, n, BLOCK):
        size = min(BLOCK, n - start)
        words = random_words(2 * size)
        high, low = words[:size], words[size:]
        half = low >> np.uint64(1)  # 127 bits of tail probability; the last bit is the sign
        tail = (high.astype(np.float64) + half.astype(np.float64) * 2.0**-63) * 2.0**-65
        value = -scale * ndtri(np.maximum(tail, 2.0**-129))
        rounded = np.rint(value)
        unsure = np.abs(np.abs(value - rounded) - 0.5) < UNSURE + np.abs(value) * 2.0**-44
        for i in np.flatnonzero(unsure):
            rounded[i] = _exactly((int(high[i]) << 63) | int(half[i]), scale)
        signed = np.where(low & np.uint64(1), -rounded, rounded)
        out[start:start + size] = signed.astype(np.int64)
    return out


def _exactly(bits: int, scale: float) -> int:
    """round(-scale * Phi^-1((bits + 1/2) / 2^128)) at 60 digits. bits: in [0, 2^127)."""
    import mpmath

    with mpmath.workdps(60):
        tail = (mpmath.mpf(bits) + 0.5) / mpmath.mpf(2) ** 128
        return int(mpmath.nint(scale * mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * tail)))


def pitch(clip: float) -> float:
    """gamma, the distance between lattice points."""
    return math.ldexp(clip, -LATTICE_BITS)


def lattice_noise(dim: int, *, sigma: float, clip: float) -> NDArray[np.int64]:
    """Gaussian noise of standard deviation sigma * clip, in units of gamma, shape (dim,)."""
    scale = sigma * 2.0**LATTICE_BITS * (1 + 2.0**-LATTICE_BITS * math.sqrt(dim))
    return rounded_normal(dim, scale) if sigma else np.zeros(dim, np.int64)
