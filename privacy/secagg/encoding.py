"""Fixed-point encoding of an update into Z_2^32 or Z_2^16: clip, weight, scale, stochastic rounding, two's complement.

Promise, for values inside the range C of their tensor; one outside counts as the last float32 inside (it never wraps):

    |decoded weighted mean - true weighted mean| <= C / (2^(b-1) - 1) * n w_cap / sum(w)

before the mean itself is rounded to float32. Every site's rounding error is below one step, whatever the float64
arithmetic does: u below keeps 2^-17 away from 0 and 1, and products are off by at most 2^-20 of a step (b <= 31).

q = floor(x w (2^(b-1) - 1) / C + u), with u = (k + 1/2) / 2^16 and k 16 bits of a CSPRNG: |E[q] - the product| <= 2^-17 of
a step. A sum of `cohort` encodings fits the ring with no room to spare, and needs none: noise is added to the update
before it is encoded, so clipping bounds it as well.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from privacy.errors import Aborted, UsageError
from privacy.secagg.prg import Words

WEIGHT_STEPS = 2**16  # weights relative to w_cap = 1 are rounded to multiples of 1/WEIGHT_STEPS
CHUNK = 2**16  # values at a time; what is written stays in a core's L2 cache
RANGE = (2.0**-100, 2.0**100)  # of C: far from where float32 under- or overflows
_ZEROS = memoryview(bytes(2 * CHUNK))


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the values of a round are written. One instance serves every site and the coordinator.

    bits: b, 2 to 31. ring: 32 or 16, the size of a word. cohort: most encodings that are ever summed.
    ranges: (count, C) for each segment of the flat vector, in order; C is the public bound on its coordinates.
    Raises UsageError `encoding.terms`, and `encoding.overflow` where a full sum would not fit the ring.
    """

    bits: int
    ring: int
    cohort: int
    ranges: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if self.ring not in (16, 32) or not 2 <= self.bits <= 31 or self.cohort < 1 or not self.ranges or not all(
                count >= 1 and RANGE[0] <= c <= RANGE[1] for count, c in self.ranges):
            raise UsageError("encoding.terms", f"Bits {self.bits}, ring {self.ring} or a tensor's range can't be used.",
                             "Use 2 to 31 bits, a ring of 16 or 32, and ranges that are positive numbers.")
        if self.cohort * self.top >= 2 ** (self.ring - 1):
            most = ((2 ** (self.ring - 1) - 1) // self.cohort + 1).bit_length()
            raise UsageError("encoding.overflow",
                             f"{self.cohort} sites * (2^{self.bits - 1} - 1) don't fit a {self.ring}-bit ring.",
                             f"Lower secure_aggregation.bits to {most} or less.")

    @property
    def dim(self) -> int:
        return sum(count for count, _ in self.ranges)

    @property
    def top(self) -> int:
        """The integer that C becomes: 2^(b-1) - 1."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def dtype(self) -> np.dtype[np.uint32] | np.dtype[np.uint16]:
        return np.dtype(np.uint32) if self.ring == 32 else np.dtype(np.uint16)

    def encode(self, update: NDArray[np.float32], weight: float, *, consume: bool = False) -> Words:
        """Encode an update, float32 (dim,), into words (dim,). Call it once for each update: rounding is drawn anew.

        weight: w / w_cap, in (0, 1]. consume: the words of a 32-bit ring take the memory of `update`, which is gone then.
        Needs about a megabyte beside input and output.
        Raises Aborted `encoding.shape`, `encoding.not_finite`; UsageError `encoding.terms` for a weight out of range.
        """
        self._check(update, np.dtype(np.float32))
        reuse = consume and self.ring == 32 and update.flags.writeable and update.flags.c_contiguous
        out: Words = update.view(np.uint32) if reuse else np.empty(self.dim, self.dtype)
        return self._encode(update, weight, secrets.token_bytes(32), out)

    def _encode(self, update: NDArray[np.float32], weight: float, key: bytes, out: Words) -> Words:
        """Element i is rounded with the i-th little-endian 16-bit word of `key`'s ChaCha20 keystream."""
        stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        signed = self._signed(out)
        inside, scaled, uniform = np.empty(CHUNK, np.float32), np.empty(CHUNK), np.empty(CHUNK)
        raw = bytearray(2 * CHUNK)
        words = np.frombuffer(raw, "<u2")
        for begin, end, c in self._segments():
            bound, factor = _float32_below(c), rounded_weight(weight) * self.top / c
            for start in range(begin, end, CHUNK):
                size = min(CHUNK, end - start)
                part, x, z, u = update[start:start + size], inside[:size], scaled[:size], uniform[:size]
                if not (np.isfinite(part.min()) and np.isfinite(part.max())):  # both carry NaN
                    raise Aborted("encoding.not_finite", "The update holds a value that is not finite.",
                                  "Check learning rate and clip; the reserved budget stays spent.")
                np.clip(part, -bound, bound, out=x)
                z[:] = x
                z *= factor
                stream.update_into(_ZEROS[:2 * size], raw)
                u[:] = words[:size]
                u += 0.5
                u *= 2.0**-16
                z += u
                np.floor(z, out=z)
                signed[start:start + size] = z
        return out

    def decode_mean(self, total: Words, weights: Sequence[float]) -> NDArray[np.float32]:
        """Weighted mean, float32 (dim,), of the updates whose encodings add up to `total` mod 2^ring.

        weights: of the sites in the sum, at most `cohort`. Raises Aborted `encoding.shape`, `encoding.sum` (a coordinate
        that no updates inside their ranges add up to); UsageError `encoding.terms`.
        """
        self._check(total, self.dtype)
        mass = sum(map(rounded_weight, weights))
        limit = sum(math.ceil(self.top * rounded_weight(w)) for w in weights)
        if int(self._signed(total).max()) > limit or int(self._signed(total).min()) < -limit:
            raise Aborted("encoding.sum", "The sum is larger than all its updates could be.",
                          "The round is void; a site sent something that isn't an encoded update.")
        signed, out = self._signed(total), np.empty(self.dim, np.float32)
        for begin, end, c in self._segments():
            np.multiply(signed[begin:end], c / (self.top * mass), out=out[begin:end], dtype=np.float64, casting="same_kind")
        return out

    def error_bound(self, weights: Sequence[float]) -> tuple[float, ...]:
        """Largest |decoded - true weighted mean| of a coordinate, for each segment: C / top * n w_cap / sum(w)."""
        steps = len(weights) / sum(map(rounded_weight, weights))
        return tuple(c / self.top * steps for _, c in self.ranges)

    def _segments(self) -> Iterator[tuple[int, int, float]]:
        begin = 0
        for count, c in self.ranges:
            yield begin, begin + count, c
            begin += count

    def _signed(self, words: Words) -> NDArray[np.int32] | NDArray[np.int16]:
        return words.view(np.int32) if self.ring == 32 else words.view(np.int16)

    def _check(self, vector: NDArray[Any], dtype: np.dtype[Any]) -> None:
        if vector.shape != (self.dim,) or vector.dtype != dtype:
            raise Aborted("encoding.shape", f"A vector is {vector.dtype} {vector.shape}, not {dtype} ({self.dim},).",
                          "Start every site from the same adapter and release.")


def rounded_weight(weight: float) -> float:
    """w / w_cap on its public lattice, exact in binary floating point. Raises UsageError `encoding.terms` outside (0, 1]."""
    if not 0 < weight <= 1:
        raise UsageError("encoding.terms", "A weight is not above 0 and at most w_cap.", "Use weights in (0, 1].")
    return max(1, round(weight * WEIGHT_STEPS)) / WEIGHT_STEPS


def _float32_below(c: float) -> np.float32:
    """The largest float32 that is at most c, so that clipping needs no float64."""
    near = np.float32(c)
    return near if float(near) <= c else np.nextafter(near, np.float32(0))
