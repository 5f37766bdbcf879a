"""Shamir secret sharing (CACM 1979) over GF(2^8), for whole arrays of secrets at once.

Multiplication by a public point is linear over GF(2), so shares are a bit-matrix product: no branch and no table look-up
depends on a secret. Field: x^8 + x^4 + x^3 + x + 1. At most 255 holders, x = 1..255.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privacy.errors import Aborted

Bytes = NDArray[np.uint8]


def _times(a: int, b: int) -> int:
    out = 0
    while b:
        out ^= a * (b & 1)
        a = (a << 1) ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return out


@functools.cache
def _matrix(point: int) -> NDArray[np.uint8]:
    """8x8 bit matrix of multiplication by a public field element (column i = point * 2^i)."""
    columns = [_times(point, 1 << i) for i in range(8)]
    return np.array([[(c >> row) & 1 for c in columns] for row in range(8)], dtype=np.uint8)


def _scale(point: int, data: Bytes) -> Bytes:
    bits = np.unpackbits(data[None, :], axis=0, bitorder="little")
    packed: Bytes = np.packbits((_matrix(point) @ bits) & 1, axis=0, bitorder="little")[0]
    return packed


def split(secret: bytes, *, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """Shares of a byte string for the given points (distinct, 1..255); any `threshold` of them give it back."""
    _check(threshold, points)
    coefficients = [np.frombuffer(secret, np.uint8)]
    coefficients += [np.frombuffer(secrets.token_bytes(len(secret)), np.uint8) for _ in range(threshold - 1)]
    out = {}
    for x in points:
        value = coefficients[-1]
        for c in reversed(coefficients[:-1]):  # Horner
            value = _scale(x, value) ^ c
        out[x] = value.tobytes()
    return out


def combine(shares: dict[int, bytes]) -> bytes:
    """Lagrange interpolation at 0 over exactly the shares given (callers pass `threshold` of them)."""
    points = list(shares)
    _check(len(points), points)
    if len({len(s) for s in shares.values()}) != 1:
        raise Aborted("secagg.share_length", "Shares differ in length.", "The round is void; start a new attempt.")
    total = np.zeros(len(shares[points[0]]), np.uint8)
    for x in points:
        weight = 1
        for other in points:
            if other != x:
                weight = _times(weight, _times(other, _inverse(other ^ x)))
        total ^= _scale(weight, np.frombuffer(shares[x], np.uint8))
    return total.tobytes()


@functools.cache
def _inverse(a: int) -> int:
    """a^254, the inverse of a public non-zero field element."""
    out = 1
    for _ in range(254):
        out = _times(out, a)
    return out


def _check(threshold: int, points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(1 <= x <= 255 for x in points) or not 1 <= threshold <= len(points):
        raise Aborted("secagg.share_points", "Share points must be distinct, 1..255, at least the threshold.",
                      "Use a cohort of at most 100 sites and a legal threshold.")
