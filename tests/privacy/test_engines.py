"""One conformance suite for the engines: gradients of every kind of trained weight, persons, dropout, refusals.

Norms and gradients are held against autograd of each record alone, in float64, through PEFT's own forward. What needs the
product's model (poison, aborts, physical batches, sensitivity) is in test_dpsgd.py, with each engine too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy import dpsgd, fused, fused_layers
from privacy.compute import Engine
from privacy.dpsgd import ClippedGradients, PerSampleGradients, noisy_mean
from privacy.engine import gradients
from privacy.errors import UsageError
from privacy.fused import FusedGradients
from privacy.mechanism import DpMechanism
from privacy.noise import pitch
from privacy.population import Draw, Population
from tests.privacy.engine_cases import KINDS, RECORDS, REFUSED, Case, answer_tokens, dropping, make

ENGINES: tuple[Engine, ...] = ("opacus", "fused")
EVERYONE = np.arange(RECORDS)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.param
    return chosen


def build(engine: Engine, case: Case) -> ClippedGradients:
    return gradients(engine, case.module, case.parameters, lambda rows: case.losses(rows))


def worst(got: NDArray[Any], want: NDArray[Any]) -> tuple[float, float]:
    """Largest relative error of a norm, and of a gradient, over records."""
    norms, exact = np.linalg.norm(got.astype(float), axis=1), np.linalg.norm(want, axis=1)
    return float(np.abs(norms / exact - 1).max()), float((np.linalg.norm(got - want, axis=1) / exact).max())


def errors(engine: Engine, kind: Callable[[], Case]) -> tuple[float, float]:
    case = make(kind)
    exact = case.exactly()
    return worst(build(engine, case)._chunk(EVERYONE), np.array([exact.alone(i) for i in EVERYONE]))


def untouched(module: torch.nn.Module) -> bool:
    """Nothing of a batch is left: no gradient, no replaced forward, no activation, nothing in training mode that drops."""
    kept = ("forward", "activations", "max_batch_len")
    return (all(p.grad is None and getattr(p, "grad_sample", None) is None for p in module.parameters())
            and not any(name in layer.__dict__ for layer in module.modules() for name in kept)
            and not any(isinstance(layer, torch.nn.Dropout) and layer.training for layer in module.modules()))


# Gradients


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_gradients_are_those_of_per_record_autograd(engine: Engine, kind: str) -> None:
    norm, gradient = errors(engine, KINDS[kind])
    assert norm <= 1e-5
    assert gradient <= 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_check_passes_and_changes_nothing(engine: Engine, kind: str) -> None:
    case = make(KINDS[kind])
    before = {name: value.clone() for name, value in case.module.state_dict().items()}
    build(engine, case).check(3)
    assert all(torch.equal(value, before[name]) for name, value in case.module.state_dict().items())
    assert untouched(case.module)


def wrong_scaling(patch: pytest.MonkeyPatch) -> None:
    """Forward and backward agree with each other, but alpha / r is where rsLoRA has alpha / sqrt(r)."""
    honest = fused_layers._lora
    patch.setattr(fused_layers, "_lora", lambda *a: honest(*a[:7], a[7] / math.sqrt(len(a[4])), a[8]))


def batch_is_not_first(patch: pytest.MonkeyPatch) -> None:
    """Each record gets the next one's gradient: sums are right, records aren't."""
    honest = fused_layers._outer
    patch.setattr(fused_layers, "_outer", lambda g, x: honest(g, x).roll(1, 0))


def one_position(patch: pytest.MonkeyPatch) -> None:
    honest = fused_layers._outer
    patch.setattr(fused_layers, "_outer", lambda g, x: honest(g, x) if x.dim() == 2 else honest(g[:, :1], x[:, :1]))


def last_use_wins(patch: pytest.MonkeyPatch) -> None:
    def put(kept: dict[str, Any], name: str, gradient: Callable[[], Any]) -> None:
        kept[name] = gradient()

    patch.setattr(fused, "_add", put)


@pytest.mark.parametrize(("plant", "kind"), [(wrong_scaling, "rslora"), (batch_is_not_first, "llama"),
                                             (one_position, "lm_head"), (last_use_wins, "one layer for all depths")])
def test_planted_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch, plant: Callable[[Any], None], kind: str) -> None:
    assert errors("fused", KINDS[kind])[1] <= 2e-5
    plant(monkeypatch)
    assert errors("fused", KINDS[kind])[1] > 1e-2
    if plant is not batch_is_not_first:  # two copies of one record can't show that
        with pytest.raises(UsageError) as caught:
            build("fused", make(KINDS[kind])).check(3)
        assert caught.value.code == "dp.no_per_sample_gradient"


def test_the_module_computes_the_same_before_and_after() -> None:
    case = make(KINDS["every linear layer"])
    with torch.no_grad():
        before = case.losses(EVERYONE)
        build("fused", case)._chunk(EVERYONE)
        assert torch.equal(case.losses(EVERYONE), before)
    assert untouched(case.module)


# lora_dropout


def dropped_sum(case: Case) -> NDArray[np.float64]:
    """Plain autograd of the summed losses with lora_dropout on, on the masks of seed 0."""
    for layer in case.module.modules():
        layer.training = isinstance(layer, torch.nn.Dropout)
    torch.manual_seed(0)
    parts = torch.autograd.grad(case.losses(EVERYONE).sum(), list(case.parameters.values()))
    case.module.eval()
    return torch.cat([part.ravel() for part in parts]).double().numpy()


def dropout_is_right(engine: Engine, case: Case) -> bool:
    grads = build(engine, case)
    torch.manual_seed(0)
    got = grads._chunk(EVERYONE).sum(axis=0)
    want = dropped_sum(make(dropping))
    return bool(np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want))


def test_lora_dropout_is_on_in_training_only_with_the_masks_of_plain_training(engine: Engine) -> None:
    case = make(dropping)
    with torch.random.fork_rng():
        assert dropout_is_right(engine, case)
    assert untouched(case.module)
    with torch.no_grad():
        assert torch.equal(case.losses(EVERYONE), case.losses(EVERYONE))


def test_both_engines_use_the_same_masks() -> None:
    """They draw in the same order from torch's generator, so one seed gives both the same."""
    got = []
    for name in ENGINES:
        grads = build(name, make(dropping))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            got.append(grads._chunk(EVERYONE))
    assert worst(got[1], got[0].astype(float))[1] <= 2e-5
    assert worst(got[1], build("fused", make(KINDS["llama"]))._chunk(EVERYONE).astype(float))[1] > 0.1


