"""Randomness of the mechanism, all from a CSPRNG: Poisson sampling and Gaussian noise on a lattice.

Float noise is porous (Mironov, CCS 2012), so contributions are rounded to a lattice of pitch gamma = clip * 2^-20 and
summed as integers; the noise is a rounded Gaussian on the same lattice. Rounding moves one contribution by at most
gamma sqrt(dim) / 2, so the noise is larger by the factor 1 + 2^-20 sqrt(dim). No state is kept, stored or restored.
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
BLOCK = 2**16  # normals at a time: 0.5 MiB of keystream


def random_words(n: int) -> NDArray[np.uint64]:
    """n uniform 64-bit words from ChaCha20 under a fresh key of the operating system."""
    stream = Cipher(ChaCha20(secrets.token_bytes(32), bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * n)), "<u8")


def poisson_sample(units: int, q: float) -> NDArray[np.int64]:
    """Indices of the sampled units: each one independently with probability floor(q 2^64) / 2^64 <= q."""
    limit = min(int(math.ldexp(q, 64)), 2**64 - 1)
    words = random_words(units)
    return np.flatnonzero(words <= limit if q == 1 else words < limit).astype(np.int64)


def standard_normal(n: int) -> NDArray[np.float64]:
    """Inverse CDF of 64 random bits: one for the sign, 63 for the tail probability, so |z| reaches 9.1."""
    out = np.empty(n)
    for start in range(0, n, BLOCK):
        words = random_words(min(BLOCK, n - start))
        tail = ((words >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64  # in (0, 0.5]
        out[start:start + len(words)] = np.where(words & np.uint64(1), ndtri(tail), -ndtri(tail))
    return out


def pitch(clip: float) -> float:
    """gamma, the distance between lattice points."""
    return math.ldexp(clip, -LATTICE_BITS)


def lattice_noise(dim: int, *, sigma: float, clip: float) -> NDArray[np.int64]:
    """Gaussian noise of standard deviation sigma * clip, in units of gamma, shape (dim,)."""
    scale = sigma * 2.0**LATTICE_BITS * (1 + 2.0**-LATTICE_BITS * math.sqrt(dim))
    return np.rint(standard_normal(dim) * scale).astype(np.int64) if sigma else np.zeros(dim, np.int64)
