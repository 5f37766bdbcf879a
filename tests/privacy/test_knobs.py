"""What a site may choose about a step (precision, checkpointing, physical batch) leaves the mechanism as it is.

The conformance suite again, under each choice: gradients are per-record autograd's under the same choice, one item moves
the sum by at most the clip, batches share one draw; and a batch that doesn't fit in memory is an error of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy import dpsgd, fused
from privacy.compute import Compute, Engine, Precision
from privacy.dpsgd import ClippedGradients, noisy_mean
from privacy.engine import gradients
from privacy.errors import Refused, UsageError
from privacy.mechanism import DpMechanism
from privacy.noise import pitch
from privacy.population import Draw, Population
from tests.privacy.engine_cases import KINDS, RECORDS, Case, dropping, make
from tests.privacy.test_engines import EVERYONE, dropout_is_right, total, untouched, worst

ALONE = np.ones(RECORDS, np.int64)
KNOBS: dict[str, tuple[Engine, dict[str, Any]]] = {
    "bfloat16, opacus": ("opacus", {"precision": "bfloat16"}),
    "bfloat16, fused": ("fused", {"precision": "bfloat16"}),
    "checkpointing": ("fused", {"checkpointing": True}),
    "both": ("fused", {"precision": "bfloat16", "checkpointing": True})}


def build(knob: str, case: Case) -> ClippedGradients:
    engine, choices = KNOBS[knob]
    return gradients(engine, case.module, case.parameters, lambda rows: case.losses(rows), **choices)


def exact(case: Case) -> NDArray[np.float64]:
    """Autograd of each record alone in float64, (records, dim)."""
    reference = case.exactly()
    return np.array([reference.alone(i) for i in EVERYONE])


# Checkpointing


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    case = make(KINDS[kind])
    want, grads = exact(case), build("checkpointing", case)
    norm, gradient = worst(grads._chunk(EVERYONE), want)
    assert norm <= 1e-5
    assert gradient <= 2e-5
    assert untouched(case.module)


def kept_bytes(knob: bool) -> int:
    """Bytes that a forward and backward pass keep, outside of what is computed twice."""
    case, total = make(KINDS["every linear layer"]), 0
    grads = gradients("fused", case.module, case.parameters, case.losses, checkpointing=knob)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grads._chunk(EVERYONE)
    return total


def test_checkpointing_keeps_less() -> None:
    assert kept_bytes(True) < kept_bytes(False) / 2


def dropped(plant: Callable[[], None] = lambda: None) -> bool:
    plant()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr("tests.privacy.test_engines.build", lambda engine, case: build("checkpointing", case))
        return dropout_is_right("fused", make(dropping))


def test_the_second_pass_uses_the_masks_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dropped()
    from torch.utils.checkpoint import checkpoint

    monkeypatch.setattr(fused, "_twice", lambda forward: lambda *a, **k: checkpoint(
        forward, *a, use_reentrant=False, preserve_rng_state=False, **k))
    assert not dropped(), "planted: other masks in the second pass"


def test_checkpointing_under_hooks_is_refused() -> None:
    """Opacus would count one use twice; `auto` must not fall back to it silently."""
    with pytest.raises(UsageError, match="fused engine") as caught:
        case = make(KINDS["llama"])
        gradients("opacus", case.module, case.parameters, case.losses, checkpointing=True)
    assert caught.value.code == "dp.checkpointing"
    net = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    with pytest.raises(UsageError) as caught:
        gradients("auto", net, dict(net.named_parameters()), lambda rows: net(rows).sum(1), checkpointing=True)
    assert caught.value.code == "dp.checkpointing"


def test_planted_checkpoint_under_hooks_has_no_gradients() -> None:
    """What the refusal protects from: hooks that see every layer twice."""
    case = make(KINDS["llama"])
    for layer in case.module.base_model.model.model.layers:
        layer.forward = fused._twice(layer.forward)
    with pytest.raises(UsageError) as caught:
        gradients("opacus", case.module, case.parameters, case.losses).check(3)
    assert caught.value.code == "dp.no_per_sample_gradient"


# bfloat16


def far(got: NDArray[Any], want: NDArray[np.float64]) -> float:
    """Relative distance over all records together."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def in_bfloat16(case: Case) -> NDArray[np.float64]:
    """Autograd of each record alone under autocast, (records, dim)."""
    out = []
    for i in EVERYONE:
        with torch.autocast("cpu", torch.bfloat16):
            loss = case.losses(np.array([i])).sum()
        parts = torch.autograd.grad(loss, list(case.parameters.values()))
        out.append(torch.cat([part.ravel() for part in parts]).double().numpy())
    return np.array(out)


@pytest.mark.parametrize("knob", ["bfloat16, opacus", "bfloat16, fused", "both"])
@pytest.mark.parametrize("kind", ["llama", "every linear layer", "bias of the layer", "bias of B", "layer norm", "rms norm",
                                  "lm_head", "one layer for all depths", "a base that is trained"])
