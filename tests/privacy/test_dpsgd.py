"""DP-SGD on the tiny model, with each engine: brute force, sensitivity as a property, poison, aborts, coverage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import privacy.noise as noise
from privacy.compute import Engine
from privacy.contract import LoraTerms, ModelTerms
from privacy.dpsgd import ClippedGradients, noisy_mean
from privacy.engine import gradients
from privacy.errors import UsageError
from privacy.mechanism import DpMechanism, declared, default_delta
from privacy.population import Draw, Population
from strategies.classifier import Batch, TextClassifier

Vector = NDArray[np.float64]
WORDS = ("chest", "cough", "rash", "a", "my", "night", "unheardof", "?")
TERMS = ModelTerms(weights="0" * 64, tokenizer="0" * 64, max_length=16)


@dataclass
class Bench:
    """A LoRA'd tiny BERT at random values (A, B and head all count), and records that a test puts in."""

    classifier: TextClassifier
    engine: Engine
    batch: Batch = field(init=False)
    labels: torch.Tensor = field(init=False)
    factors: torch.Tensor = field(init=False)
    sabotage: Callable[[NDArray[np.int64], torch.Tensor], torch.Tensor] = field(init=False)

    def put(self, texts: Sequence[str]) -> None:
        self.batch = self.classifier.encode(texts)
        self.labels = torch.arange(len(texts)) % self.classifier.head.out_features
        self.factors = torch.ones(len(texts))
        self.sabotage = lambda rows, each: each

    def losses(self, rows: NDArray[np.int64]) -> torch.Tensor:
        logits = self.classifier.module(self.batch.take(rows))
        each = torch.nn.functional.cross_entropy(logits, self.labels[rows], reduction="none") * self.factors[rows]
        return self.sabotage(rows, each)

    def gradients(self) -> ClippedGradients:
        """Follows the tests' changes to `losses`."""
        return gradients(self.engine, self.classifier.module, self.classifier.parameters, lambda rows: self.losses(rows))

    def brute_force(self, record: int) -> Vector:
        """Autograd of one record's loss, without hooks."""
        one = self.losses(np.array([record])).sum()
        parts = torch.autograd.grad(one, list(self.classifier.parameters.values()))
        return torch.cat([p.ravel() for p in parts]).double().numpy()


@pytest.fixture(scope="module", params=["opacus", "fused"])
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.param
    return chosen


def bench(folder: Path, engine: Engine = "opacus") -> Bench:
    made = Bench(TextClassifier(folder, TERMS, LoraTerms(r=2, alpha=8.0), 3), engine)
    rng = np.random.default_rng(3)
    made.classifier.load({n: rng.normal(0, 0.2, p.shape).astype("f4") for n, p in made.classifier.parameters.items()})
    for p in made.classifier.parameters.values():
        p.requires_grad_(True)
    made.put(texts(40))
    return made


def texts(n: int) -> list[str]:
    """Ragged: 0 to 20 words, some cut by max_length."""
    rng = np.random.default_rng(5)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 21))) for _ in range(n)]


@pytest.fixture(scope="module")
def shared(tiny_model: Path, engine: Engine) -> tuple[Bench, ClippedGradients]:
    made = bench(tiny_model, engine)
    return made, made.gradients()


@pytest.fixture
def lab(shared: tuple[Bench, ClippedGradients]) -> tuple[Bench, ClippedGradients]:
    shared[0].put(texts(40))
    return shared


def records(indices: Sequence[int] | NDArray[np.int64]) -> Draw:
    """Each record an item of its own."""
    chosen = np.asarray(indices, np.int64)
    return Draw(chosen.reshape(-1, 1), np.ones(len(chosen), np.int64))


def rows(grads: ClippedGradients, indices: Sequence[int] | NDArray[np.int64], clip: float = 1.0,
         size: int = 8) -> NDArray[np.int64]:
    """Contributions, int64 (n, dim), in units of gamma."""
    return np.concatenate([np.zeros((0, grads.dim), np.int64), *grads.clipped(records(indices), clip, size)])


# Contributions


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Bench:
    """The same model without hooks."""
    return bench(tiny_model)


def matches_brute_force(lab: tuple[Bench, ClippedGradients], plain: Bench) -> bool:
    """g min(1, C / |g|) within float32 and half a lattice step, for |g| of 1e-6 C, C and 1e6 C in one batch."""
    made, grads = lab
    clip, chosen = 0.5, np.arange(12)
    plain.put(texts(40))
    norms = np.array([np.linalg.norm(plain.brute_force(int(i))) for i in chosen])
    made.factors[chosen] = torch.tensor(clip / norms * np.tile([1e-6, 1.0, 1e6, 0.3], 3), dtype=torch.float32)
    plain.factors = made.factors
    got = rows(grads, chosen, clip) * noise.pitch(clip)
    for record, contribution in zip(chosen, got, strict=True):
        g = plain.brute_force(int(record))
        want = g * min(1.0, clip / np.linalg.norm(g))
        if np.abs(contribution - want).max() > 0.51 * noise.pitch(clip) + 2e-6 * np.linalg.norm(want):
            return False
    return True


