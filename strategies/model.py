"""The model that a contract names, built from the folder that a site or the coordinator installed."""

from __future__ import annotations

from pathlib import Path

from privacy.contract import Contract
from privacy.errors import UsageError
from strategies.causal import CausalLM
from strategies.classifier import TextClassifier
from strategies.folder import check_folder
from strategies.lora_model import LoraModel
from strategies.rules import rule as find


def build(folder: Path, contract: Contract, rank: int | None = None) -> LoraModel:
    """The contract's model. rank: of a site's own LoRA, with the contract's scale alpha / lora.r; null: lora.r.

    Raises Refused `model.digest` when the folder isn't the contract's base model; also as `rules.rule`.
    """
    check_folder(folder, contract.model)
    rule, lora = find(contract.rule.name, secure=contract.secagg.enabled), contract.lora
    if rank is not None and rank != lora.r:
        lora = lora.model_copy(update={"r": rank, "alpha": lora.alpha * rank / lora.r})
    if contract.model.chat is not None:
        return CausalLM(folder, contract.model, contract.model.chat, lora, rule)
    return TextClassifier(folder, contract.model, lora, len(contract.data.labels), rule)


def classifier(model: LoraModel) -> TextClassifier:
    """The model, for what works on a classifier only. Raises UsageError `model.task`."""
    if not isinstance(model, TextClassifier):
        raise UsageError("model.task", "This works on a text classifier only.",
                         "Take a contract with model.task=classification.")
    return model
