"""The primitives written a second time, slowly and from their definitions: plain integers, no numpy, no cryptography."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from fractions import Fraction

EXP = [1]
for _ in range(254):  # powers of 3, a generator of GF(2^8)*
    doubled = EXP[-1] << 1
    EXP.append(EXP[-1] ^ (doubled ^ 0x11B if doubled & 0x100 else doubled))
LOG = {value: power for power, value in enumerate(EXP)}


def times(a: int, b: int) -> int:
    return EXP[(LOG[a] + LOG[b]) % 255] if a and b else 0


def over(a: int, b: int) -> int:
    return EXP[(LOG[a] - LOG[b]) % 255] if a else 0


def polynomial(coefficients: Sequence[int], x: int) -> int:
    total, power = 0, 1
    for c in coefficients:
        total, power = total ^ times(c, power), times(power, x)
    return total


def lagrange(shares: Mapping[int, int], at: int) -> int:
    total = 0
    for x, share in shares.items():
        weight = 1
        for other in shares:
            if other != x:
                weight = times(weight, over(at ^ other, x ^ other))
        total ^= times(weight, share)
    return total


def chacha20(key: bytes, counter: int) -> bytes:
    """One block of RFC 8439, 2.3, with nonce zero."""

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) & 0xFFFFFFFF
            mixed = s[z] ^ s[x]
            s[z] = (mixed << turn | mixed >> (32 - turn)) & 0xFFFFFFFF

    start = [int.from_bytes(b"expand 32-byte k"[i:i + 4], "little") for i in range(0, 16, 4)]
    start += [int.from_bytes(key[i:i + 4], "little") for i in range(0, 32, 4)] + [counter, 0, 0, 0]
    s = start.copy()
    for _ in range(10):
        for i in range(4):
            quarter(i, i + 4, i + 8, i + 12)
        for i in range(4):
            quarter(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12)
    return b"".join(((a + b) & 0xFFFFFFFF).to_bytes(4, "little") for a, b in zip(s, start, strict=True))


def words(key: bytes, size: int, *, first: int, count: int) -> list[int]:
    """Little-endian words of `size` bytes of a key's keystream, from the word with index `first`."""
    begin, end = first * size, (first + count) * size
    stream = b"".join(chacha20(key, block) for block in range(begin // 64, -(-end // 64)))[begin % 64:]
    return [int.from_bytes(stream[i:i + size], "little") for i in range(0, count * size, size)]


def encoded(x: float, *, bits: int, c: float, weight: Fraction, word: int) -> int:
    """floor(x w (2^(b-1) - 1) / C + (word + 1/2) / 2^16), exactly, of a value inside its range."""
    return (Fraction(x) * weight * (2 ** (bits - 1) - 1) / Fraction(c) + Fraction(2 * word + 1, 2**17)).__floor__()


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 with SHA-256 and no salt."""
    key = hmac.digest(bytes(32), secret, "sha256")
    out = block = b""
    for i in range(-(-length // 32)):
        block = hmac.digest(key, block + info + bytes([i + 1]), "sha256")
        out += block
    return out[:length]


def labelled_hash(label: str, *parts: bytes | int) -> bytes:
    """SHA-256 of label and parts, each after its length: 8 bytes, little-endian; integers as 8 bytes as well."""
    raw = [label.encode(), *(p.to_bytes(8, "little") if isinstance(p, int) else p for p in parts)]
    return hashlib.sha256(b"".join(len(r).to_bytes(8, "little") + r for r in raw)).digest()