def test_contribution_is_the_clipped_gradient(lab: tuple[Bench, ClippedGradients], plain: Bench) -> None:
    assert matches_brute_force(lab, plain)


def test_planted_batch_mean_is_caught(lab: tuple[Bench, ClippedGradients], plain: Bench) -> None:
    lab[0].sabotage = lambda chosen, each: each / len(chosen)
    assert not matches_brute_force(lab, plain)


def test_norm_within_1e_5_of_autograd(lab: tuple[Bench, ClippedGradients], plain: Bench) -> None:
    plain.put(texts(40))
    raw = lab[1]._chunk(np.arange(40))
    want = [np.linalg.norm(plain.brute_force(i)) for i in range(40)]
    np.testing.assert_allclose(np.linalg.norm(raw.astype(float), axis=1), want, rtol=1e-5)


def test_physical_batch_changes_rounding_only(lab: tuple[Bench, ClippedGradients]) -> None:
    """Float sums differ in their last bits by batch shape: at most 8 lattice steps a coordinate, 5e-5 C in all."""
    sums = [rows(lab[1], range(40), size=size).sum(axis=0) for size in (1, 3, 128)]
    for other in sums[1:]:
        assert np.abs(other - sums[0]).max() <= 8
        assert np.linalg.norm(other - sums[0]) * 2.0**-20 < 5e-5


def test_no_bit_of_a_contribution_depends_on_the_others(lab: tuple[Bench, ClippedGradients]) -> None:
    together = rows(lab[1], range(40))
    backwards = rows(lab[1], range(39, -1, -1))[::-1]
    alone = np.concatenate([rows(lab[1], [i]) for i in range(40)])
    np.testing.assert_array_equal(together, backwards)
    np.testing.assert_array_equal(together, alone)


# Sensitivity


def movement(made: Bench, grads: ClippedGradients, data: Sequence[str], extra: int, clip: float) -> float:
    """How far the sum moves, in units of the bound C + gamma sqrt(dim) / 2, when record `extra` is taken away."""
    made.batch = made.classifier.encode(data)
    made.labels = torch.zeros(len(data), dtype=torch.int64)
    made.factors = torch.ones(len(data))
    everyone = np.arange(len(data))
    moved = rows(grads, everyone, clip).sum(axis=0) - rows(grads, np.delete(everyone, extra), clip).sum(axis=0)
    return float(np.linalg.norm(moved)) * noise.pitch(clip) / (clip + noise.pitch(clip) * math.sqrt(grads.dim) / 2)


@given(data=st.lists(st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join), min_size=1, max_size=11),
       extra=st.integers(0, 10), clip=st.sampled_from([1e-3, 0.3, 3.0]))
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_record_moves_the_sum_by_at_most_the_clip(lab: tuple[Bench, ClippedGradients], data: list[str],
                                                      extra: int, clip: float) -> None:
    assert movement(*lab, data, extra % len(data), clip) <= 1 + 1e-9


LONG_AND_SHORT = ["chest cough rash my night " * 3, *["cough"] * 7]


def test_planted_clip_times_4_is_caught(lab: tuple[Bench, ClippedGradients]) -> None:
    made, grads = lab

    class Clip4:
        dim = grads.dim

        def clipped(self, draw: Draw, clip: float, physical_batch: int) -> Iterator[NDArray[np.int64]]:
            for part in grads.clipped(draw, 4 * clip, physical_batch):
                yield 4 * part

    assert movement(made, grads, LONG_AND_SHORT, 0, 1e-3) <= 1
    assert movement(made, Clip4(), LONG_AND_SHORT, 0, 1e-3) > 1


def test_planted_token_mean_loss_is_caught(lab: tuple[Bench, ClippedGradients]) -> None:
    """A loss averaged over the batch's tokens couples records: a long one holds the others down."""
    made, grads = lab
    assert movement(made, grads, LONG_AND_SHORT, 0, 1.0) <= 1
    clip = float(np.linalg.norm(grads._chunk(np.array([1])).astype(float)))
    assert movement(made, grads, LONG_AND_SHORT, 0, clip) <= 1

    def token_mean(chosen: NDArray[np.int64], each: torch.Tensor) -> torch.Tensor:
        tokens = made.batch.mask[chosen].sum(dim=1)
        return each * tokens * len(chosen) / tokens.sum()

    made.sabotage = token_mean
    assert movement(made, grads, LONG_AND_SHORT, 0, clip) > 1.4