def test_bfloat16_gradients_are_as_near_as_those_of_per_record_autograd_in_bfloat16(kind: str, knob: str) -> None:
    case = make(KINDS[kind])
    want, auto = exact(case), in_bfloat16(case)
    got = build(knob, case)._chunk(EVERYONE)
    assert got.dtype == np.float32
    assert far(got, want) <= 2.5 * far(auto, want)  # the median over draws is 1.0; one draw may be luckier than another
    assert far(got, auto) <= 0.08
    assert far(got, auto) > 0 or "opacus" in knob, "the knob does something"
    assert far(np.roll(got, 1, axis=0), auto) > 0.5, "planted: another record's gradient"


def test_losses_and_weights_stay_in_float32() -> None:
    case = make(KINDS["lm_head"])
    grads = build("both", case)
    grads.check(3)
    assert {p.dtype for p in case.module.parameters()} == {torch.float32}
    assert grads._one_each(EVERYONE).dtype == torch.float32


# One mechanism


LABS: dict[str, tuple[Case, ClippedGradients]] = {}


def lab(knob: str) -> tuple[Case, ClippedGradients]:
    if knob not in LABS:
        case = make(KINDS["lm_head"])
        LABS[knob] = case, build(knob, case)
    return LABS[knob]


def moved(grads: ClippedGradients, everyone: Draw, gone: int, clip: float) -> float:
    """How far taking one item away moves the sum, relative to what the mechanism allows."""
    without = Draw(np.delete(everyone.rows, gone, axis=0), np.delete(everyone.count, gone))
    steps = np.linalg.norm(total(grads, everyone, clip) - total(grads, without, clip))
    return float(steps * pitch(clip) / (clip + pitch(clip) * math.sqrt(grads.dim) / 2))


@given(data=st.data(), clip=st.sampled_from([1e-3, 0.3, 30.0]), draws=st.integers(1, 3))
@settings(max_examples=10, deadline=None, derandomize=True)
@pytest.mark.parametrize("knob", KNOBS)
def test_one_item_moves_the_sum_by_at_most_the_clip(knob: str, data: st.DataObject, clip: float, draws: int) -> None:
    """Over random losses of ragged records, 1e-6 to 1e30 times as large, of random persons, in batches of 8."""
    case, grads = lab(knob)
    case.factors = torch.tensor(data.draw(st.lists(st.sampled_from([1e-6, 1.0, 1e3, 1e30]), min_size=RECORDS,
                                                   max_size=RECORDS)))
    people = data.draw(st.lists(st.lists(st.integers(0, RECORDS - 1), min_size=1, max_size=draws), min_size=1, max_size=6))
    everyone = Draw(np.array([np.resize(p, draws) for p in people]), np.array([len(p) for p in people]))
    gone = data.draw(st.integers(0, len(people) - 1))
    try:
        assert moved(grads, everyone, gone, clip) <= 1 + 1e-9
    finally:
        case.factors = torch.ones(RECORDS)


def clipped_in_bfloat16(each: NDArray[np.float32], _count: NDArray[np.int64], clip: float) -> NDArray[np.int64]:
    grads = torch.from_numpy(each[:, 0]).bfloat16()
    grads = grads * (clip / grads.norm(dim=1, keepdim=True)).clamp(max=1)
    return np.rint(grads.double().numpy() / pitch(clip)).astype(np.int64)