def test_planted_missing_dropout_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fused_layers._lora
    monkeypatch.setattr(fused_layers, "_lora", lambda x, _dropped, *rest: honest(x, None, *rest))
    with torch.random.fork_rng():
        assert not dropout_is_right("fused", make(dropping))


# Persons


def by_person(case: Case, draw: Draw, clip: float) -> NDArray[np.float64]:
    """Brute force: mean over the drawn records, then one clip. float64 (items, dim)."""
    exact, out = case.exactly(), []
    for rows, count in zip(draw.rows, draw.count, strict=True):
        mean = sum(exact.alone(int(row)) for row in rows[:count]) / count
        out.append(mean * min(1.0, clip / float(np.linalg.norm(mean))))
    return np.array(out)


PEOPLE = Draw(np.array([[0, 1, 2], [3, 4, 3], [5, 5, 5], [6, 7, 8], [9, 10, 9]]), np.array([3, 2, 1, 3, 2]))


def persons_are_right(engine: Engine, case: Case, size: int = 8) -> bool:
    want = by_person(case, PEOPLE, 1.0)
    got = np.concatenate(list(build(engine, case).clipped(PEOPLE, 1.0, size))) * pitch(1.0)
    return got.shape == want.shape and bool(np.abs(got - want).max() <= 0.51 * pitch(1.0) + 2e-5)


@pytest.mark.parametrize("size", [1, 6, 100])
def test_a_persons_gradient_is_the_mean_over_its_draws_clipped_once(engine: Engine, size: int) -> None:
    assert persons_are_right(engine, make(KINDS["lm_head"]), size)


def summed(each: NDArray[np.float32], count: NDArray[np.int64], clip: float) -> NDArray[np.int64]:
    meant = np.arange(each.shape[1]) < count[:, None]
    return HONEST((each * meant[..., None]).sum(axis=1, keepdims=True), np.ones_like(count), clip)


def clipped_first(each: NDArray[np.float32], count: NDArray[np.int64], clip: float) -> NDArray[np.int64]:
    norms = np.linalg.norm(each, axis=2, keepdims=True)
    return HONEST(each * np.minimum(1, clip / norms), count, clip)


def padding_counts(each: NDArray[np.float32], count: NDArray[np.int64], clip: float) -> NDArray[np.int64]:
    return HONEST(each, np.full_like(count, each.shape[1]), clip)


