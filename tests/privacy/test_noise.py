"""The mechanism's randomness: scale, shape, independence and support of the noise; Poisson sampling that is Poisson.

Every statistical test is two-sided at ALPHA = 1e-3 on a seeded stream put in place of the CSPRNG (the product has no
seed), so it can't fail by chance in CI; each comes with a planted fault that it must catch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import privacy.noise as noise
from privacy.dpsgd import PerSampleGradients, noisy_mean
from privacy.mechanism import DpMechanism
from privacy.population import Draw, Population

ALPHA = 1e-3
SIGMA, CLIP, Q, N_DECL = 1.3, 0.7, 0.25, 400
Sampler = Callable[[int, float], NDArray[np.int64]]


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(20240229)
    monkeypatch.setattr(noise, "random_words", lambda n: rng.integers(0, 2**64, n, dtype=np.uint64))


def mechanism(**changes: object) -> DpMechanism:
    terms = {"trust": "local", "unit": "record", "adjacency": "add_remove", "sampler": "poisson", "q": Q, "clip": CLIP,
             "sigma": SIGMA, "steps": 1, "delta": 1e-5, "n_decl": N_DECL}
    return DpMechanism(**{**terms, **changes})  # type: ignore[arg-type]


def standard_normal(n: int) -> NDArray[np.float64]:
    return noise.rounded_normal(n, 2.0**20) / 2**20


class Wide(PerSampleGradients):
    """200,000 coordinates and no records: every step is noise only."""

    def __init__(self) -> None:
        self.dim = 200_000

    def clipped(self, draw: Draw, clip: float, physical_batch: int, columns: object = None) -> Iterator[NDArray[np.int64]]:
        assert len(draw) == 0
        yield from ()


def noise_only_step() -> NDArray[np.float64]:
    return noisy_mean(Wide(), Population(0, mechanism()), mechanism(), 32)


def scale_is(step: NDArray[np.float64], sigma: float) -> bool:
    """Chi-square over all coordinates of a step that released noise of standard deviation sigma C / (q n_decl)."""
    deviation = sigma * CLIP * (1 + 2.0**-20 * np.sqrt(step.size)) / (Q * N_DECL)
    p = stats.chi2.cdf(np.sum((step / deviation) ** 2), step.size)
    return bool(ALPHA / 2 < p < 1 - ALPHA / 2)


@pytest.mark.usefixtures("seeded")
def test_noise_scale() -> None:
    assert all(scale_is(noise_only_step(), SIGMA) for _ in range(3))


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_planted_noise_scale_is_caught(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = noise.rounded_normal
    monkeypatch.setattr(noise, "rounded_normal", lambda n, scale: honest(n, factor * scale))
    assert not scale_is(noise_only_step(), SIGMA)


@pytest.mark.usefixtures("seeded")
def test_noise_is_gaussian() -> None:
    """Kolmogorov-Smirnov, and the numbers beyond 3 sigma on each side."""
    z = standard_normal(200_000)
    assert stats.kstest(z, "norm").pvalue > ALPHA
    for side in (z, -z):
        assert stats.binomtest(int((side > 3).sum()), z.size, stats.norm.sf(3)).pvalue > ALPHA


def repeats(streams: list[NDArray[np.float64]]) -> bool:
    """Whether two streams are correlated: |r| over 7 standard errors (false alarm 3e-12 per pair)."""
    r = np.corrcoef(streams)
    return bool(np.abs(r[np.triu_indices(len(streams), 1)]).max() > 7 / np.sqrt(streams[0].size))


def blocks() -> list[NDArray[np.float64]]:
    """Two calls of two keystream blocks each."""
    size = noise.BLOCK
    return [call[i * size:(i + 1) * size] for call in (standard_normal(2 * size) for _ in range(2)) for i in (0, 1)]


def test_noise_is_independent_over_steps_and_blocks() -> None:
    assert not repeats(blocks())
    assert not repeats([*(noise_only_step() for _ in range(3))])


def test_planted_fixed_key_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise.secrets, "token_bytes", lambda n: bytes(n))
    assert repeats(blocks())


def test_every_call_draws_a_fresh_key() -> None:
    words = [noise.random_words(64) for _ in range(4)]
    assert len(np.unique(np.concatenate(words))) == 256


def test_tail_reaches_beyond_12_sigma_and_is_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 53-bit inverse CDF stops at 8.29 sigma: what lies beyond would be a signature of its absence."""
    top = 2**64 - 1
    extreme = np.array([0, 0, top, top, 0, 1, top - 1, top], np.uint64)  # high words, then low ones with the sign bit
    monkeypatch.setattr(noise, "random_words", lambda n: extreme[:n])
    z = noise.rounded_normal(4, 2.0**20) / 2**20
    assert z[0] == -z[1] > 12
    assert z[2] == z[3] == 0, "the largest words are the centre"


