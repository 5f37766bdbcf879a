"""Local training on the tiny model: it learns, divides by public sizes, and no record steers what leaves or fails."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from fl_client.training import LocalTrainer
from privacy.compute import Compute
from privacy.contract import Contract
from privacy.errors import Refused, UsageError
from strategies.adapter import initial
from strategies.cache import RowCache
from strategies.classifier import TextClassifier
from strategies.records import load_records

CANARY = "canary-51ac"
Make = Callable[..., Contract]
Row = tuple[str, ...]


class Place:
    """Makes trainers of site-a on rows that a test writes, without noise and sampling unless told."""

    def __init__(self, folder: Path, model: Path, data: dict[str, Path], make: Make) -> None:
        self.folder, self.model, self.data, self.make = folder, model, data, make

    @property
    def rows(self) -> list[Row]:
        with self.data["site-a"].open(newline="") as f:
            return [tuple(row) for row in csv.reader(f)][1:]

    def trainer(self, rows: Sequence[Row] | None = None, *, contract: Contract | None = None,
                model: Path | None = None, compute: Compute = Compute()) -> LocalTrainer:
        path = self.folder / "own.csv"
        with path.open("w", newline="") as f:
            csv.writer(f).writerows([("text", "label"), *(self.rows if rows is None else rows)])
        return LocalTrainer(contract or self.exact(), "site-a", model=model or self.model, data=path, text="text",
                            label="label", compute=compute)

    def exact(self, *, privacy: dict[str, Any] | None = None, site: dict[str, Any] | None = None,
              **sections: Any) -> Contract:
        return self.make(privacy={"trust": "none", "epsilon": None, "q": 1.0} | (privacy or {}),
                         site={"sigma": 0.0} | (site or {}), **sections)


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path], tiny_contract: Make) -> Place:
    return Place(tmp_path, tiny_model, tiny_data, tiny_contract)


def change(trainer: LocalTrainer) -> NDArray[np.float32]:
    return trainer.train(initial(trainer.spec, 0), 1)


def test_learns_the_rule(place: Place) -> None:
    """Plain gradient steps from the public start: from a third right to over four fifths on the public split."""
    trainer = place.trainer()
    adapter = initial(trainer.spec, 0)
    for _ in range(30):
        adapter = trainer.spec.add(adapter, np.float32(0.5) * trainer.train(adapter, 1))
    public = load_records(place.data["public"], place.exact().data.labels)
    trainer._model.load(adapter)
    right = trainer._model.logits(trainer._model.encode(public.texts)).argmax(axis=1) == public.labels
    assert right.mean() > 0.8


def test_change_is_of_the_trained_tensors_only(place: Place) -> None:
    for rule, frozen in (("ffa", True), ("fedit", False)):
        trainer = place.trainer(contract=place.exact(rule={"name": rule}))
        start = initial(trainer.spec, 0)
        kept = {name: value.copy() for name, value in start.items()}
        delta = trainer.train(start, 1)
        assert delta.dtype == np.float32
        assert delta.shape == (trainer.spec.dim,)
        assert all((start[n] == kept[n]).all() for n in start), "the adapter handed in is left as it was"
        assert any(".lora_A." in n for n in trainer.spec.trained) != frozen


def test_training_keeps_nothing_between_rounds(place: Place) -> None:
    trainer = place.trainer()
    first = change(trainer)
    trainer.train(trainer.spec.add(initial(trainer.spec, 0), first), 1)
    np.testing.assert_array_equal(change(trainer), first)
    np.testing.assert_array_equal(change(place.trainer()), first)


def test_local_steps_follow_each_other(place: Place) -> None:
    one = place.trainer()
    start = initial(one.spec, 0)
    first = one.train(start, 1)
    second = one.train(one.spec.add(start, first), 1)
    both = place.trainer(contract=place.exact(privacy={"local_steps": 2})).train(start, 1)
    np.testing.assert_allclose(both, first + second, atol=1e-6)


def test_public_size_divides_not_the_true_one(place: Place) -> None:
    seventy = change(place.trainer(contract=place.exact(site={"n_decl": 70})))
    fifty = change(place.trainer(contract=place.exact(site={"n_decl": 50})))
    np.testing.assert_allclose(fifty * 50, seventy * 70, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.05, 5.0])
def test_one_record_moves_the_change_by_at_most_clip_over_the_denominator(place: Place, clip: float) -> None:
    """N +- 1 through files, tokens, cached layers and training: nothing else of the site's answer moves."""
    contract = place.exact(privacy={"clip": clip})
    everyone = change(place.trainer(contract=contract))
    for left_out in (0, 31, 59):
        rows = place.rows
        del rows[left_out]
        moved = np.linalg.norm(everyone - change(place.trainer(rows, contract=contract)))
        assert 0 < moved <= clip / 70 * (1 + 1e-4)


