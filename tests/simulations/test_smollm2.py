"""The embedded language model: what makes a model folder of a GGUF file, and its instructions."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import pytest

from privacy.errors import UsageError
from simulations.demo import EMBEDDED, MODELS
from simulations.fetch import TABLE, fetch
from simulations.hpo import HOSPITALS, prepare, prepare_chat
from simulations.smollm2 import GGUF, WEIGHTS, convert


def test_every_embedded_model_and_data_set_is_in_the_table() -> None:
    assert set(MODELS) <= set(TABLE)
    assert {package for package, _ in EMBEDDED.values()} <= set(TABLE)
    assert TABLE["smollm2"].files == (GGUF,)


def test_conversion_without_gguf_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / GGUF).touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="gguf") as caught:
        convert(tmp_path)
    assert caught.value.code == "fetch.gguf"
    assert [f.name for f in tmp_path.iterdir()] == [GGUF]


def test_a_newer_file_is_converted_again_and_an_older_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / GGUF).touch()
    (tmp_path / WEIGHTS).touch()
    os.utime(tmp_path / GGUF, (1, 1))
    convert(tmp_path)
    os.utime(tmp_path / WEIGHTS, (0, 0))
    with pytest.raises(UsageError):
        convert(tmp_path)


@pytest.mark.model
def test_instructions_are_the_phrases_with_their_clinical_terms(tmp_path: Path) -> None:
    obo = fetch("hpo") / "hp.obo"
    files, plain = prepare_chat(obo, tmp_path), prepare(obo, tmp_path)
    for name in HOSPITALS:
        lines = [json.loads(line) for line in files[name].read_text().splitlines()]
        with plain[name].open(encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        assert [line["prompt"] for line in lines] == [row["text"] for row in rows]
        for line, row in zip(lines, rows, strict=True):
            organ, term = line["completion"].split(": ", 1)
            assert row["label"].endswith(organ) and term
    held_out = {json.loads(line)["prompt"] for line in files["public"].read_text().splitlines()}
    assert len(held_out) == 400
    trained = {json.loads(line)["prompt"] for name in HOSPITALS for line in files[name].read_text().splitlines()}
    assert len(held_out & trained) < 5, "a phrase may name two terms, but terms are in one place only"
