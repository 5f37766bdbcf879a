"""Shamir secret sharing (CACM 1979) over GF(2^8), byte by byte, for whole strings of secrets at once.

Field: x^8 + x^4 + x^3 + x + 1 (AES, FIPS 197). At most 255 holders, x = 1..255; the secret lies at 0. Multiplication by a
public element is linear over GF(2): dealing and interpolation are each a product of a public bit matrix with the secrets
times 1, 2, 4, ... 128, so no branch and no table look-up depends on a secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from privacy.errors import Aborted

Bytes = NDArray[np.uint8]
BLOCK = 1024  # bytes of a share at a time: eight multiples of 100 shares fit a core's L2 cache


def split(secret: bytes, *, threshold: int, points: Sequence[int],
          random: Callable[[int], bytes] = secrets.token_bytes) -> dict[int, bytes]:
    """Shares of a byte string for the given points (distinct, 1..255); any `threshold` of them give it back.

    random: n -> n uniform bytes, the coefficients of x, then of x^2, and so on; another one only to test.
    Raises Aborted `secagg.share_points`.
    """
    _check(threshold, points)
    size = len(secret)
    coefficients = np.frombuffer(secret + random((threshold - 1) * size), np.uint8).reshape(threshold, size)
    powers = np.ones((len(points), threshold), np.uint8)
    for j in range(1, threshold):
        powers[:, j] = _PRODUCT[powers[:, j - 1], np.array(points)]
    return {x: share.tobytes() for x, share in zip(points, _multiply(powers, coefficients), strict=True)}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from exactly the shares given (callers pass `threshold` of them). Raises like `interpolate`."""
    return interpolate(shares, [0])[0]


def interpolate(shares: Mapping[int, bytes], at: Sequence[int]) -> dict[int, bytes]:
    """Values at other points of the polynomial of least degree through all the shares given (Lagrange).

    A further share that differs from the value at its point was not dealt with these.
    Raises Aborted `secagg.share_points` and `secagg.share_length`.
    """
    points = list(shares)
    _check(len(points), points)
    if len({len(s) for s in shares.values()}) != 1:
        raise Aborted("secagg.share_length", "Shares differ in length.", "The round is void; start a new attempt.")
    data = np.frombuffer(b"".join(shares.values()), np.uint8).reshape(len(points), -1)
    x, z = np.array(points, np.uint8), np.array(at, np.uint8)[:, None]
    weights = np.ones((len(at), len(points)), np.uint8)
    for m in range(len(points)):
        ratio = _PRODUCT[z ^ x[m], _INVERSE[x ^ x[m]]]
        ratio[:, m] = 1
        weights = _PRODUCT[weights, ratio]
    return {point: value.tobytes() for point, value in zip(at, _multiply(weights, data), strict=True)}


def _multiply(matrix: Bytes, data: Bytes) -> Bytes:
    """Public matrix (m, k) times data (k, length) over GF(2^8)."""
    m, k = matrix.shape
    used = np.unpackbits(matrix[:, None], axis=1, bitorder="little").reshape(m, 8 * k).astype(bool)
    out = np.empty((m, data.shape[1]), np.uint8)
    for start in range(0, data.shape[1], BLOCK):
        part = data[:, start:start + BLOCK]
        doubled = np.empty((8, *part.shape), np.uint8)  # part times 1, 2, 4, ... 128
        doubled[0] = part
        for i in range(1, 8):
            doubled[i] = (doubled[i - 1] << 1) ^ (doubled[i - 1] >> 7) * 0x1B
        rows = doubled.reshape(8 * k, -1)
        for i in range(m):
            np.bitwise_xor.reduce(rows[used[i]], axis=0, out=out[i, start:start + BLOCK])
    return out


def _product_table() -> Bytes:
    """Products of all pairs of field elements, (256, 256); only public elements index it."""
    a, b = np.arange(256)[:, None], np.arange(256)
    out = np.zeros((256, 256), np.int64)
    for bit in range(8):
        out ^= a * ((b >> bit) & 1)
        a = (a << 1) ^ (0x11B * (a >> 7))
    return out.astype(np.uint8)


_PRODUCT = _product_table()
_INVERSE = (_PRODUCT == 1).argmax(axis=1)  # 0 for 0, which nothing uses


def _check(threshold: int, points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(1 <= x <= 255 for x in points) or not 1 <= threshold <= len(points):
        raise Aborted("secagg.share_points", "Share points must be distinct, 1..255, at least the threshold.",
                      "Use a cohort of at most 100 sites and a legal threshold.")
