"""Encoding: the error bound, saturation, unbiased rounding, and what is refused."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from privacy.errors import Aborted, UsageError
from privacy.secagg.encoding import CHUNK, WEIGHT_STEPS, Encoding, rounded_weight

KEY = bytes(range(32))


def words(encoding: Encoding, update: np.ndarray[Any, Any], weight: float) -> np.ndarray[Any, Any]:
    """Encoded under a fixed rounding key."""
    return encoding._encode(update, weight, KEY, np.empty(encoding.dim, encoding.dtype))

WEIGHTS = st.floats(2.0**-20, 1)


def most_bits(ring: int, cohort: int) -> int:
    return max(b for b in range(2, 32) if cohort * (2 ** (b - 1) - 1) < 2 ** (ring - 1))


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    ring, cohort = draw(st.sampled_from([16, 32])), draw(st.integers(1, 100))
    bits = draw(st.integers(2, most_bits(ring, cohort)) | st.just(most_bits(ring, cohort)))
    bounds = st.floats(1e-6, 1e6) | st.sampled_from([1.0, 0.1, 2.0**-100, 2.0**100])
    ranges = tuple(draw(st.lists(st.tuples(st.integers(1, 9), bounds), min_size=1, max_size=4)))
    return Encoding(bits=bits, ring=ring, cohort=cohort, ranges=ranges)


def bounds(encoding: Encoding) -> list[float]:
    return [c for count, c in encoding.ranges for _ in range(count)]


def update(draw: Any, encoding: Encoding) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Values inside the range: random ones, its ends, and zero."""
    part = st.floats(-1, 1) | st.sampled_from([-1.0, 0.0, 1.0])
    parts = draw(st.lists(part, min_size=encoding.dim, max_size=encoding.dim))
    values = (np.array(parts) * bounds(encoding)).astype(np.float32)
    return np.where(np.abs(values.astype(float)) > bounds(encoding), np.nextafter(values, np.float32(0)), values)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_value_is_rounded_by_less_than_a_step(data: st.DataObject) -> None:
    """Exactly: against rational arithmetic, at every width."""
    encoding, weight = data.draw(encodings()), data.draw(WEIGHTS)
    x = update(data.draw, encoding)
    got = encoding.encode(x, weight)
    assert got.dtype == (np.uint32 if encoding.ring == 32 else np.uint16)
    for q, value, c in zip(got.view(f"i{encoding.ring // 8}").tolist(), x.tolist(), bounds(encoding), strict=True):
        assert abs(q - Fraction(value) * Fraction(rounded_weight(weight)) * encoding.top / Fraction(c)) < 1
        assert abs(q) <= encoding.top


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_weighted_mean_error_is_within_the_bound(data: st.DataObject) -> None:
    """In exact arithmetic; the mean itself is rounded to float32, which adds half a unit in its last place."""
    encoding = data.draw(encodings())
    n = data.draw(st.integers(1, min(encoding.cohort, 12)))
    weights = data.draw(st.lists(WEIGHTS, min_size=n, max_size=n))
    updates = [update(data.draw, encoding) for _ in range(n)]
    total = np.zeros(encoding.dim, encoding.dtype)
    for x, w in zip(updates, weights, strict=True):
        total += encoding.encode(x, w)
    got = encoding.decode_mean(total, weights)
    assert got.dtype == np.float32
    exact = [Fraction(rounded_weight(w)) for w in weights]
    limits = [b for (count, _), b in zip(encoding.ranges, encoding.error_bound(weights), strict=True) for _ in range(count)]
    for i, c in enumerate(bounds(encoding)):
        assert limits[i] == pytest.approx(float(Fraction(c) / encoding.top * n / sum(exact)))
        want = sum(Fraction(float(x[i])) * w for x, w in zip(updates, exact, strict=True)) / sum(exact)
        assert abs(Fraction(float(got[i])) - want) <= Fraction(limits[i]) + Fraction(abs(float(got[i]))) / 2**24


@settings(max_examples=60, deadline=None)
@given(encodings(), st.sampled_from([1, -1]), st.floats(1, 1e30))
@example(Encoding(bits=31, ring=32, cohort=2, ranges=((2, 0.1),)), 1, 1.0)  # float32(0.1) is above 0.1
def test_a_full_cohort_at_the_ends_of_the_range_does_not_wrap(encoding: Encoding, sign: int, factor: float) -> None:
    """Also where every value lies outside: it counts as the end of its range."""
    x = (sign * np.minimum(np.array(bounds(encoding)) * factor, 3e38)).astype(np.float32)
    total = np.zeros(encoding.dim, encoding.dtype)
    for _ in range(encoding.cohort):
        total += encoding.encode(x, 1.0)
    got = encoding.decode_mean(total, [1.0] * encoding.cohort) / bounds(encoding)
    assert np.abs(got - sign).max() <= 1 / encoding.top + 2.0**-22


