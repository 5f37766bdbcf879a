"""`fl-simulate bench strategies`: what it prints, how it splits, and that what it trains is what the rule says."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from privacy import cli_edge
from privacy.calibration import calibrate_sigma
from simulations import bench_strategies, bench_strategies_task, sentences
from simulations.bench_strategies_plot import figure
from simulations.bench_strategies_task import HELD_OUT, LAYER, SCALE, Bench, Task, split
from simulations.cli import app
from simulations.sentences import CLASSES, Sentences
from strategies.adapter import initial
from strategies.base import A, B
from strategies.federate import federate
from strategies.merge import effective
from strategies.rules import RULES

WIDTH = 24


def made(n: int = 480) -> Sentences:
    """Unit vectors that scatter around one of eight directions."""
    rng = np.random.default_rng(5)
    labels = np.minimum(np.arange(n) % 12, len(CLASSES) - 1)  # the last class is the largest
    vectors = np.eye(len(CLASSES), WIDTH)[labels] + 0.1 * rng.standard_normal((n, WIDTH))
    return Sentences((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Sentences:
    data = made()
    monkeypatch.setattr(bench_strategies, "load", lambda: data)
    return data


@pytest.mark.parametrize("classes", [1, 2, 8])
def test_a_silo_holds_its_classes_and_every_record_is_in_one_place(classes: int) -> None:
    data, task = made(), Task(classes=classes)
    parts, out = split(data, task, 0)
    everywhere = np.concatenate([*parts, out])
    assert sorted(everywhere) == list(range(len(data.labels)))
    assert len(out) == int(HELD_OUT * len(data.labels))
    assert [len(set(data.labels[part])) for part in parts] == [classes] * task.silos
    holders = [sum(label in data.labels[part] for part in parts) for label in range(len(CLASSES))]
    assert holders == [classes] * len(CLASSES)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_site_moves_what_the_rule_trains_and_nothing_else(rule: Any) -> None:
    bench = Bench(made(), Task(rank=2, local_steps=1), rule, 0)
    begun = initial(bench.setup.spec, 0)
    for no in (1, 2):
        start = rule.own(begun, bench.setup.ranks[1])
        start = {n: v + np.float32(0.1) if rule.trains(n) else v for n, v in start.items()}  # with zeros, A has no gradient
        whole = {n: v + np.float32(0.1) if rule.trains(n) else v for n, v in begun.items()}
        new = bench.trained(whole, no, 1)
        assert {n: v.shape for n, v in new.items()} == {n: v.shape for n, v in start.items()}
        assert {n for n in new if (new[n] != start[n]).any()} == {n for n in new if rule.trains(n, no)}


@pytest.mark.parametrize("name", ["exact", "fedsb", "ffa"])
def test_the_model_computes_what_the_adapter_says(name: str) -> None:
    """W0 + s (residual + B R A), whatever the rule's adapter has of these."""
    bench, rng = Bench(made(), Task(rank=2), RULES[name], 0), np.random.default_rng(1)
    adapter = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in bench.setup.spec.shapes}
    model = bench._models[2]
    x, plain = bench.silos[0].vectors, model._base
    model.load(adapter)
    hidden = torch.nn.functional.gelu(x @ (plain + SCALE * torch.tensor(effective(adapter)[LAYER]).float()).T)
    torch.testing.assert_close(model(x), hidden @ model.head.weight.T, rtol=1e-4, atol=1e-4)


def test_exact_gives_the_mean_of_the_silos_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted by their sizes; what doesn't fit into rank 2 is in the residual."""
    bench = Bench(made(), Task(rank=2, rounds=1, local_steps=3), RULES["exact"], 0)
    begun = initial(bench.setup.spec, 0)
    news = [bench.trained(begun, 1, k) for k in range(8)]
    sizes = [len(silo.labels) for silo in bench.silos]
    want = sum(n * new[LAYER + B] @ new[LAYER + A] for n, new in zip(sizes, news, strict=True)) / sum(sizes)
    got: dict[str, NDArray[np.float32]] = {}

    def keep(*args: Any) -> Any:
        out = federate(*args)
        got.update(out.adapter)
        return out

    monkeypatch.setattr(bench_strategies_task, "federate", keep)
    bench.accuracy()
    made_of = got[LAYER + B] @ got[LAYER + A] + got[LAYER + ".residual.weight"]
    np.testing.assert_allclose(made_of, want, atol=1e-6)


def test_an_epsilon_brings_noise() -> None:
    """Without one, runs repeat bit by bit; with one they don't, and the whole run is calibrated to it."""
    task = Task(rounds=2, local_steps=2)
    for epsilon, repeats in ((None, True), (1.0, False)):
        one, two = (Bench(made(), replace(task, epsilon=epsilon), RULES["ffa"], 0) for _ in range(2))
        begun = initial(one.setup.spec, 0)
        same = one.trained(begun, 1, 0)[LAYER + B] == two.trained(begun, 1, 0)[LAYER + B]
        assert same.all() if repeats else not same.any()
    mechanism = one._mechanisms[0]
    assert mechanism is not None
    assert mechanism.sigma == calibrate_sigma(mechanism.q, 4, mechanism.delta, 1.0)


def test_the_result_holds_what_the_contract_names(small: Sentences, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli_edge.run(app, ["bench", "strategies", "--rule", "exact", "--rule", "fedit", "--seeds", "2", "--rank", "2",
                              "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    for name in ("label_skew", "iid"):
        assert set(found[name]) == {"exact", "fedit"}
        for rule, value in found[name].items():
            assert 0 <= value <= 1
            assert value == pytest.approx(np.mean(found["samples"][name][rule]), rel=1e-5)
            assert len(found["samples"][name][rule]) == len(found["seeds"]) == 2
    assert found.keys() >= {"environment", "seeds", "dtype", "learning_rates", "goals", "cpu_s"}
    assert found["goals"]["label_skew_exact_less_fedit"]["value"] == pytest.approx(
        found["label_skew"]["exact"] - found["label_skew"]["fedit"], abs=1e-5)


@pytest.mark.parametrize(("arguments", "says"), [(["--silos", "3"], "at least 8"), (["--rule", "fedti"], "fedit")])
def test_what_can_not_be_is_refused(small: Sentences, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
                                    ) -> None:
    assert cli_edge.run(app, ["bench", "strategies", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_figure_shows_every_rule_and_repeats_byte_by_byte() -> None:
    cells = [{"at": at, "accuracy": {"ffa": [0.5, 0.6], "exact": [0.7, 0.75]}} for at in (8, 4)]
    found = {"sweep": {"classes": cells, "rank": cells, "epsilon": [{**cells[0], "at": None}, cells[1]]}}
    drawn = figure(found)
    assert drawn == figure(found)
    assert ">exact<" in drawn
    assert ">none<" in drawn
    with pytest.raises(Exception, match="sweep"):
        figure({})


def test_sentences_are_read_with_the_sign_of_their_rating(tmp_path: Path) -> None:
    archive = tmp_path / "corpora.tar.gz"
    with tarfile.open(archive, "w:gz") as t:
        for name in sentences.KINDS.values():
            content = f"1\t2.5\t{name} good\r\n2\t-0.1\t{name} bad\r\n3\t0\t{name} neither\r\n".encode()
            info = tarfile.TarInfo(f"{sentences.ARCHIVE}/{name}_GroundTruth.txt")
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    texts, labels = sentences.read(archive)
    assert list(labels) == [1, 0, 3, 2, 5, 4, 7, 6]
    assert texts[2] == "amazonReviewSnippets good"
