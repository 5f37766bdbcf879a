"""`fl-simulate bench rules`: the same accuracy as a whole simulated run, and nothing done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf import load_settings
from privacy import cli_edge
from simulations import bench_rules
from simulations.bench_rules import Models, by_length, play, shortened
from simulations.cli import app
from simulations.local import federate
from strategies.model import build, classifier
from strategies.records import Records, load_records

Make = Callable[..., list[str]]


@pytest.fixture
def overrides(tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path]) -> Make:
    def make(*more: str) -> list[str]:
        sites = ",".join(f"{n}:{{file:{p}}}" for n, p in tiny_data.items() if n != "public")
        return ["model=local", "model.name=tiny", f"model.path={tiny_model}", "model.max_length=16", "data=files",
                "data.name=tiny", f"data.sites={{{sites}}}", f"data.evaluation.file={tiny_data['public']}",
                "privacy.rounds=3", *more]

    return make


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_a_run_has_the_accuracy_of_the_simulation(overrides: Make, tmp_path: Path, rule: str) -> None:
    """Without sampling and noise both are deterministic, but for the encoding's rounding."""
    alike = overrides("privacy=none", "privacy.rounds=3", "privacy.q=1")
    settings = load_settings([*alike, f"rule={rule}", "seed=4", f"server.out={tmp_path / 'out'}"])
    whole = federate(settings).result
    found = bench_rules.run(alike, rules=[f"{rule} rule.server_lr=0.2"], seeds=[4], keep=None)
    (sample,) = found["samples"]
    assert sample["before"] == whole.before.values["accuracy"]
    assert sample["accuracy"] == whole.after.values["accuracy"] != sample["before"]
    assert sample["units"] == whole.after.units


def test_noise_is_that_of_the_configuration_s_contract(overrides: Make) -> None:
    settings = bench_rules.settled(overrides("privacy.epsilon=2"), "ffa", 0, {})
    found = play(settings, Models())
    assert all(sigma > 1 for sigma in found["sigma"].values())


def test_what_is_kept_is_not_repeated(overrides: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    keep, calls = tmp_path / "runs.jsonl", list[tuple[str, int]]()

    def counted(settings: Any, models: Any) -> dict[str, Any]:
        calls.append((settings.rule.name, settings.seed))
        return {"accuracy": 0.5 + 0.1 * settings.seed, "units": 90}

    monkeypatch.setattr(bench_rules, "play", counted)
    command = ["bench", "rules", *overrides(), "--rule", "ffa", "--rule", "krum rule.byzantine=0", "--seeds", "2",
               "--keep", str(keep), "--json"]
    for _ in range(2):
        assert cli_edge.run(app, command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert calls == [("ffa", 0), ("krum", 0), ("ffa", 1), ("krum", 1)]
    assert found["accuracy"] == {"ffa": 0.55, "krum rule.byzantine=0": 0.55}
    assert found["spread"]["ffa"] == pytest.approx(np.std([0.5, 0.6], ddof=1), rel=1e-5)
    assert found["epsilon"] == 8


def test_what_is_cut_is_only_padding(tiny_model: Path, tiny_contract: Callable[..., Any]) -> None:
    model, plain = (classifier(make(tiny_model, tiny_contract())) for make in (Models().build, build))
    with torch.no_grad():
        for each in (model, plain):
            each.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    texts = ["ab", "c d e", "c"]
    records = Records(texts, np.zeros(3, np.int64), np.ones(3, bool))
    prepared = model.prepare(records)
    cut = shortened(prepared.batch)
    assert cut.mask.shape[1] < prepared.batch.mask.shape[1]
    assert cut.mask.sum() == prepared.batch.mask.sum()
    torch.testing.assert_close(model.each(prepared), plain.each(plain.prepare(records)), rtol=1e-4, atol=1e-4)
    assert model.encode(texts) is prepared.batch


def test_copies_hold_the_same_records_and_persons(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("words,kind,who\nlonger words,a,x\nw,b,y\n,a,x\nwords,a,y\n")
    settings = load_settings(["data=files", "data.name=mine", f"data.sites={{site-a:{{file:{file}}}}}", "data.text=words",
                              "data.label=kind", "data.person=who"])
    copy = load_records(by_length(settings, tmp_path)["site-a"], ("a", "b"), text="text", label="label", person="person")
    mine = load_records(file, ("a", "b"), text="words", label="kind", person="who")
    assert [len(t) for t in copy.texts] == sorted(len(t) for t in mine.texts)

    def pairs(records: Any) -> list[tuple[str, int, bool, int]]:
        sizes = np.bincount(records.owners)
        return sorted(zip(records.texts, records.labels, records.valid, sizes[records.owners], strict=True))

    assert pairs(copy) == pairs(mine)
    together = {frozenset(np.array(r.texts)[r.owners == o]) for r in (copy, mine) for o in set(r.owners)}
    assert together == {frozenset({"longer words", ""}), frozenset({"w", "words"})}