HONEST = dpsgd._on_lattice


@pytest.mark.parametrize("plant", [summed, clipped_first, padding_counts])
def test_planted_mistake_about_persons_is_caught(monkeypatch: pytest.MonkeyPatch, plant: Any) -> None:
    case = make(KINDS["lm_head"])
    case.factors[[3, 9, 10]] = 0.05  # one person below the clip, so that a sum shows; one record, but not its fellow
    assert persons_are_right("fused", case)
    monkeypatch.setattr(dpsgd, "_on_lattice", plant)
    assert not persons_are_right("fused", case)


@given(data=st.data(), clip=st.sampled_from([1e-3, 0.3, 30.0]), draws=st.integers(1, 4))
@settings(max_examples=20, deadline=None, derandomize=True)
@pytest.mark.parametrize("name", ENGINES)
def test_one_person_moves_the_sum_by_at_most_the_clip(name: Engine, data: st.DataObject, clip: float, draws: int) -> None:
    """Over random losses of ragged records, 1e-6 to 1e30 times as large, of random persons."""
    case, grads = LABS[name]
    case.factors = torch.tensor(data.draw(st.lists(st.sampled_from([1e-6, 1.0, 1e3, 1e30]), min_size=RECORDS,
                                                   max_size=RECORDS)))
    people = data.draw(st.lists(st.lists(st.integers(0, RECORDS - 1), min_size=1, max_size=draws), min_size=1, max_size=6))
    everyone = Draw(np.array([np.resize(p, draws) for p in people]), np.array([len(p) for p in people]))
    gone = data.draw(st.integers(0, len(people) - 1))
    without = Draw(np.delete(everyone.rows, gone, axis=0), np.delete(everyone.count, gone))
    moved = total(grads, everyone, clip) - total(grads, without, clip)
    assert np.linalg.norm(moved) * pitch(clip) <= (clip + pitch(clip) * math.sqrt(grads.dim) / 2) * (1 + 1e-9)


def total(grads: ClippedGradients, draw: Draw, clip: float) -> NDArray[np.int64]:
    out = np.zeros(grads.dim, np.int64)
    for part in grads.clipped(draw, clip, 8):
        out += part.sum(axis=0)
    return out


def _lab(name: Engine) -> tuple[Case, ClippedGradients]:
    case = make(KINDS["lm_head"])
    return case, build(name, case)


LABS = {name: _lab(name) for name in ENGINES}


# One mechanism


def test_a_step_is_the_same_with_both_engines_but_for_float_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "lattice_noise", lambda dim, *, sigma, clip: np.arange(dim))
    m = DpMechanism(trust="local", unit="record", adjacency="add_remove", sampler="poisson", q=1.0, clip=0.5, sigma=1.0,
                    steps=1, delta=1e-5, n_decl=RECORDS)
    steps = []
    for name in ENGINES:
        grads = build(name, make(KINDS["lm_head"]))
        steps.append(noisy_mean(grads, Population(RECORDS, m), m, 5) * m.denominator / pitch(m.clip))
        lattice = np.rint(steps[-1])
        np.testing.assert_allclose(steps[-1], lattice, atol=1e-6)
    assert np.abs(steps[0] - steps[1]).max() <= 32  # of 2^20 in a clip


# Aborts


@pytest.mark.parametrize("bad", [Exception, KeyboardInterrupt])
def test_an_abort_in_the_backward_pass_leaves_the_module_as_it_was(engine: Engine, bad: type[BaseException]) -> None:
    case = make(KINDS["rms norm"])
    grads, middle = build(engine, case), case.module.base_model.model.model.layers[1]
    clean = grads._chunk(EVERYONE)

    def stop(_grad: torch.Tensor) -> torch.Tensor:
        raise bad

    handle = middle.register_forward_pre_hook(lambda _layer, args: args[0].register_hook(stop) and None)
    with pytest.raises(bad):
        grads._chunk(EVERYONE)
    handle.remove()
    assert untouched(case.module)
    np.testing.assert_array_equal(grads._chunk(EVERYONE), clean)