@pytest.mark.case(16)
def test_a_value_outside_counts_as_the_end_of_its_range() -> None:
    """With a weight as well: a site can't make up for a low weight by sending more."""
    encoding = Encoding(bits=16, ring=32, cohort=3, ranges=((3, 1.0), (3, 0.1)))
    x = np.array([1, 5, -3e38, 0.1, 1, -1], np.float32)
    full = words(encoding, x, 1.0).view(np.int32)
    assert np.abs(full - np.sign(x) * 32767).max() <= 1  # the last float32 inside is below 0.1, so rounding may go down
    assert full[:3].tolist() == [32767, 32767, -32767]
    half = words(encoding, x, 0.5).view(np.int32)
    assert np.abs(half - np.sign(x) * 16383.5).max() == 0.5


@pytest.mark.parametrize("ring", [16, 32])
@pytest.mark.parametrize("sizes", [(1,), (CHUNK,), (CHUNK - 1, 2), (CHUNK + 1, 7, CHUNK), (3, 2 * CHUNK + 5)])
def test_chunks_and_segments_leave_the_rounding_as_it_is(ring: int, sizes: tuple[int, ...]) -> None:
    """One keystream over the whole vector: 16 bits an element, in order."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    encoding = Encoding(bits=9, ring=ring, cohort=5, ranges=tuple((n, 1.0 + i) for i, n in enumerate(sizes)))
    x = np.random.default_rng(1).uniform(-1, 1, encoding.dim).astype(np.float32)
    stream = np.frombuffer(Cipher(ChaCha20(KEY, bytes(16)), None).encryptor().update(bytes(2 * x.size)), "<u2")
    want = np.floor(x * (0.75 * 255 / np.array(bounds(encoding))) + (stream + 0.5) / 2**16).astype(np.int64)
    assert np.array_equal(words(encoding, x, 0.75), want.astype(encoding.dtype))


def test_rounding_is_unbiased() -> None:
    """Up with the probability of the fraction: exact binomial, 2^18 draws each, fixed key, two-sided, alpha 1e-4."""
    encoding = Encoding(bits=24, ring=32, cohort=2, ranges=((14 * 2**18, float(2**23 - 1)),))
    values = [sign * v for sign in (1, -1) for v in (0.0625, 0.25, 0.5, 0.875, 2**18 + 0.125, 2**18 + 0.5, 2**22 + 0.5)]
    got = words(encoding, np.repeat(np.array(values, np.float32), 2**18), 1.0).view(np.int32).reshape(14, -1)
    for row, value in zip(got, values, strict=True):
        low = int(np.floor(value))
        assert set(row.tolist()) == {low, low + 1}
        ups = int((row == low + 1).sum())
        tail = min(binom.cdf(ups, 2**18, value - low), binom.sf(ups - 1, 2**18, value - low))
        assert tail > 1e-4 / 2 / 14, (value, ups / 2**18)


def test_rounding_is_drawn_anew_for_every_update() -> None:
    encoding = Encoding(bits=8, ring=32, cohort=3, ranges=((256, 1.0),))
    x = np.full(256, 0.3, np.float32)
    assert not np.array_equal(encoding.encode(x, 1.0), encoding.encode(x, 1.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 5, CHUNK, CHUNK + 9])
@pytest.mark.case(12)
def test_not_finite_is_refused(bad: float, at: int) -> None:
    x = np.zeros(CHUNK + 10, np.float32)
    x[at] = bad
    with pytest.raises(Aborted, match=r"encoding\.not_finite"):
        Encoding(bits=16, ring=32, cohort=3, ranges=((5, 1.0), (CHUNK + 5, 2.0))).encode(x, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([16, 32]), st.integers(2, 31), st.integers(1, 5000))
@example(32, 30, 4)
@pytest.mark.case(16)
def test_overflow_is_refused_at_planning(ring: int, bits: int, cohort: int) -> None:
    """Exactly where a full sum would not fit; the mend names the most bits that do."""
    def made(b: int) -> Encoding:
        return Encoding(bits=b, ring=ring, cohort=cohort, ranges=((1, 1.0),))

    if cohort * (2 ** (bits - 1) - 1) <= np.iinfo(f"i{ring // 8}").max:
        made(bits)
        return
    with pytest.raises(UsageError, match=rf"encoding\.overflow: {cohort} sites \* \(2\^{bits - 1} - 1\)") as refused:
        made(bits)
    most = int(refused.value.mend.split()[-3])
    assert most == most_bits(ring, cohort) and made(most)


def test_a_sum_of_half_the_ring_is_one_too_many() -> None:
    with pytest.raises(UsageError, match=r"encoding\.overflow"):
        Encoding(bits=2, ring=16, cohort=2**15, ranges=((1, 1.0),))
    Encoding(bits=2, ring=16, cohort=2**15 - 1, ranges=((1, 1.0),))


@pytest.mark.parametrize("terms", [{"bits": 1}, {"bits": 32}, {"ring": 64}, {"cohort": 0}, {"ranges": ()},
                                   {"ranges": ((0, 1.0),)}, {"ranges": ((1, 0.0),)}, {"ranges": ((1, -1.0),)},
                                   {"ranges": ((1, np.nan),)}, {"ranges": ((1, np.inf),)},
                                   {"ranges": ((1, 1.0), (1, 1e-40))}])
def test_terms_that_cannot_be_used_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"encoding\.terms"):
        Encoding(**{"bits": 16, "ring": 32, "cohort": 3, "ranges": ((1, 1.0),), **terms})


@pytest.mark.parametrize("weight", [0.0, -0.5, 1.0000001, np.nan, np.inf])
def test_a_weight_outside_is_refused(weight: float) -> None:
    encoding = Encoding(bits=16, ring=32, cohort=3, ranges=((1, 1.0),))
    with pytest.raises(UsageError, match=r"encoding\.terms"):
        encoding.encode(np.zeros(1, np.float32), weight)
    with pytest.raises(UsageError, match=r"encoding\.terms"):
        encoding.decode_mean(np.zeros(1, np.uint32), [1.0, weight])


def test_a_weight_is_rounded_to_its_lattice() -> None:
    assert [rounded_weight(w) * WEIGHT_STEPS for w in (1.0, 0.5, 1e-9, 1 / 3)] == [65536, 32768, 1, 21845]


@pytest.mark.parametrize("vector", [np.zeros(3, np.float32), np.zeros((1, 2), np.float32), np.zeros(2),
                                    np.zeros(2, np.uint16)])
def test_another_shape_or_dtype_is_refused(vector: np.ndarray[Any, Any]) -> None:
    encoding = Encoding(bits=16, ring=32, cohort=3, ranges=((2, 1.0),))
    with pytest.raises(Aborted, match=r"encoding\.shape"):
        encoding.encode(vector, 1.0)
    with pytest.raises(Aborted, match=r"encoding\.shape"):
        encoding.decode_mean(vector, [1.0])


@pytest.mark.parametrize("ring", [16, 32])
def test_memory_stays_at_the_output_and_a_chunk(ring: int) -> None:
    """Peak beyond the input, of 2^22 values: at most 1.1 update; to decode, its result."""
    encoding = Encoding(bits=9, ring=ring, cohort=3, ranges=((2**22, 1.0),))
    x = np.zeros(2**22, np.float32)
    tracemalloc.start()
    try:
        words = encoding.encode(x, 1.0)
        encode = tracemalloc.get_traced_memory()[1] - words.nbytes
        tracemalloc.reset_peak()
        mean = encoding.decode_mean(words, [1.0])
        decode = tracemalloc.get_traced_memory()[1] - words.nbytes - mean.nbytes
    finally:
        tracemalloc.stop()
    assert encode <= 0.1 * x.nbytes and decode <= 0.1 * x.nbytes


@pytest.mark.parametrize("ring", [16, 32])
def test_a_consumed_update_gives_the_same_words(ring: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import privacy.secagg.encoding as module

    monkeypatch.setattr(module.secrets, "token_bytes", lambda n: KEY)
    encoding = Encoding(bits=12, ring=ring, cohort=4, ranges=((70_001, 1.0), (9, 0.1)))
    x = np.random.default_rng(0).normal(size=encoding.dim).astype(np.float32)
    kept, gone = x.copy(), x.copy()
    want, got = encoding.encode(kept, 0.7), encoding.encode(gone, 0.7, consume=True)
    assert np.array_equal(want, got) and np.array_equal(kept, x)
    assert np.shares_memory(got, gone) == (ring == 32)
    kept.flags.writeable = False
    assert np.array_equal(encoding.encode(kept, 0.7, consume=True), want), "what can't be written is left alone"


@pytest.mark.case(37)
def test_a_sum_that_no_updates_could_give_is_refused() -> None:
    encoding = Encoding(bits=8, ring=32, cohort=4, ranges=((3, 1.0),))
    weights = [1.0, 0.5, 0.5]
    top = 127 + 64 + 64
    for bad, at in ((top + 1, 0), (-top - 1, 2), (2**31 - 1, 1), (-2**31, 1)):
        total = np.array([top, -top, 0], np.int32)
        encoding.decode_mean(total.view(np.uint32), weights)
        total[at] = bad
        with pytest.raises(Aborted, match=r"encoding\.sum"):
            encoding.decode_mean(total.view(np.uint32), weights)
