"""Masks: a ChaCha20 keystream read as little-endian words, added to or subtracted from a vector mod 2^32 or 2^16.

The keystream of a 32-byte key is defined whole (RFC 8439, nonce and counter from zero), a word of the vector's size for
each element. Chunks and threads are implementation details and don't change it (tested).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from privacy.errors import Aborted

Words = NDArray[np.uint32] | NDArray[np.uint16]
Masks = Sequence[tuple[bytes, int]]  # (32-byte key, +1 or -1)

CHUNK = 2**18  # bytes; fits a core's L2 cache together with the vector's chunk
BLOCK = 64  # bytes of keystream for each step of ChaCha20's counter
MAX_BLOCKS = 2**32  # the counter's range
THREADS = min(4, os.cpu_count() or 1)
THREAD_WORK = 2**23  # bytes of keystream; a thread for less costs more than it saves
_ZEROS = memoryview(bytes(CHUNK))


def derive_key(secret: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869), no salt: the 32-byte mask key of a secret in one context."""
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def add_masks(vector: Words, masks: Masks, *, threads: int = THREADS) -> None:
    """Add (+1) or subtract (-1) each key's keystream, in place, mod 2^(word size).

    vector: uint32 or uint16, shape (dim,). Every key is used for one keystream only, hence the fixed nonce.
    threads: at most this many ranges of the vector at once; few values under few keys take one.
    Raises Aborted `secagg.dimension` for another dtype or shape, or where a keystream would repeat.
    """
    if vector.dtype not in (np.uint32, np.uint16) or vector.ndim != 1 or vector.nbytes > MAX_BLOCKS * BLOCK:
        raise Aborted("secagg.dimension", "A vector is too long to be masked, or not one of uint32 or uint16.",
                      "Send fewer values: fewer target layers, or a lower LoRA rank.")
    blocks = -(-vector.nbytes // BLOCK)
    ranges = max(1, min(threads, vector.nbytes * len(masks) // THREAD_WORK))
    starts = [blocks * i // ranges for i in range(ranges + 1)]

    def one(i: int) -> None:
        step = BLOCK // vector.itemsize
        _add_range(vector[starts[i] * step:starts[i + 1] * step], masks, starts[i])

    if ranges == 1:
        one(0)
    else:
        with ThreadPoolExecutor(ranges) as pool:
            list(pool.map(one, range(ranges)))


def _add_range(vector: Words, masks: Masks, block: int) -> None:
    """Chunks outside, keys inside: the vector's chunk stays in cache. block: counter at the vector's first element."""
    nonce = block.to_bytes(4, "little") + bytes(12)
    streams = [(Cipher(ChaCha20(key, nonce), mode=None).encryptor(), sign) for key, sign in masks]
    buffer = bytearray(CHUNK)
    words = np.frombuffer(buffer, vector.dtype.newbyteorder("<"))
    for start in range(0, vector.size, words.size):
        part = vector[start:start + words.size]
        for stream, sign in streams:
            stream.update_into(_ZEROS[:part.nbytes], buffer)
            (np.add if sign > 0 else np.subtract)(part, words[:part.size], out=part)