@pytest.mark.usefixtures("seeded")
def test_floats_round_as_sixty_digits_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the float is trusted it agrees with exact arithmetic: 2,000 draws, every one computed both ways."""
    rng = np.random.default_rng(5)
    words = rng.integers(0, 2**64, 4000, dtype=np.uint64)
    words[:500] >>= np.uint64(40)  # deep in the tail as well
    monkeypatch.setattr(noise, "random_words", lambda n: words[:n])
    quick = noise.rounded_normal(2000, 1.4 * 2**20)
    monkeypatch.setattr(noise, "UNSURE", 1.0)
    np.testing.assert_array_equal(noise.rounded_normal(2000, 1.4 * 2**20), quick)


def test_a_value_at_a_rounding_boundary_is_decided_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words whose z * scale lies within 1e-12 of n + 1/2: the float alone can't know the side."""
    import mpmath

    with mpmath.workdps(60):
        def bits(value: str) -> int:
            return int(mpmath.ncdf(-mpmath.mpf(value) / 1000) * mpmath.mpf(2) ** 128)

        below, above = bits("700.499999999999999"), bits("700.500000000000001")
    pairs = [(b >> 63, (b & (2**63 - 1)) << 1) for b in (below, above)]
    words = np.array([*(high for high, _ in pairs), *(low for _, low in pairs)], np.uint64)
    monkeypatch.setattr(noise, "random_words", lambda n: words[:n])
    assert noise.rounded_normal(2, 1000.0).tolist() == [700, 701]


def on_lattice(release: NDArray[np.float64]) -> bool:
    points = release * (Q * N_DECL) / noise.pitch(CLIP)
    return bool(np.abs(points - np.rint(points)).max() < 1e-6)


def test_released_values_lie_on_the_lattice() -> None:
    assert on_lattice(noise_only_step())


def test_planted_float_noise_is_told_apart() -> None:
    """Porous float noise (Mironov, CCS 2012): right in scale and shape, but not rounded."""
    assert not on_lattice(standard_normal(1000) * SIGMA * CLIP / (Q * N_DECL))


def test_no_noise_only_without_privacy() -> None:
    assert not noise.lattice_noise(100, sigma=0.0, clip=CLIP).any()


# Poisson sampling


def dispersed(sample: Sampler, n: int = 1000, q: float = 0.1, draws: int = 400) -> bool:
    """Sizes against Binomial(n, q): z of the mean, chi-square of the variance."""
    sizes = np.array([len(sample(n, q)) for _ in range(draws)])
    z = (sizes.mean() - n * q) / np.sqrt(n * q * (1 - q) / draws)
    p = stats.chi2.cdf(np.sum((sizes - n * q) ** 2) / (n * q * (1 - q)), draws)
    return bool(abs(z) < stats.norm.isf(ALPHA / 2) and ALPHA / 2 < p < 1 - ALPHA / 2)


def overlapping(sample: Sampler, n: int = 1000, q: float = 0.1, draws: int = 400) -> bool:
    """Consecutive batches share Binomial(n, q^2) units: z of the mean."""
    batches = [sample(n, q) for _ in range(draws)]
    shared = [len(np.intersect1d(a, b)) for a, b in pairwise(batches)]
    z = (np.mean(shared) - n * q * q) / np.sqrt(n * q * q * (1 - q * q) / len(shared))
    return bool(abs(z) < stats.norm.isf(ALPHA / 2))


def even(sample: Sampler, n: int = 200, q: float = 0.3, draws: int = 500) -> bool:
    """Inclusions of every unit against Binomial(draws, q): chi-square."""
    counts = sum(np.bincount(sample(n, q), minlength=n) for _ in range(draws))
    p = stats.chi2.sf(np.sum((counts - draws * q) ** 2) / (draws * q * (1 - q)), n)
    return bool(p > ALPHA)


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("holds", [dispersed, overlapping, even])
def test_sampling_is_poisson(holds: Callable[[Sampler], bool]) -> None:
    assert holds(noise.poisson_sample)


def fixed_size() -> Sampler:
    rng = np.random.default_rng(0)
    return lambda n, q: rng.choice(n, int(n * q), replace=False)


def shuffled() -> Sampler:
    """Epochs of a shuffled order, cut into batches: 3.82 claimed, at least 8.00 true."""
    rng, left = np.random.default_rng(0), []

    def sample(n: int, q: float) -> NDArray[np.int64]:
        if not left:
            left.extend(np.array_split(rng.permutation(n), round(1 / q)))
        return left.pop()

    return sample


def forgets_unit_0() -> Sampler:
    rng = np.random.default_rng(0)
    return lambda n, q: 1 + np.flatnonzero(rng.random(n - 1) < q)


@pytest.mark.parametrize(("planted", "catches"),
                         [(fixed_size, dispersed), (shuffled, dispersed), (shuffled, overlapping),
                          (forgets_unit_0, even)])
def test_planted_sampler_is_caught(planted: Callable[[], Sampler], catches: Callable[[Sampler], bool]) -> None:
    assert not catches(planted())


def test_sampling_at_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noise.poisson_sample(0, 0.5).size == 0
    np.testing.assert_array_equal(noise.poisson_sample(50, 1.0), np.arange(50))
    monkeypatch.setattr(noise, "random_words", lambda n: np.full(n, 2**64 - 1, np.uint64))
    assert len(noise.poisson_sample(3, 1.0)) == 3, "q = 1 includes everyone, whatever the words"
    assert len(noise.poisson_sample(3, np.nextafter(1.0, 0.0))) == 0
    monkeypatch.setattr(noise, "random_words", lambda n: np.full(n, 2**63, np.uint64))
    assert len(noise.poisson_sample(3, 0.5)) == 0, "a word at q 2^64 is outside: the probability is at most q"
