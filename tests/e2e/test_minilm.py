"""The demo's own model and data (fetched once, cached), a few rounds in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf import load_settings
from simulations.fetch import cache_folder, fetch
from simulations.hpo import HOSPITALS, prepare
from simulations.local import federate


@pytest.mark.model
def test_phrases_are_learned_privately(tmp_path: Path) -> None:
    fetch("minilm")
    prepare(fetch("hpo") / "hp.obo", cache_folder() / "hpo")
    outcome = federate(load_settings(["privacy.rounds=4", "privacy.retries=0", "server.evaluate_every=4",
                                      f"server.out={tmp_path / 'out'}"]))
    assert outcome.result.after.values["accuracy"] > outcome.result.before.values["accuracy"] + 0.15
    assert all(float(e) <= 8.0 for e in outcome.result.epsilon.values())


@pytest.mark.model
def test_hospitals_are_skewed_and_share_no_term(tmp_path: Path) -> None:
    import csv
    from collections import Counter

    from simulations.hpo import phrases

    obo = fetch("hpo") / "hp.obo"
    files, term = prepare(obo, tmp_path), {(text, label): t for text, t, label in phrases(obo)}
    seen: dict[str, set[str]] = {}
    for name, path in files.items():
        with path.open(encoding="utf-8") as f:
            rows = [(r["text"], r["label"]) for r in csv.DictReader(f)]
        seen[name] = {term[r] for r in rows}
        if name in HOSPITALS:
            assert Counter(label for _, label in rows).most_common(1)[0][1] > 0.3 * len(rows)
    texts = sum(len(s) for s in seen.values())
    assert len(set().union(*seen.values())) == texts > 1000