# Poison and aborts


def nan(made: Bench, victim: int) -> None:
    made.factors[victim] = math.nan


def infinite(made: Bench, victim: int) -> None:
    made.factors[victim] = math.inf


def overflows(made: Bench, victim: int) -> None:
    made.factors[victim] = 1e38


def raises_before(made: Bench, victim: int) -> None:
    honest = made.losses

    def losses(chosen: NDArray[np.int64]) -> torch.Tensor:
        if victim in chosen:
            raise MemoryError
        return honest(chosen)

    made.losses = losses  # type: ignore[method-assign]


def raises_after(made: Bench, victim: int) -> None:
    """After the forward pass: an engine holds the activations by then."""

    def sabotage(chosen: NDArray[np.int64], each: torch.Tensor) -> torch.Tensor:
        if victim in chosen:
            raise ValueError("text of the record")
        return each

    made.sabotage = sabotage


@pytest.mark.parametrize("poison", [nan, infinite, overflows, raises_before, raises_after])
@pytest.mark.case(8)
def test_poison_record_contributes_zero_and_changes_no_other(tiny_model: Path, engine: Engine, poison: Any) -> None:
    made = bench(tiny_model, engine)
    grads = made.gradients()
    clean = rows(grads, range(20))
    poison(made, 5)
    got = rows(grads, range(20))
    if poison is not overflows:
        assert not got[5].any()
    assert np.linalg.norm(got[5]) * 2.0**-20 < 1.0001
    others = np.delete(np.arange(20), 5)
    np.testing.assert_array_equal(got[others], clean[others])
    np.testing.assert_array_equal(rows(grads, others), clean[others])


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "between"])
def test_abort_leaves_nothing_for_the_next_batch(lab: tuple[Bench, ClippedGradients], where: str) -> None:
    """Opacus keeps summed and single gradients on abort: they would enter the next batch without a charge."""
    made, grads = lab
    clean = rows(grads, range(20, 30))

    def stop(*_: Any) -> Any:
        raise Killed

    handle = None
    if where == "forward":
        handle = made.classifier.head.register_forward_pre_hook(stop)
    elif where == "loss":
        made.sabotage = stop
    elif where == "backward":
        handle = made.classifier.head.register_forward_hook(lambda _layer, _args, out: out.register_hook(stop) and None)
    if where == "between":
        next(grads.clipped(records(range(20)), 1.0, 8))
    else:
        with pytest.raises(Killed):
            rows(grads, range(20))
    if handle:
        handle.remove()
    made.sabotage = lambda chosen, each: each
    np.testing.assert_array_equal(rows(grads, range(20, 30)), clean)


def test_leftovers_of_an_aborted_batch_are_dropped_even_when_one_record_stays(
        lab: tuple[Bench, ClippedGradients]) -> None:
    """A record that raises after the forward pass must not silence every later one."""
    made, grads = lab
    clean = rows(grads, range(10))
    raises_after(made, 3)
    for _ in range(2):
        assert (rows(grads, range(10)).any(axis=1) == (np.arange(10) != 3)).all()
    made.sabotage = lambda chosen, each: each
    np.testing.assert_array_equal(rows(grads, range(10)), clean)


# The step


def mechanism(**changes: Any) -> DpMechanism:
    terms = {"trust": "local", "unit": "record", "adjacency": "add_remove", "sampler": "poisson", "q": 0.5, "clip": 1.0,
             "sigma": 1.0, "steps": 1, "delta": 1e-5, "n_decl": 40}
    return DpMechanism(**{**terms, **changes})


@pytest.mark.case(7)
def test_empty_batch_is_a_noise_only_step_with_the_same_denominator(lab: tuple[Bench, ClippedGradients],
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "random_words", lambda n: np.full(n, 2**64 - 1, np.uint64))  # nobody is sampled
    monkeypatch.setattr("privacy.dpsgd.lattice_noise", lambda dim, *, sigma, clip: np.arange(dim))
    got = noisy_mean(lab[1], Population(40, mechanism()), mechanism(), 8)
    np.testing.assert_allclose(got, np.arange(lab[1].dim) * 2.0**-20 / (0.5 * 40), rtol=1e-15)