def test_planted_clip_in_bfloat16_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of a rounded vector is up to 2^-8 above the clip."""
    case, grads = lab("bfloat16, fused")
    everyone = Draw(EVERYONE[:, None], ALONE)
    case.factors = torch.full((RECORDS,), 1e3)
    try:
        assert max(moved(grads, everyone, i, 0.3) for i in EVERYONE) <= 1 + 1e-9
        monkeypatch.setattr(dpsgd, "_on_lattice", clipped_in_bfloat16)
        assert max(moved(grads, everyone, i, 0.3) for i in EVERYONE) > 1 + 1e-4
    finally:
        case.factors = torch.ones(RECORDS)


MECHANISM = DpMechanism(trust="local", unit="record", adjacency="add_remove", sampler="poisson", q=0.5, clip=0.5, sigma=1.0,
                        steps=1, delta=1e-5, n_decl=RECORDS)


@pytest.mark.parametrize("knob", KNOBS)
def test_batches_of_any_size_share_one_draw_and_one_noise(knob: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draws, noises = 0, 0

    def draw(units: int, _q: float) -> NDArray[np.int64]:
        nonlocal draws
        draws += 1
        return np.arange(0, units, 2) if units > 4 else np.zeros(0, np.int64)

    def noise(dim: int, *, sigma: float, clip: float) -> NDArray[np.int64]:
        nonlocal noises
        noises += 1
        return np.arange(dim)

    monkeypatch.setattr("privacy.population.poisson_sample", draw)
    monkeypatch.setattr(dpsgd, "lattice_noise", noise)
    grads = lab(knob)[1]
    steps = {size: noisy_mean(grads, Population(RECORDS, MECHANISM), MECHANISM, size) for size in (1, 4, 5, 6, 64)}
    assert (draws, noises) == (5, 5)
    whole = steps[64] * MECHANISM.denominator
    for step in steps.values():
        assert np.linalg.norm(step * MECHANISM.denominator - whole) <= (0.1 if "16" in knob or knob == "both" else 1e-5) * 3


def coupled(precision: Precision) -> float:
    """How much a record without padding changes where another of its batch is padded, relative to its gradient."""
    case = make(KINDS["lm_head"])
    grads = gradients("fused", case.module, case.parameters, case.losses, precision=precision)
    full, short = int(case.lengths.argmax()), int(case.lengths.argmin())
    assert case.lengths[full] == case.mask.shape[1]
    alone, beside = grads._chunk(np.array([full, full])), grads._chunk(np.array([full, short]))
    return float(np.linalg.norm(alone[0] - beside[0]) / np.linalg.norm(alone[0]))


def test_no_bit_of_a_record_depends_on_whether_another_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one record would move all others of its batch, in bfloat16 by a noticeable part of the clip."""
    assert coupled("float32") == coupled("bfloat16") == 0
    monkeypatch.setattr("tests.privacy.engine_cases.attention", lambda: "sdpa")
    assert coupled("float32") > 0, "planted: transformers' own choice of mask and kernel"
    assert coupled("bfloat16") > 1e-3


# Memory


def small(case: Case, most: int, *, greedy: int | None = None) -> None:
    """A machine on which `most` records fit; `greedy`: a record that takes too much by itself, whatever the machine."""
    honest = case.losses

    def losses(rows: NDArray[np.int64]) -> torch.Tensor:
        if len(rows) > most or greedy in rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(rows)

    case.losses = losses  # type: ignore[method-assign]


@pytest.mark.parametrize("engine", ["opacus", "fused"])
@pytest.mark.parametrize(("most", "mend"), [(5, "site.physical_batch=3"), (11, "site.physical_batch=6"),
                                            (0, "site.checkpointing=true")])
def test_a_batch_over_the_memory_is_refused_with_one_to_try(engine: Engine, most: int, mend: str) -> None:
    case = make(KINDS["lm_head"])
    grads = gradients(engine, case.module, case.parameters, lambda rows: case.losses(rows))
    grads.check(3)
    small(case, most)
    for attempt in (lambda: grads.require_fit(12), lambda: total_of(grads, 12)):
        with pytest.raises(Refused) as caught:
            attempt()
        assert caught.value.code == "dp.memory"
        assert mend in str(caught.value)
        assert untouched(case.module)
    if most:
        grads.require_fit(3)
        assert total_of(grads, 3).any()


def total_of(grads: ClippedGradients, size: int) -> NDArray[np.int64]:
    draw, out = Draw(EVERYONE[:, None], ALONE), np.zeros(grads.dim, np.int64)
    for part in grads.clipped(draw, 1.0, size):
        out += part.sum(axis=0)
    return out


def test_a_record_that_exhausts_memory_by_itself_contributes_zero() -> None:
    """Whether there is an answer must not depend on a record: the same batch of synthetic ones fits."""
    case = make(KINDS["lm_head"])
    grads = gradients("fused", case.module, case.parameters, lambda rows: case.losses(rows))
    grads.check(3)
    draw = Draw(EVERYONE[:, None], ALONE)
    clean = np.concatenate(list(grads.clipped(draw, 1.0, 4)))
    small(case, 12, greedy=5)
    got = np.concatenate(list(grads.clipped(draw, 1.0, 4)))
    assert not got[5].any()
    np.testing.assert_array_equal(np.delete(got, 5, axis=0), np.delete(clean, 5, axis=0))


def test_other_failures_of_the_synthetic_record_are_not_called_memory() -> None:
    case = make(KINDS["lm_head"])
    grads = gradients("fused", case.module, case.parameters, lambda rows: case.losses(rows))
    grads.check(3)

    def losses(_rows: NDArray[np.int64]) -> torch.Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    case.losses = losses  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="multiplied"):
        grads.require_fit(4)


def test_torch_itself_says_that_memory_is_at_its_end() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert dpsgd.out_of_memory(caught.value)
    assert dpsgd.out_of_memory(MemoryError())
    assert not dpsgd.out_of_memory(ValueError("out of memory"))


def test_a_device_that_is_absent_is_refused() -> None:
    Compute().require_device()
    if not torch.cuda.is_available():
        with pytest.raises(Refused) as caught:
            Compute(device="cuda").require_device()
        assert caught.value.code == "device.absent"
