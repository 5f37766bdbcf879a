"""The adapter's spec, codec, digest and start; rules and server optimisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.contract import RuleTerms
from privacy.errors import Refused, UsageError
from strategies.adapter import AdapterSpec, adapter_digest, initial
from strategies.optimizers import optimizer
from strategies.rules import RULES, rule

A, B = "layer.0.query.lora_A.weight", "layer.0.query.lora_B.weight"
SHAPES = ((A, (3, 8)), (B, (8, 3)), ("head.weight", (2, 8)), ("head.bias", (2,)))
SPEC = AdapterSpec(SHAPES, frozenset({B, "head.weight", "head.bias"}))
Change = Callable[[dict[str, Any]], None]


def tensors(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES}


def reshape(t: dict[str, Any]) -> None:
    t[B] = t[B].T


def other_rank(t: dict[str, Any]) -> None:
    t[B] = np.zeros((8, 4), np.float32)


def scalar(t: dict[str, Any]) -> None:
    t[B] = np.float32(0).reshape(())


def double(t: dict[str, Any]) -> None:
    t[B] = t[B].astype(np.float64)


def half(t: dict[str, Any]) -> None:
    t[B] = t[B].astype(np.float16)


def integer(t: dict[str, Any]) -> None:
    t[B] = t[B].astype(np.int32)


def missing(t: dict[str, Any]) -> None:
    del t[B]


def extra(t: dict[str, Any]) -> None:
    t["layer.9.smuggled"] = t[B]


def nan(t: dict[str, Any]) -> None:
    t[B][0, 0] = np.nan


def infinite(t: dict[str, Any]) -> None:
    t[B][-1, -1] = -np.inf


@pytest.mark.parametrize("change", [reshape, other_rank, scalar, double, half, integer, missing, extra, nan, infinite])
@pytest.mark.case(13)
def test_foreign_tensor_is_refused_by_name(change: Change) -> None:
    given_ = tensors()
    change(given_)
    with pytest.raises(Refused, match="smuggled" if change is extra else "lora_B") as caught:
        SPEC.check(given_)
    assert caught.value.code == "adapter.tensor"


def test_check_returns_the_tensors_in_canonical_order() -> None:
    shuffled = dict(reversed(tensors().items()))
    assert list(SPEC.check(shuffled)) == [name for name, _ in SHAPES]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_pack_and_unpack_are_inverse(seed: int) -> None:
    before = tensors(seed)
    packed = SPEC.pack(before)
    assert packed.shape == (SPEC.size,)
    after = SPEC.unpack(packed)
    assert list(after) == list(before)
    assert all(before[n].tobytes() == after[n].tobytes() for n in before)


@pytest.mark.parametrize("vector", [np.zeros(SPEC.size - 1, np.float32), np.zeros(SPEC.size + 1, np.float32),
                                    np.zeros((1, SPEC.size), np.float32), np.zeros(SPEC.size, np.float64),
                                    np.zeros(SPEC.size, np.int32), np.full(SPEC.size, np.nan, np.float32)])
@pytest.mark.case(13)
def test_vector_off_the_wire_is_checked(vector: Any) -> None:
    with pytest.raises(Refused):
        SPEC.unpack(vector)


def test_add_moves_the_trained_tensors_only() -> None:
    before, delta = tensors(), np.arange(SPEC.dim, dtype=np.float32)
    after = SPEC.add(before, delta)
    assert after[A].tobytes() == before[A].tobytes()
    np.testing.assert_allclose(SPEC.flatten(after) - SPEC.flatten(before), delta, atol=1e-5)
    with pytest.raises(Refused):
        SPEC.add(before, delta[:-1])


@given(st.sampled_from([name for name, _ in SHAPES]), st.integers(0, 1_000), st.integers(0, 31))
@settings(max_examples=50, deadline=None)
def test_digest_changes_with_any_bit(name: str, at: int, bit: int) -> None:
    changed = tensors()
    words = changed[name].reshape(-1).view(np.uint32)
    words[at % words.size] ^= np.uint32(1 << bit)
    assert adapter_digest(changed) != adapter_digest(tensors())


def test_digest_binds_names_and_shapes_but_not_order_or_layout() -> None:
    t = tensors()
    want = adapter_digest(t)
    assert adapter_digest(dict(reversed(t.items()))) == want
    assert adapter_digest({n: np.asfortranarray(v) for n, v in t.items()}) == want
    assert adapter_digest({**t, A: t[A].reshape(8, 3)}) != want
    assert adapter_digest({(n + "x" if n == A else n): v for n, v in t.items()}) != want


def test_initial_is_orthonormal_public_and_differs_by_tensor_and_seed() -> None:
    other = "layer.1.query.lora_A.weight"
    spec = AdapterSpec((*SHAPES, (other, (3, 8))), SPEC.trained)
    start = initial(spec, 7)
    np.testing.assert_allclose(start[A] @ start[A].T, np.eye(3), atol=1e-6)
    assert not any(start[n].any() for n in (B, "head.weight", "head.bias"))
    assert adapter_digest(start) == adapter_digest(initial(spec, 7))
    assert adapter_digest(start) != adapter_digest(initial(spec, 8))
    assert not np.allclose(start[A], start[other])
    assert spec.check(start)


def test_mean_of_products_is_product_of_means_exactly_for_ffa() -> None:
    """What makes ffa exact under a secure sum, and fedit not."""
    one, two = tensors(1), tensors(2)

    def gap(name: str) -> float:
        mean = {n: (one[n] + two[n]) / 2 if RULES[name].trains(n) else one[n] for n in (A, B)}
        second = {n: two[n] if RULES[name].trains(n) else one[n] for n in (A, B)}
        want = (one[B] @ one[A] + second[B] @ second[A]) / 2
        return float(np.abs(mean[B] @ mean[A] - want).max())

    assert gap("ffa") < 1e-5
    assert gap("fedit") > 0.1


def test_unknown_rule_and_optimizer_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="'fedit'") as caught:
        rule("feditt", secure=True)
    assert caught.value.code == "rule.unknown"
    with pytest.raises(UsageError, match="'fedavg'") as caught:
        optimizer("fedavgg")
    assert caught.value.code == "optimizer.unknown"


def test_server_optimizers() -> None:
    terms, delta = RuleTerms(server_lr=0.5, momentum=0.5), np.ones(3, np.float32)
    zero = np.zeros(3, np.float32)
    update, state = optimizer("fedavg")(terms, delta, zero)
    np.testing.assert_array_equal(update, 0.5 * delta)
    assert not state.any()
    update, state = optimizer("fedavgm")(terms, delta, zero)
    update, state = optimizer("fedavgm")(terms, delta, state)
    np.testing.assert_array_equal(state, 1.5 * delta)
    np.testing.assert_array_equal(update, 0.75 * delta)
    assert update.dtype == np.float32