def test_step_is_the_noised_sum_over_the_public_denominator(lab: tuple[Bench, ClippedGradients],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """One noise draw however many physical batches; n_decl, not the true count, divides."""
    draws = []
    monkeypatch.setattr("privacy.dpsgd.lattice_noise",
                        lambda dim, *, sigma, clip: draws.append((sigma, clip)) or np.full(dim, 7))
    got = noisy_mean(lab[1], Population(40, mechanism()), mechanism(q=1.0, sigma=2.0, clip=0.5, n_decl=30), 8)
    want = (rows(lab[1], range(40), 0.5).sum(axis=0) + 7) * noise.pitch(0.5) / 30
    np.testing.assert_allclose(got, want, rtol=1e-15)
    assert draws == [(2.0, 0.5)]


# Coverage, found at start-up


def probe(engine: Engine, module: torch.nn.Module,
          out: Callable[[torch.Tensor], torch.Tensor] | None = None) -> ClippedGradients:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    run = out or module
    return gradients(engine, module, dict(module.named_parameters()), lambda chosen: run(x[chosen]).sum(dim=1))


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm1d, torch.nn.SyncBatchNorm])
@pytest.mark.case(9)
def test_batch_norm_is_refused_by_name(engine: Engine, norm: type[torch.nn.Module]) -> None:
    module = torch.nn.Sequential()
    module.add_module("inner", torch.nn.Linear(6, 5))
    module.add_module("normaliser", norm(5))
    with pytest.raises(UsageError, match=r"'normaliser'.*batch norm") as caught:
        probe(engine, module)
    assert caught.value.code == "dp.no_per_sample_gradient"


def test_parameter_used_outside_its_layer_is_refused_by_name(engine: Engine) -> None:
    module = torch.nn.ModuleDict({"seen": torch.nn.Linear(6, 5), "unseen": torch.nn.Linear(5, 5, bias=False)})
    weight = module["unseen"].weight
    grads = probe(engine, module, lambda x: torch.nn.functional.linear(module["seen"](x), weight))
    with pytest.raises(UsageError, match=r"'unseen\.weight'") as caught:
        grads.check(0)
    assert caught.value.code == "dp.no_per_sample_gradient"


@pytest.mark.case(9)
def test_layer_with_trainable_parameters_and_buffers_is_refused(engine: Engine) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(6, 5))
    module[0].register_buffer("seen", torch.zeros(1))
    with pytest.raises(UsageError, match=r"'0'.*buffers") as caught:
        probe(engine, module)
    assert caught.value.code == "dp.no_per_sample_gradient"


@pytest.mark.case(18)
def test_frozen_tensor_is_found_and_named(engine: Engine) -> None:
    module = torch.nn.ModuleDict({"live": torch.nn.Linear(6, 5), "dead": torch.nn.Linear(6, 5)})
    grads = probe(engine, module, lambda x: module["live"](x) + 0 * module["dead"](x))
    with pytest.raises(UsageError, match=r"'dead\.weight'") as caught:
        grads.check(0)
    assert caught.value.code == "dp.frozen"


def test_check_passes_at_the_zeros_of_a_fresh_adapter_and_changes_nothing(tiny_model: Path, engine: Engine) -> None:
    """lora_B and the head start at zero, where lora_A and B have no gradient."""
    made = Bench(TextClassifier(tiny_model, TERMS, LoraTerms(r=2), 3), engine)
    made.put(texts(3))
    before = {n: p.detach().clone() for n, p in made.classifier.parameters.items()}
    made.gradients().check(1)
    for name, p in made.classifier.parameters.items():
        assert torch.equal(p, before[name]), name
        assert p.grad is None
        assert getattr(p, "grad_sample", None) is None


# The mechanism


@pytest.mark.parametrize("change", [
    {"q": 0.0}, {"q": 1.01}, {"q": math.nan}, {"clip": 0.0}, {"clip": math.nan}, {"clip": math.inf}, {"sigma": 0.0},
    {"sigma": -1.0}, {"sigma": math.nan}, {"sigma": math.inf}, {"delta": 0.0}, {"delta": 1 / 40}, {"delta": math.nan},
    {"steps": 0}, {"n_decl": 0}, {"trust": "none", "sigma": 1.0}])
@pytest.mark.case(2)
def test_impossible_parameter_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        mechanism(**change)
    assert caught.value.code == "dp.parameter"
    assert next(iter(change)) in str(caught.value) or "sigma" in str(caught.value)


@pytest.mark.parametrize("change", [{"sampler": "shuffle"}, {"sampler": "fixed_size"}, {"adjacency": "replace_one"},
                                    {"unit": "household"}, {"trust": "distributed"}])
@pytest.mark.case(4)
def test_what_the_accountant_does_not_know_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        mechanism(**change)
    assert caught.value.code == "dp.unsupported"


def test_public_sizes() -> None:
    assert [declared(n) for n in (1, 9, 10, 14, 15, 94, 95, 149, 150, 1499)] == [1, 9, 10, 10, 20, 90, 100, 100, 200, 1000]
    with pytest.raises(UsageError):
        declared(0)
    assert default_delta(100) == 1e-5
    assert default_delta(10**6) == 1e-7
