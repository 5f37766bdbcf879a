"""Masks: a ChaCha20 keystream read as little-endian uint32, added to or subtracted from a vector mod 2^32.

The keystream of a 32-byte key is defined whole; chunking is an implementation detail and doesn't change it (tested).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

CHUNK = 2**18  # bytes; fits a core's L2 cache together with the vector's chunk
_ZEROS = bytes(CHUNK)
_NONCE = bytes(16)  # every key is used for one keystream only


def derive_key(secret: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869), no salt: the 32-byte mask key of a secret in one context."""
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def add_masks(vector: NDArray[np.uint32], masks: Iterable[tuple[bytes, int]]) -> None:
    """Add (+1) or subtract (-1) each key's keystream, in place, mod 2^32. Chunks outside, keys inside."""
    streams = [(Cipher(ChaCha20(key, _NONCE), mode=None).encryptor(), sign) for key, sign in masks]
    buffer = bytearray(CHUNK)
    words = np.frombuffer(buffer, dtype="<u4")
    step = CHUNK // 4
    for start in range(0, vector.size, step):
        part = vector[start:start + step]
        for stream, sign in streams:
            stream.update_into(_ZEROS, buffer)
            if sign > 0:
                np.add(part, words[:part.size], out=part)
            else:
                np.subtract(part, words[:part.size], out=part)
