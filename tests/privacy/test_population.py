"""Persons: who is sampled, what is drawn of them, what one person can move. alpha is stated where chance is involved."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from privacy.dpsgd import PerSampleGradients, noisy_mean
from privacy.errors import UsageError
from privacy.mechanism import DpMechanism
from privacy.noise import pitch
from privacy.population import Draw, Population


def mechanism(**changes: object) -> DpMechanism:
    base = {"trust": "local", "unit": "person", "sampled": "person", "draws": 3, "adjacency": "add_remove",
            "sampler": "poisson", "q": 0.5, "clip": 1.0, "sigma": 1.0, "steps": 1, "delta": 1e-5, "n_decl": 100}
    return DpMechanism(**(base | changes))  # type: ignore[arg-type]


class Linear:
    """Records with a known gradient each: the per-sample gradient of record i is `gradients[i]`, exactly."""

    def __init__(self, gradients: np.ndarray) -> None:
        self.layer = torch.nn.Linear(gradients.shape[1], 1, bias=False)
        data = torch.from_numpy(gradients.astype(np.float32))
        self.grads = PerSampleGradients(self.layer, {"weight": self.layer.weight}, lambda i: self.layer(data[i])[:, 0])


def test_every_person_is_one_item_and_its_records_are_drawn_without_replacement() -> None:
    owners = np.array([0, 1, 0, 2, 0, 0, 1, 0])
    population = Population(8, mechanism(), owners=owners)
    assert (population.units, population.items) == (3, 3)
    draw = population.draw(1.0)
    assert draw.count.tolist() == [3, 2, 1]
    for person, (rows, count) in enumerate(zip(draw.rows, draw.count, strict=True)):
        own = set(np.flatnonzero(owners == person))
        assert set(rows) <= own
        assert len(set(rows[:count])) == count


def test_draws_are_fresh_in_every_step_and_cover_all_records() -> None:
    """One person of 20 records, 3 a step: 200 steps miss a given record with probability (17/20)^200 < 1e-14."""
    population = Population(20, mechanism(), owners=np.zeros(20, np.int64))
    seen = Counter(int(r) for _ in range(200) for r in population.draw(1.0).rows[0])
    assert len(seen) == 20


def test_persons_are_sampled_independently_of_how_many_records_they_have() -> None:
    """alpha = 1e-6, two-sided binomial for a person of 50 records and one of a single record, 400 steps at q = 0.3."""
    owners = np.array([0] * 50 + [1])
    population = Population(51, mechanism(), owners=owners)
    hits = Counter(int(owners[r]) for _ in range(400) for r in population.draw(0.3).rows[:, 0])
    for person in (0, 1):
        assert binom.ppf(5e-7, 400, 0.3) <= hits[person] <= binom.isf(5e-7, 400, 0.3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=25), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_sensitivity_one_person_moves_the_sum_by_at_most_clip(owned: list[int], draws: int, seed: int) -> None:
    """All of a person's records together, whatever their number and size: at most C plus the lattice's rounding."""
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((len(owned), 6)) * 10.0 ** rng.integers(-3, 4, (len(owned), 1))
    lab, m = Linear(gradients), mechanism(draws=draws)
    population = Population(len(owned), m, owners=np.unique(owned, return_inverse=True)[1])
    for part in lab.grads.clipped(population.draw(1.0), m.clip, 4):
        moved = np.linalg.norm(part * pitch(m.clip), axis=1)
        assert (moved <= m.clip + pitch(m.clip) * np.sqrt(6) / 2).all()


def test_planted_second_record_of_a_person_uncapped_is_caught() -> None:
    """Clipping each record and adding a person's up: two records of one person move the sum by 2 C."""
    lab = Linear(np.array([[10.0, 0.0], [10.0, 0.0]]))
    honest = Population(2, mechanism(draws=2), owners=np.array([0, 0])).draw(1.0)
    planted = Draw(np.array([[0], [1]]), np.ones(2, np.int64))  # each record an item of its own

    def moved(draw: Draw) -> float:
        return float(np.linalg.norm(sum(p.sum(axis=0) for p in lab.grads.clipped(draw, 1.0, 4)) * pitch(1.0)))

    assert moved(honest) == pytest.approx(1.0, abs=1e-5)
    assert moved(planted) == pytest.approx(2.0, abs=1e-5)