def test_noise_of_a_real_round(place: Place) -> None:
    """No valid record, q = 1: the change is noise of sigma C lr / n_decl (two-sided chi-square, alpha 1e-7)."""
    contract = place.make(privacy={"q": 1.0, "clip": 2.0}, site={"sigma": 3.0}, rule={"local_lr": 0.5})
    trainer = place.trainer([("x", "no label of the contract")] * 50, contract=contract)
    one, two = change(trainer), change(trainer)
    assert not np.array_equal(one, two)
    for delta in (one, two):
        p = stats.chi2.cdf(np.sum((delta.astype(float) / (3.0 * 2.0 * 0.5 / 70)) ** 2), delta.size)
        assert 5e-8 < p < 1 - 5e-8


# Poison


POISON: dict[str, Row] = {"unknown label": (CANARY, "no such"), "empty": ("", "heart"), "short row": (CANARY,),
                          "too long": ("x " * 60_000, "heart")}


def test_invalid_record_is_the_same_as_any_other_invalid_one(place: Place) -> None:
    """It stays a unit, contributes zero, and the others' contributions are the same to the last bit."""
    outcomes = []
    for poison in POISON.values():
        rows = place.rows
        rows[7] = poison
        trainer = place.trainer(rows)
        assert trainer._population.units == 60
        outcomes.append(change(trainer))
    for outcome in outcomes[1:]:
        np.testing.assert_array_equal(outcome, outcomes[0])


def test_site_of_invalid_records_starts_and_answers_zero(place: Place) -> None:
    """The probe is synthetic: whether a site starts depends on no record."""
    trainer = place.trainer([("x", "no such")] * 60)
    trainer.probe()
    assert not change(trainer).any()


@pytest.mark.parametrize("kind", ["raises", "nan"])
@pytest.mark.case(8)
def test_record_that_breaks_in_training_is_silent_and_alone(place: Place, kind: str, capfd: pytest.CaptureFixture[str],
                                                            caplog: pytest.LogCaptureFixture) -> None:
    rows = place.rows
    rows[7] = (CANARY, "no such")
    without = change(place.trainer(rows))
    trainer = place.trainer()
    honest, victim = trainer._model.module, trainer._model.encode([place.rows[7][0]]).input_ids
    capfd.readouterr()
    caplog.set_level(logging.DEBUG)

    def module(batch: Any) -> torch.Tensor:
        logits: torch.Tensor = honest(batch)
        hit = (batch.input_ids == victim).all(dim=1)
        if kind == "raises" and hit.any():
            raise RuntimeError(CANARY)
        return torch.where(hit[:, None], torch.nan, logits)

    trainer._model.module = module
    np.testing.assert_array_equal(change(trainer), without)
    assert CANARY not in "".join(capfd.readouterr()) + caplog.text


def test_probe_is_never_sampled(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = place.trainer(), set()
    honest = trainer._grads._losses
    monkeypatch.setattr(trainer._grads, "_losses", lambda rows: seen.update(rows.tolist()) or honest(rows))
    change(trainer)
    assert seen == set(range(60))


# Start-up


def test_probe_passes_and_leaves_the_fresh_adapter(place: Place) -> None:
    trainer = place.trainer()
    trainer._model.load(initial(trainer.spec, 0))
    before = [p.detach().clone() for p in trainer._model.parameters.values()]
    trainer.probe()
    assert all(torch.equal(p, b) for p, b in zip(trainer._model.parameters.values(), before, strict=True))


def adapters_disabled(trainer: LocalTrainer) -> None:
    trainer._model.peft.disable_adapter_layers()
    for p in trainer._grads.parameters.values():
        p.requires_grad_(True)


def scaled_to_nothing(trainer: LocalTrainer) -> None:
    for layer in trainer._model.peft.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] = 0.0


