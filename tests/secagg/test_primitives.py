"""Masks and sharing: properties, against reference code. Encoding and known answers have files of their own."""

from __future__ import annotations

import os
import secrets
from typing import Any

import numpy as np
import pytest
import reference
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from privacy.errors import Aborted
from privacy.secagg import prg, shamir
from privacy.secagg import transcript as tr

DTYPES = (np.uint32, np.uint16)
KEYS = [bytes([i]) * 32 for i in range(5)]


def masked(vector: np.ndarray[Any, Any], masks: list[tuple[bytes, int]]) -> np.ndarray[Any, Any]:
    """By whole keystreams."""
    out = vector.copy()
    for key, sign in masks:
        stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor().update(bytes(vector.nbytes))
        out = out + np.frombuffer(stream, vector.dtype) * np.array(sign).astype(vector.dtype)
    return out


@settings(max_examples=200, deadline=None)
@given(dtype=st.sampled_from(DTYPES), size=st.integers(0, 700), chunk=st.sampled_from([64, 192, 256]),
       signs=st.lists(st.sampled_from([1, -1]), max_size=5), threads=st.integers(1, 9), seed=st.integers(0, 99))
def test_chunks_and_threads_leave_the_keystream_as_it_is(dtype: type, size: int, chunk: int, signs: list[int], threads: int,
                                                         seed: int) -> None:
    vector = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)
    masks = list(zip(KEYS, signs, strict=False))
    want = masked(vector, masks)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(prg, "CHUNK", chunk)
        m.setattr(prg, "THREAD_WORK", 1)
        prg.add_masks(vector, masks, threads=threads)
    assert np.array_equal(vector, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("past", [-1, 0, 1, 31, 33])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_whole_chunks_and_real_threads(dtype: type, past: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prg, "THREAD_WORK", 2**18)
    vector = np.arange(3 * prg.CHUNK // np.dtype(dtype).itemsize + past).astype(dtype)
    masks = [(KEYS[0], 1), (KEYS[1], -1), (KEYS[2], 1)]
    want = masked(vector, masks)
    prg.add_masks(vector, masks, threads=threads)
    assert np.array_equal(vector, want)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(1, 300), st.binary(min_size=32, max_size=32), st.integers(1, 4))
def test_adding_then_subtracting_is_the_identity(dtype: type, size: int, key: bytes, threads: int) -> None:
    vector = np.arange(size).astype(dtype)
    prg.add_masks(vector, [(key, 1)], threads=threads)
    assert size < 8 or not np.array_equal(vector, np.arange(size).astype(dtype))
    prg.add_masks(vector, [(key, -1)], threads=threads)
    assert np.array_equal(vector, np.arange(size).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_masked_vector_is_uniform(dtype: type) -> None:
    """Chi-square on each byte of 2^20 words, fixed keys, alpha 1e-3 over all bytes: whatever the update was."""
    vector = np.full(2**20, 7, dtype)
    prg.add_masks(vector, [(KEYS[1], 1), (KEYS[2], -1), (KEYS[3], 1)])
    columns = vector.view(np.uint8).reshape(2**20, -1)
    for i in range(columns.shape[1]):
        counts = np.bincount(columns[:, i], minlength=256)
        assert ((counts - 2**12) ** 2 / 2**12).sum() < chi2.isf(1e-3 / columns.shape[1], 255)


@pytest.mark.parametrize("vector", [np.broadcast_to(np.uint32(0), (2**36 + 1,)), np.broadcast_to(np.uint16(0), (2**37 + 1,)),
                                    np.zeros(4, np.int32), np.zeros(4, np.uint64), np.zeros((2, 2), np.uint32)])
def test_what_has_no_keystream_is_refused(vector: np.ndarray[Any, Any]) -> None:
    with pytest.raises(Aborted, match=r"secagg\.dimension"):
        prg.add_masks(vector, [(KEYS[0], 1)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_threshold_of_shares_gives_the_secret_and_every_other_share(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 100))
    t = data.draw(st.integers(1, n))
    points = data.draw(st.lists(st.integers(1, 255), min_size=n, max_size=n, unique=True))
    secret = os.urandom(data.draw(st.integers(1, 2 * shamir.BLOCK + 9)))
    shares = shamir.split(secret, threshold=t, points=points)
    assert list(shares) == points
    some = {x: shares[x] for x in data.draw(st.permutations(points))[:t]}
    assert shamir.combine(some) == secret
    assert shamir.interpolate(some, [0, *points]) == {0: secret, **shares}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(1, 255), min_size=12, max_size=14, unique=True), st.integers(1, 40))
def test_shares_are_those_of_logarithm_tables(t: int, points: list[int], size: int) -> None:
    secret, drawn = os.urandom(size), os.urandom((t - 1) * size)
    shares = shamir.split(secret, threshold=t, points=points, random=lambda n: drawn[:n])
    columns = [[secret[i], *drawn[i::size]] for i in range(size)]
    assert shares == {x: bytes(reference.polynomial(c, x) for c in columns) for x in points}
    at = [0, 77, points[0], points[-1]]
    want = {z: bytes(reference.lagrange({x: shares[x][i] for x in points[:t]}, z) for i in range(size)) for z in at}
    assert shamir.interpolate({x: shares[x] for x in points[:t]}, at) == want


def test_one_share_short_of_two_says_nothing() -> None:
    """Exhaustive: over all coefficients, a share takes every value once, for each of the 256 secrets."""
    shares = shamir.split(np.repeat(np.arange(256, dtype=np.uint8), 256).tobytes(), threshold=2, points=[1, 2, 255],
                          random=lambda n: np.resize(np.arange(256, dtype=np.uint8), n).tobytes())
    for share in shares.values():
        values = np.sort(np.frombuffer(share, np.uint8).reshape(256, 256), axis=1)
        assert (values == np.arange(256)).all()


@pytest.mark.parametrize("secret", range(0, 256, 17))
def test_one_share_short_of_three_says_nothing(secret: int) -> None:
    """Over all pairs of coefficients, every pair of values of two shares comes up once, for 16 secrets."""
    pairs = np.indices((256, 256), np.uint8).tobytes()
    shares = shamir.split(bytes([secret]) * 2**16, threshold=3, points=[3, 200, 9], random=lambda n: pairs[:n])
    a, b, c = (np.frombuffer(s, np.uint8).astype(int) for s in shares.values())
    for seen in (256 * a + b, 256 * a + c, 256 * b + c):
        assert (np.bincount(seen, minlength=2**16) == 1).all()


def test_every_coefficient_is_drawn_from_the_system() -> None:
    assert shamir.split.__kwdefaults__ == {"random": secrets.token_bytes}
    with pytest.raises(ValueError, match="reshape"):  # a byte less than (t - 1) for each byte of the secret
        shamir.split(bytes(64), threshold=7, points=range(1, 11), random=lambda n: bytes(n - 1))
    assert shamir.split(bytes(64), threshold=2, points=[1, 2]) != shamir.split(bytes(64), threshold=2, points=[1, 2])


@pytest.mark.parametrize(("threshold", "points"), [(2, [1, 1]), (2, [0, 1]), (1, [256]), (3, [1, 2]), (0, [1]), (1, [])])
def test_points_that_are_none_are_refused(threshold: int, points: list[int]) -> None:
    with pytest.raises(Aborted, match=r"secagg\.share_points"):
        shamir.split(b"secret", threshold=threshold, points=points)


def test_shares_that_cannot_be_combined_are_refused() -> None:
    with pytest.raises(Aborted, match=r"secagg\.share_length"):
        shamir.combine({1: b"ab", 2: b"a"})
    for shares in ({}, {0: b"a"}, {256: b"a"}):
        with pytest.raises(Aborted, match=r"secagg\.share_points"):
            shamir.combine(shares)


def test_transcript_binds_every_part() -> None:
    base = [(0, b"a" * 32), (1, b"b" * 32)]
    seen = {tr.t1(b"c" * 32, base), tr.t1(b"d" * 32, base), tr.t1(b"c" * 32, base[::-1]), tr.t1(b"c" * 32, base[:1]),
            tr.t3(b"c" * 32, base), tr.t2(b"c" * 32, base), tr.share_info(b"c" * 32, 0, 1), tr.share_info(b"c" * 32, 1, 0)}
    assert len(seen) == 8
