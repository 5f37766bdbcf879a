"""Post-processing: norm clip, FedProx after the noise, server optimisers, few bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.contract import RuleTerms
from privacy.mechanism import DpMechanism
from privacy.secagg.encoding import Encoding
from strategies.clip import clip_norm, honest_norm, norm
from strategies.optimizers import OPTIMIZERS, optimizer, stepped
from strategies.prox import local_step

SEEDS = st.integers(0, 2**32 - 1)


def named(seed: int, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (size * rng.standard_normal(shape)).astype(np.float32) for name, shape in (("a", (3, 5)), ("b", (7,)))}


@given(SEEDS, st.floats(1e-3, 1e6), st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
@pytest.mark.case(37)
def test_clip_keeps_direction_and_joint_norm(seed: int, size: float, limit: float) -> None:
    before = named(seed, size)
    after = clip_norm(before, limit)
    assert norm(after) <= limit
    if norm(before) <= limit:
        assert all(after[n].tobytes() == v.tobytes() for n, v in before.items())
    else:
        assert norm(after) == pytest.approx(limit, rel=1e-5)
        for n, v in before.items():  # by one factor, not by tensor
            np.testing.assert_allclose(after[n] * norm(before), v * norm(after), rtol=1e-4, atol=1e-6 * size * limit)


def mechanism(**terms: object) -> DpMechanism:
    return DpMechanism(**{"trust": "local", "unit": "record", "adjacency": "add_remove", "sampler": "poisson", "q": 0.5,
                          "clip": 5.0, "sigma": 1.5, "steps": 2, "delta": 1e-5, "n_decl": 100} | terms)  # type: ignore[arg-type]


def test_default_limit_never_touches_an_honest_update_and_is_not_idle() -> None:
    """2,000 updates of pure noise and a full clip each; a limit without the noise's share would cut every one."""
    m, dim, lr = mechanism(), 400, 0.7
    rng = np.random.default_rng(0)
    noise = rng.normal(0, m.sigma * m.clip / m.denominator, (2000, m.steps, dim))
    noise[:, :, 0] += m.clip  # records that all pull the same way
    lengths = np.linalg.norm(lr * noise.sum(axis=1), axis=1)
    assert lengths.max() < honest_norm(m, dim, lr) < 3 * lengths.max()
    assert honest_norm(mechanism(sigma=0.0, trust="none"), dim, lr) == pytest.approx(lr * m.steps * 2 * m.clip)


def test_prox_without_pull_is_sgd_bit_by_bit() -> None:
    rng = np.random.default_rng(0)
    moved, mean = rng.standard_normal(1000).astype(np.float32), rng.standard_normal(1000)
    sgd = moved - (0.3 * mean).astype(np.float32)
    assert local_step(moved, mean, local_lr=0.3, mu=0.0).tobytes() == sgd.tobytes()


def test_prox_pulls_towards_the_rounds_adapter() -> None:
    """Without gradients a change decays by (1 - lr mu) a step, and with a constant one it settles at -g / mu."""
    moved, none, g = np.ones(3, np.float32), np.zeros(3), np.full(3, 2.0)
    np.testing.assert_allclose(local_step(moved, none, local_lr=0.5, mu=0.4), 0.8 * moved, rtol=1e-6)
    for _ in range(200):
        moved = local_step(moved, g, local_lr=0.5, mu=0.4)
    np.testing.assert_allclose(moved, -g / 0.4, rtol=1e-5)


def test_prox_is_after_the_noise_and_not_within_the_clip() -> None:
    """Planted: the pull inside each record's gradient is clipped with it, and is weaker the further the adapter moved."""
    moved, clip, mu = np.full(4, 100.0, np.float32), 1.0, 0.5
    records = np.random.default_rng(0).normal(size=(50, 4)) * 0.1
    mean = np.mean([g * min(1.0, clip / np.linalg.norm(g)) for g in records], axis=0)
    inside = np.mean([(g + mu * moved) * min(1.0, clip / np.linalg.norm(g + mu * moved)) for g in records], axis=0)
    right = moved - local_step(moved, mean, local_lr=1.0, mu=mu)
    wrong = moved - local_step(moved, inside, local_lr=1.0, mu=0.0)
    np.testing.assert_allclose(right, mean + mu * moved, rtol=1e-5)
    assert np.linalg.norm(wrong) <= 1.0 + 1e-6 < 0.02 * np.linalg.norm(right)