def test_a_persons_contribution_is_the_clipped_mean_over_what_was_drawn() -> None:
    gradients = np.array([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    lab = Linear(gradients)
    draw = Population(3, mechanism(draws=3), owners=np.array([0, 0, 1])).draw(1.0)
    got = np.concatenate(list(lab.grads.clipped(draw, 0.5, 6))) * pitch(0.5)
    for row, mean in zip(got, (gradients[:2].mean(axis=0), gradients[2]), strict=True):
        want = mean * min(1.0, 0.5 / np.linalg.norm(mean))
        assert row == pytest.approx(want, abs=1e-5)


def test_poison_record_of_a_person_counts_as_zero_in_its_mean() -> None:
    lab = Linear(np.array([[np.nan, 1.0], [0.2, 0.0]]))
    draw = Population(2, mechanism(draws=2), owners=np.array([0, 0])).draw(1.0)
    got = np.concatenate(list(lab.grads.clipped(draw, 1.0, 4))) * pitch(1.0)
    assert got[0] == pytest.approx([0.1, 0.0], abs=1e-5)


@pytest.mark.parametrize("physical", [1, 2, 3, 7, 64])
def test_micro_batches_never_split_a_person(physical: int) -> None:
    rng = np.random.default_rng(0)
    gradients, owners = rng.standard_normal((30, 4)), np.repeat(np.arange(10), 3)
    lab, draw = Linear(gradients), Population(30, mechanism(draws=3), owners=owners).draw(1.0)
    whole = np.concatenate(list(lab.grads.clipped(draw, 1.0, 1000)))
    parts = list(lab.grads.clipped(draw, 1.0, physical))
    assert all(len(p) <= max(1, physical // 3) for p in parts)
    assert np.abs(np.concatenate(parts) - whole).max() <= 8


@pytest.mark.case(7)
def test_empty_sample_is_a_noise_only_step_with_the_same_denominator(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, m = Linear(np.ones((4, 3))), mechanism()
    population = Population(4, m, owners=np.arange(4))
    monkeypatch.setattr("privacy.population.poisson_sample", lambda units, q: np.zeros(0, np.int64))
    lattice = noisy_mean(lab.grads, population, m, 8) * m.denominator / pitch(m.clip)
    assert np.abs(lattice - np.rint(lattice)).max() < 1e-3
    assert np.abs(lattice).max() > 0


def test_k_max_keeps_the_same_records_whatever_their_order() -> None:
    m = mechanism(sampled="record", group=2, draws=1)
    contents, owners = [f"record {i}".encode() for i in range(12)], np.array([0] * 10 + [1] * 2)

    def kept(order: np.ndarray, lineage: str) -> set[bytes]:
        population = Population(12, m, owners=owners[order], lineage=lineage, contents=[contents[i] for i in order])
        return {contents[order[r]] for r in population.draw(1.0).rows[:, 0]}

    straight = kept(np.arange(12), "a")
    assert len(straight) == 4
    assert straight == kept(np.arange(12)[::-1], "a"), "the order of the file doesn't matter"
    assert any(kept(np.arange(12), str(i)) != straight for i in range(8)), "another lineage keeps others"
    assert Population(12, m, owners=owners, lineage="a", contents=contents).units == 2


@pytest.mark.case(5)
def test_person_unit_without_persons_is_refused() -> None:
    for m in (mechanism(), mechanism(sampled="record", group=4, draws=1)):
        with pytest.raises(UsageError, match=r"data\.person"):
            Population(3, m)


@pytest.mark.parametrize("change", [{"draws": 0}, {"group": 2}, {"unit": "record"}, {"sampled": "record", "draws": 2},
                                    {"sampled": "record", "draws": 1, "group": 0}])
def test_impossible_combinations_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"dp\.parameter"):
        mechanism(**change)


@pytest.mark.parametrize(("name", "body"), [
    ("empty.csv", "text,label,person\na,x,p\nb,x,\n"), ("two.csv", "text,label,person,person\na,x,p,q\n"),
    ("null.jsonl", '{"text":"a","label":"x","person":null}\n'), ("missing.jsonl", '{"text":"a","label":"x"}\n'),
    ("twice.jsonl", '{"text":"a","label":"x","person":"p","person":"q"}\n'),
    ("list.jsonl", '{"text":"a","label":"x","person":["p","q"]}\n')])
@pytest.mark.case(5)
def test_a_record_without_exactly_one_person_is_refused_at_load(tmp_path: Path, name: str, body: str) -> None:
    from strategies.records import load_records

    (tmp_path / name).write_text(body)
    with pytest.raises(UsageError, match=r"data\.person"):
        load_records(tmp_path / name, ["x"], person="person")


def test_persons_are_numbered_by_key(tmp_path: Path) -> None:
    from strategies.records import count_items, load_records

    path = tmp_path / "d.csv"
    path.write_text('text,label,person\na,x,p\nb,x,q\nc,x, p\n"broken,x,p\nd,x,7\n')
    records = load_records(path, ["x"], person="person")
    assert records.owners is not None and records.owners.tolist() == [0, 1, 0, 2, 3]
    assert records.valid.tolist() == [True, True, True, False, True]
    assert count_items(path, text="text", label="label", person="person") == 4
    assert count_items(path, text="text", label="label") == 5
