"""Base models in 4 or 8 bits: what isn't proven is refused by name before it is loaded; what is has per-record gradients."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from privacy.contract import LoraTerms, ModelTerms
from privacy.engine import gradients
from privacy.errors import ConsiloError, Refused, UsageError
from strategies.classifier import TextClassifier
from strategies.exact import Exact
from strategies.quantised import EXTRA, check_quantisation
from strategies.records import Records

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}


def folder(at: Path, config: Any) -> Path:
    (at / "config.json").write_text(json.dumps({"quantization_config": config}))
    return at


@pytest.mark.parametrize("config", [
    {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
    {"quant_method": "bitsandbytes", "load_in_8bit": True}, {**NF4, "bnb_4bit_quant_type": "fp4"},
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "torchao"}, {"bits": 8}, ["nf4"], "nf4"], ids=str)
def test_what_is_not_proven_is_refused_by_name(tmp_path: Path, config: Any) -> None:
    """LLM.int8's default threshold couples the records of a batch."""
    with pytest.raises(Refused) as caught:
        check_quantisation(folder(tmp_path, config))
    assert caught.value.code == "model.quantised"
    assert not isinstance(config, dict) or str(config.get("quant_method", "unknown")) in str(caught.value)


@pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
def test_without_its_package_the_extra_is_named(tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.quantised.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"consilo\[quantised\]") as caught:
        check_quantisation(folder(tmp_path, config))
    assert caught.value.code == "model.extra"
    monkeypatch.setattr("strategies.quantised.find_spec", lambda name: name == EXTRA)
    assert check_quantisation(folder(tmp_path, config)) in ("nf4", "int8")


def test_full_precision_needs_nothing(tmp_path: Path) -> None:
    assert check_quantisation(folder(tmp_path, None)) is None


def test_the_model_is_refused_before_it_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="gptq"):
        classifier(copy)
    assert "gptqmodel" not in sys.modules


def classifier(at: Path, **options: Any) -> TextClassifier:
    terms = ModelTerms.model_validate({"weights": "0" * 64, "tokenizer": "0" * 64, "max_length": 16})
    return TextClassifier(at, terms, LoraTerms.model_validate({"r": 2, "alpha": 8.0, "layers": [0, 1]}), 3, **options)


def quantised(at: Path, tiny: Path, kind: str) -> Path:
    """A model of width 64 (NF4 takes blocks of 64) with the tiny model's tokenizer, as transformers stores it."""
    pytest.importorskip(EXTRA, reason="the extra consilo[quantised]")
    from transformers import AutoModel, BertConfig, BertModel, BitsAndBytesConfig

    options: dict[str, Any] = ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "nf4" else
                               {"load_in_8bit": True, "llm_int8_threshold": 0.0})
    vocabulary = json.loads((tiny / "config.json").read_text())["vocab_size"]
    full = f"{at}-full"
    BertModel(BertConfig(vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=128, max_position_embeddings=32, initializer_range=0.2)).save_pretrained(full)
    made = AutoModel.from_pretrained(full, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options))
    shutil.copytree(tiny, at, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    made.save_pretrained(at)
    return at


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_on_a_quantised_base_are_those_of_each_record_alone(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    model = classifier(quantised(tmp_path / "q", tiny_model, kind))
    texts = ["pulse " * 20, "a cough", "rash on my chest since monday", "pain"]
    prepared = model.prepare(Records(texts, np.array([0, 1, 2, 0]), np.ones(4, bool)))
    trained = {n: p for n, p in model.parameters.items() if ".lora_B." in n or n.startswith("head.")}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters.values():
            p.add_(torch.empty(p.shape).normal_(std=0.2, generator=generator))
    grads = gradients("auto", model.module, trained, lambda rows: model.each(prepared.take(rows)))
    rows = grads._chunk(np.arange(4))
    for i in range(4):
        parts = torch.autograd.grad(model.each(prepared.take(np.array([i]))).sum(), list(trained.values()))
        alone = torch.cat([part.ravel() for part in parts]).numpy()
        assert np.linalg.norm(rows[i] - alone) <= 1e-4 * np.linalg.norm(alone)
    np.testing.assert_array_equal(grads._chunk(np.array([0, 3, 3, 3]))[0], rows[0])
    grads.check(1)


@pytest.mark.long
def test_a_residual_on_a_quantised_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConsiloError) as caught:
        classifier(quantised(tmp_path / "q", tiny_model, "nf4"), rule=Exact())
    assert caught.value.code == "model.quantised"