@given(SEEDS, st.sampled_from(sorted(OPTIMIZERS)))
@settings(max_examples=40, deadline=None)
def test_stepping_by_tensor_is_stepping_on_the_flat_vector(seed: int, name: str) -> None:
    terms = RuleTerms(optimizer=name, momentum=0.8)
    state, flat = {}, np.zeros(22, np.float32)
    for i in range(3):
        change = named(seed + i)
        update, state = stepped(terms, change, state)
        whole, flat = optimizer(name)(terms, np.concatenate([v.ravel() for v in change.values()]), flat)
        np.testing.assert_array_equal(np.concatenate([v.ravel() for v in update.values()]), whole)
        assert all(v.dtype == np.float32 and v.shape == change[n].shape for n, v in update.items())


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_fedavgm_without_momentum_is_fedavg_bit_by_bit(seed: int) -> None:
    terms, delta, zero = RuleTerms(momentum=0.0, server_lr=1.0), named(seed)["b"], np.zeros(7, np.float32)
    assert optimizer("fedavgm")(terms, delta, zero)[0].tobytes() == optimizer("fedavg")(terms, delta, zero)[0].tobytes()
    assert optimizer("fedavg")(terms, delta, zero)[0].tobytes() == delta.tobytes()


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_optimizers_follow_the_papers_algorithm_2(name: str) -> None:
    """Written out in float64: m, v from tau^2, no bias correction; planted variants are told apart."""
    terms = RuleTerms(optimizer=name, momentum=0.9, beta2=0.99, tau=1e-2, server_lr=0.1)
    rng = np.random.default_rng(0)
    deltas = [rng.normal(0, s, 50).astype(np.float32) for s in (1.0, 0.1, 0.01, 1.0)]

    def paper(start: float, correct: bool) -> np.ndarray:
        m, v, out = np.zeros(50), np.full(50, start), np.zeros(50)
        for t, d in enumerate(deltas, 1):
            m = 0.9 * m + 0.1 * d
            v = 0.99 * v + 0.01 * d**2 if name == "fedadam" else v - 0.01 * d**2 * np.sign(v - d**2)
            a, b = (m / (1 - 0.9**t), v / (1 - 0.99**t)) if correct else (m, v)
            out = 0.1 * a / (np.sqrt(b) + 1e-2)
        return out

    state = np.zeros(50, np.float32)
    for d in deltas:
        update, state = optimizer(name)(terms, d, state)
    np.testing.assert_allclose(update, paper(1e-4, False), rtol=1e-4)
    for wrong in (paper(0.0, False), paper(1e-4, True)):
        assert np.abs(update - wrong).max() > 1e-3 * np.abs(update).max()


def test_fedyogi_forgets_a_large_change_more_slowly_than_fedadam() -> None:
    v = {}
    for name in ("fedadam", "fedyogi"):
        state = np.zeros(1, np.float32)
        for delta in (10.0, *[0.01] * 50):
            _, state = optimizer(name)(RuleTerms(optimizer=name), np.array([delta], np.float32), state)
        v[name] = float(state[1, 0])
    assert v["fedyogi"] > 1.5 * v["fedadam"]


def test_a_range_of_each_sites_own_would_mean_nothing() -> None:
    """8 bits on one public range; planted: integers of two ranges, added up and read on one of them."""
    x = np.array([0.1, -0.4, 0.25], np.float32)
    mine, other = (Encoding(bits=8, ring=16, cohort=2, ranges=((3, c),)) for c in (1.0, 0.5))
    right = mine.decode_mean(mine.encode(x, 1.0) + mine.encode(x, 1.0), [1.0, 1.0])
    wrong = mine.decode_mean(mine.encode(x, 1.0) + other.encode(x, 1.0), [1.0, 1.0])
    assert np.abs(right - x).max() <= 1 / 127 < 0.1 < np.abs(wrong - x).max()


@given(SEEDS, st.integers(2, 8), st.sampled_from([(8, 16), (12, 32), (24, 32)]))
@settings(max_examples=40, deadline=None)
def test_secure_sum_is_the_plain_sum_within_its_bound(seed: int, sites: int, form: tuple[int, int]) -> None:
    """K C / (2^(b-1) - 1) for the sum of K vectors of weight 1."""
    (bits, ring), rng = form, np.random.default_rng(seed)
    updates = rng.uniform(-3, 3, (sites, 100)).astype(np.float32)
    encoding = Encoding(bits=bits, ring=ring, cohort=sites, ranges=((100, 3.0),))
    total = np.zeros(100, encoding.dtype)
    for u in updates:
        total += encoding.encode(u, 1.0)
    secure = sites * encoding.decode_mean(total, [1.0] * sites).astype(np.float64)
    error = np.abs(secure - updates.sum(axis=0, dtype=np.float64))
    bound = sites * 3.0 / (2 ** (bits - 1) - 1)
    assert error.max() <= bound + sites * 3.0 * 2.0**-24