def cut_off(trainer: LocalTrainer) -> None:
    honest = trainer._model.module
    trainer._model.module = lambda batch: honest.head(batch.hidden.mean(dim=1))


@pytest.mark.parametrize("freeze", [adapters_disabled, scaled_to_nothing, cut_off])
@pytest.mark.case(18)
def test_adapter_that_cannot_move_is_found_at_start_up(place: Place, freeze: Callable[[LocalTrainer], None]) -> None:
    trainer = place.trainer()
    freeze(trainer)
    with pytest.raises(UsageError, match="lora_B") as caught:
        trainer.probe()
    assert caught.value.code in ("dp.frozen", "dp.no_per_sample_gradient")


@pytest.mark.case(6)
def test_floor_is_a_boundary(place: Place) -> None:
    place.trainer(contract=place.exact(data={"floor": 60}))
    with pytest.raises(Refused) as caught:
        place.trainer(contract=place.exact(data={"floor": 61}))
    assert caught.value.code == "data.floor"


def test_other_model_is_refused(place: Place, tmp_path: Path) -> None:
    contract = place.exact(model={"weights": "0" * 64})
    with pytest.raises(Refused) as caught:
        place.trainer(contract=contract)
    assert caught.value.code == "model.digest"


def test_site_that_the_contract_does_not_name(place: Place) -> None:
    with pytest.raises(UsageError) as caught:
        place.trainer(contract=place.exact(sites=("site-b", "site-c")))
    assert caught.value.code == "contract.no_such_site"


# What a site may choose


def test_what_is_kept_of_records_changes_no_bit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, none, some."""
    want, made = change(place.trainer()), []
    np.testing.assert_array_equal(change(place.trainer(compute=Compute(cache_mib=0))), want)

    def some(*args: Any, like: Any, limit: int) -> RowCache:
        made.append(RowCache(*args, like=like, limit=17 * RowCache(*args, like=like, limit=limit).row_bytes))
        return made[-1]

    monkeypatch.setattr("strategies.lora_model.RowCache", some)
    np.testing.assert_array_equal(change(place.trainer()), want)
    assert made[0].kept == 17


def test_malformed_records_contribute_zero_where_nothing_is_kept(place: Place) -> None:
    bad = [("", "heart"), *place.rows[1:]]
    assert_same = [change(place.trainer(bad, compute=Compute(cache_mib=mib))) for mib in (0, 1024)]
    np.testing.assert_array_equal(*assert_same)
    assert (assert_same[0] != change(place.trainer())).any()


@pytest.mark.parametrize(("compute", "near"), [
    (Compute(precision="bfloat16"), 0.05), (Compute(checkpointing=True), 1e-5), (Compute(physical_batch=3), 1e-5),
    (Compute(precision="bfloat16", checkpointing=True, cache_mib=0), 0.05), (Compute(engine="opacus"), 1e-5)], ids=str)
def test_a_sites_choice_changes_rounding_only(place: Place, compute: Compute, near: float) -> None:
    want = change(place.trainer())
    trainer = place.trainer(compute=compute)
    trainer.probe()
    got = change(trainer)
    assert np.linalg.norm(got - want) <= near * np.linalg.norm(want)


def test_a_file_that_changed_since_it_was_opened_is_not_trained_on(place: Place) -> None:
    trainer = place.trainer()
    with (place.folder / "own.csv").open("a") as f:
        f.write("one more,heart\n")
    with pytest.raises(Refused) as caught:
        change(trainer)
    assert caught.value.code == "data.changed"


def test_a_batch_over_the_memory_is_found_before_anything_is_spent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = TextClassifier.each

    def each(self: TextClassifier, prepared: Any) -> torch.Tensor:
        if len(prepared.labels) > 20:
            raise MemoryError
        return honest(self, prepared)

    monkeypatch.setattr(TextClassifier, "each", each)
    with pytest.raises(Refused, match=r"site\.physical_batch=16") as caught:
        place.trainer().probe()
    assert caught.value.code == "dp.memory"
    trainer = place.trainer(compute=Compute(physical_batch=16))
    trainer.probe()
    assert change(trainer).any()
