"""Masks, sharing and encoding: properties, and known answers that pin the wire format."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import Aborted, UsageError
from privacy.secagg import prg, shamir
from privacy.secagg import transcript as tr
from privacy.secagg.encoding import Encoding, rounded_weight


def test_known_answers() -> None:
    key = prg.derive_key(b"\x01" * 32, tr.pair_mask_info(b"\x02" * 32, 0, 1))
    vector = np.zeros(3, np.uint32)
    prg.add_masks(vector, [(key, 1)])
    assert key.hex() == "9924f596e38cb109d2be6d3e9439aa27e0f1b77fbc4bf0c20893654904bf2870"
    naive = np.frombuffer(Cipher(ChaCha20(key, bytes(16)), None).encryptor().update(bytes(12)), "<u4")
    assert np.array_equal(vector, naive)


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 200_000])
def test_chunked_keystream_is_the_naive_one(size: int) -> None:
    keys = [bytes([i]) * 32 for i in range(3)]
    got = np.zeros(size, np.uint32)
    prg.add_masks(got, [(keys[0], 1), (keys[1], -1), (keys[2], 1)])
    streams = [np.frombuffer(Cipher(ChaCha20(k, bytes(16)), None).encryptor().update(bytes(4 * size)), "<u4") for k in keys]
    assert np.array_equal(got, streams[0] - streams[1] + streams[2])


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=64), st.integers(1, 6), st.integers(0, 3))
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, t: int, extra: int) -> None:
    shares = shamir.split(secret, threshold=t, points=range(1, t + extra + 1))
    for points in itertools.islice(itertools.combinations(shares, t), 6):
        assert shamir.combine({x: shares[x] for x in points}) == secret


def test_fewer_shares_are_independent_of_the_secret() -> None:
    """t = 2: over 4000 deals, share 1 of 0x00 and of 0xff are both uniform (chi-square, alpha 1e-3)."""
    from scipy.stats import chi2

    for secret in (bytes(4000), b"\xff" * 4000):
        share = shamir.split(secret, threshold=2, points=[1, 2])[1]
        counts = np.bincount(np.frombuffer(share, np.uint8), minlength=256)
        assert ((counts - 4000 / 256) ** 2 / (4000 / 256)).sum() < chi2.isf(1e-3 / 2, 255)


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 40), st.integers(2, 24), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
def test_weighted_mean_error_is_within_the_bound(n: int, bits: int, least: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    enc = Encoding(bits=bits, range=2.0, cohort=n)
    xs = rng.uniform(-2, 2, (n, 20)).astype(np.float32)
    ws = rng.uniform(least, 1, n)
    total = np.zeros(20, np.uint32)
    for x, w in zip(xs, ws, strict=True):
        total += enc.encode(x, w)
    exact = [rounded_weight(w) for w in ws]
    want = np.average(xs.astype(np.float64), axis=0, weights=exact)
    bound = enc.range / enc.top * n / sum(exact)
    assert np.abs(enc.decode_mean(total, list(ws)) - want).max() <= bound + 1e-6


def test_rounding_is_unbiased() -> None:
    """4e5 draws at a quarter step: mean within 5 standard errors."""
    enc = Encoding(bits=4, range=7.0, cohort=3)
    got = enc.encode(np.full(400_000, 0.25, np.float32), 1.0).astype(np.int64).mean()
    assert abs(got - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400_000)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(Aborted, match=r"encoding\.not_finite"):
        Encoding(bits=16, range=1.0, cohort=3).encode(np.array([0, bad], np.float32), 1.0)


def test_overflow_is_refused_at_planning() -> None:
    with pytest.raises(UsageError, match=r"encoding\.overflow"):
        Encoding(bits=31, range=1.0, cohort=4)
    Encoding(bits=29, range=1.0, cohort=4)


def test_out_of_range_is_clipped() -> None:
    enc = Encoding(bits=16, range=1.0, cohort=3)
    got = enc.encode(np.array([5.0, -5.0], np.float32), 1.0).view(np.int32)
    assert got.tolist() == [enc.top, -enc.top]


def test_transcript_binds_every_part() -> None:
    base = [(0, b"a" * 32), (1, b"b" * 32)]
    seen = {tr.t1(b"c" * 32, base), tr.t1(b"d" * 32, base), tr.t1(b"c" * 32, base[::-1]), tr.t1(b"c" * 32, base[:1]),
            tr.t3(b"c" * 32, base), tr.t2(b"c" * 32, base), tr.share_info(b"c" * 32, 0, 1), tr.share_info(b"c" * 32, 1, 0)}
    assert len(seen) == 8