def test_planted_leftover_of_an_aborted_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were per-record gradients kept with the engine, those of the aborted batch would enter the next one."""
    honest = FusedGradients._capturing
    shared: dict[str, torch.Tensor] = {}

    def capturing(self: FusedGradients, kept: dict[str, torch.Tensor]) -> Any:
        kept.update(shared)
        shared.clear()
        manager = honest(self, kept)
        exit_ = type(manager).__exit__

        class Keeping:
            def __enter__(self) -> None:
                manager.__enter__()

            def __exit__(self, *why: Any) -> bool | None:
                if why[0]:
                    shared.update(kept)
                return exit_(manager, *why)

        return Keeping()

    monkeypatch.setattr(FusedGradients, "_capturing", capturing)
    with pytest.raises(AssertionError):
        test_an_abort_in_the_backward_pass_leaves_the_module_as_it_was("fused", Exception)


# Coverage and the choice of an engine


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_per_sample_gradient_is_refused_by_name(engine: Engine, what: str) -> None:
    kind, name = REFUSED[what]
    case = make(kind)
    with pytest.raises(UsageError) as caught:
        build(engine, case).check(3)
    assert caught.value.code == "dp.no_per_sample_gradient"
    assert re.search(f"Under DP '[^ ]*{name}[^ ]*' can't be trained", str(caught.value))
    assert "Freeze it" in str(caught.value)


def mean_of_the_batch(module: Any, ids: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As Hugging Face's `out.loss`: one number, the mean over the batch."""
    return answer_tokens(module, ids, mask, targets).mean()


def shares_of_the_mean(module: Any, ids: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return answer_tokens(module, ids, mask, targets) / len(ids)


@pytest.mark.parametrize("read", [mean_of_the_batch, shares_of_the_mean])
def test_a_loss_that_couples_the_batch_is_refused(engine: Engine, read: Any) -> None:
    case = make(KINDS["llama"])
    grads = gradients(engine, case.module, case.parameters,
                      lambda rows: read(case.module, case.ids[rows], case.mask[rows], case.targets[rows]))
    with pytest.raises(UsageError) as caught:
        grads.check(3)
    assert caught.value.code == "dp.no_per_sample_gradient"


def test_auto_takes_opacus_for_what_fused_does_not_cover() -> None:
    def module() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Flatten(), torch.nn.Linear(8, 2))

    ids = torch.arange(8).reshape(4, 2) % 5

    def make_it(engine: Engine, net: torch.nn.Module) -> ClippedGradients:
        return gradients(engine, net, dict(net.named_parameters()), lambda rows: net(ids[rows]).sum(1))

    with pytest.raises(UsageError, match=r"'0\.weight'.*Embedding") as caught:
        make_it("fused", module())
    assert caught.value.code == "dp.no_per_sample_gradient"
    assert type(make_it("auto", module())) is PerSampleGradients
    make_it("auto", module())._chunk(np.arange(4))
    linear = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert type(gradients("auto", linear, dict(linear.named_parameters()), lambda rows: linear(ids[rows].float()).sum(1))
                ) is FusedGradients


def test_a_weight_that_an_embedding_shares_is_refused() -> None:
    case = make(KINDS["llama"])
    causal = case.module.base_model.model
    causal.lm_head.weight = causal.model.embed_tokens.weight
    name = "base_model.model.model.embed_tokens.weight"
    with pytest.raises(UsageError, match="Embedding"):
        gradients("fused", case.module, {name: causal.lm_head.weight}, case.losses)


def test_a_replaced_forward_is_refused_rather_than_bypassed() -> None:
    case = make(KINDS["lm_head"])
    layer = case.module.base_model.model.lm_head
    layer.forward = lambda x: 2 * torch.nn.functional.linear(x, layer.weight)
    with pytest.raises(UsageError, match="lm_head"):
        build("fused", case)


def test_a_record_that_uses_a_weight_outside_its_layer_silences_itself_only() -> None:
    """Autograd's own gradient of that weight would otherwise stay, and make every later batch look like this one."""
    case = make(KINDS["lm_head"])
    weight, outside = case.module.base_model.model.lm_head.weight, set[int]()
    grads = gradients("fused", case.module, case.parameters, lambda rows: case.losses(rows) + torch.tensor(
        [float(row in outside) for row in rows]) * (weight.sum() if outside & set(rows.tolist()) else 0.0))
    draw = Draw(EVERYONE[:, None], np.ones(RECORDS, np.int64))
    clean = np.concatenate(list(grads.clipped(draw, 1.0, 4)))
    outside.add(5)
    got = np.concatenate(list(grads.clipped(draw, 1.0, 4)))
    assert not got[5].any()
    np.testing.assert_array_equal(np.delete(got, 5, axis=0), np.delete(clean, 5, axis=0))
