"""A rule's adapter in the real model: core and residual compute what merge.py says, train under DP, save as PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModel, AutoTokenizer

from privacy.contract import Contract
from privacy.dpsgd import PerSampleGradients
from strategies.adapter import HEAD, initial
from strategies.base import CORE, RESIDUAL, Rule
from strategies.classifier import TextClassifier
from strategies.exact import Exact
from strategies.fedsb import FedSb
from strategies.plaintext import Flora
from strategies.rules import RULES

TEXTS = ["a cough", "my chest hurt very much", "rash ?!", "pulse pulse"]
Make = Callable[..., Contract]


def made(folder: Path, contract: Contract, rule: Rule) -> TextClassifier:
    return TextClassifier(folder, contract.model, contract.lora, len(contract.data.labels), rule)


def values(classifier: TextClassifier, rule: Rule) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {n: rng.normal(0, 0.2, shape).astype(np.float32) for n, shape in classifier.spec(rule.trains).shapes}


@pytest.mark.parametrize("rule", [FedSb(), Exact(), Flora()], ids=lambda r: r.name)
def test_saved_folder_computes_the_same_under_peft_alone(tiny_model: Path, tiny_contract: Make, tmp_path: Path,
                                                         rule: Rule) -> None:
    contract = tiny_contract()
    classifier = made(tiny_model, contract, rule)
    tensors = values(classifier, rule)
    classifier.load(tensors)
    want = classifier.logits(classifier.encode(TEXTS))
    classifier.save(tmp_path, tensors, "tiny")
    tokens = AutoTokenizer.from_pretrained(tiny_model)(TEXTS, padding="max_length", truncation=True, max_length=16,
                                                       return_tensors="pt")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), tmp_path).eval()
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state.numpy()
    mask, head = tokens["attention_mask"].numpy()[..., None], load_file(tmp_path / "head.safetensors")
    pooled = (out * mask).sum(1) / mask.sum(1)
    got = pooled / np.linalg.norm(pooled, axis=1, keepdims=True) * 10.0 @ head["weight"].T + head["bias"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    own = {n: v for n, v in tensors.items() if n.endswith((CORE, RESIDUAL))}
    assert own
    classifier.load({**tensors, **{n: np.zeros_like(v) for n, v in own.items()}})
    assert np.abs(classifier.logits(classifier.encode(TEXTS)) - want).max() > 0.01


def test_loading_twice_does_not_add_the_residual_twice(tiny_model: Path, tiny_contract: Make) -> None:
    classifier = made(tiny_model, tiny_contract(), Exact())
    tensors = values(classifier, Exact())
    batch = classifier.encode(TEXTS)
    classifier.load(tensors)
    once = classifier.logits(batch)
    classifier.load(tensors)
    np.testing.assert_array_equal(classifier.logits(batch), once)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda r: r.name)
def test_what_a_rule_trains_has_the_gradients_of_per_example_autograd(tiny_model: Path, tiny_contract: Make,
                                                                      rule: Rule) -> None:
    """Core and residual in place, through the product's hooks; the start is in the base model's own function."""
    classifier = made(tiny_model, tiny_contract(), rule)
    spec = classifier.spec(rule.trains)
    start = initial(spec, 0)
    batch = classifier.encode(TEXTS)
    classifier.load(start)
    assert not classifier.logits(batch).any()  # the head is zero
    labels = torch.tensor([0, 1, 2, 0])

    def losses(rows: NDArray[np.int64], one: TextClassifier = classifier) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(one.module(batch.take(rows)), labels[rows], reduction="none")

    trained = {n: p for n, p in classifier.parameters.items() if n in spec.trained}
    assert trained.keys() == spec.trained
    grads = PerSampleGradients(classifier.module, trained, losses)
    grads.check(0)
    plain = made(tiny_model, tiny_contract(), rule)  # without the hooks
    own = [plain.parameters[n].requires_grad_() for n in trained]
    for one in (classifier, plain):
        one.load(values(classifier, rule))
    got = grads._chunk(np.arange(4))
    for row in range(4):
        alone = torch.autograd.grad(losses(np.array([row]), plain)[0], own)
        want = np.concatenate([g.numpy().ravel() for g in alone])
        assert np.linalg.norm(got[row] - want) < 1e-5 * np.linalg.norm(want)
    assert set(HEAD) <= spec.trained
