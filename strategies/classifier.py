"""Text classification: an encoder with LoRA, pooling and a linear head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privacy.contract import LoraTerms, ModelTerms
from strategies.base import Rule
from strategies.linear import Ffa
from strategies.lora_model import LoraModel, load_base
from strategies.records import Records

if TYPE_CHECKING:
    import torch

ENCODE_BATCH = 128
PLAIN = Ffa()  # its adapter is PEFT's tensors and the head


@dataclass(frozen=True)
class Batch:
    """input_ids, mask: int64 (n, length). hidden: float32 (n, length, width), input of the first adapted layer, or None
    where there are none below it."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    hidden: torch.Tensor | None

    def take(self, rows: Sequence[int] | NDArray[np.int64] | slice) -> Batch:
        return Batch(self.input_ids[rows], self.mask[rows], None if self.hidden is None else self.hidden[rows])


@dataclass(frozen=True)
class Labelled:
    """labels: int64 (n,). valid: float32 (n,), 0 or 1."""

    batch: Batch
    labels: torch.Tensor
    valid: torch.Tensor

    def take(self, rows: NDArray[np.int64]) -> Labelled:
        return Labelled(self.batch.take(rows), self.labels[rows], self.valid[rows])


class TextClassifier(LoraModel):
    """Built from a contract. rule: its adapter may have a core or a residual beside PEFT's tensors."""

    task = "FEATURE_EXTRACTION"
    encode_batch = ENCODE_BATCH

    def __init__(self, folder: Path, model: ModelTerms, lora: LoraTerms, classes: int, rule: Rule = PLAIN) -> None:
        import torch

        self.terms = model
        base, self.tokenizer = load_base("AutoModel", folder)
        self.head = torch.nn.Linear(base.config.hidden_size, classes)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        super().__init__(base, lora, rule, dict(self.head.named_parameters(prefix="head")))
        self.module = _module(self)

    @property
    def synthetic(self) -> Records:
        return Records(["A synthetic record, no one's."], np.zeros(1, np.int64), np.ones(1, bool))

    def prepare(self, records: Records) -> Labelled:
        import torch

        return Labelled(self.encode(records.texts), torch.from_numpy(records.labels),
                        torch.from_numpy(records.valid.astype(np.float32)))

    def each(self, prepared: Labelled) -> torch.Tensor:
        """Cross entropy of each record's label."""
        import torch

        loss = torch.nn.functional.cross_entropy(self.module(prepared.batch), prepared.labels, reduction="none")
        return loss * prepared.valid

    def measure(self, records: Records) -> Callable[[], dict[str, float]]:
        """accuracy: 0..1."""
        batch, labels, valid = self.encode(records.texts), records.labels, records.valid

        def measure() -> dict[str, float]:
            right = (self.logits(batch).argmax(axis=1) == labels) & valid
            return {"accuracy": float(right.sum()) / max(int(valid.sum()), 1)}

        return measure

    def encode(self, texts: Sequence[str]) -> Batch:
        """Tokenise at least one text to the contract's length and run the frozen lower layers once."""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.terms.max_length,
                                return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        return Batch(ids, mask, self.below(ids, mask))

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """float32 (n, classes), without gradients."""
        import torch

        with torch.no_grad():
            parts = [self.module(batch.take(slice(i, i + ENCODE_BATCH)))
                     for i in range(0, len(batch.input_ids), ENCODE_BATCH)]
            return np.asarray(torch.cat(parts).numpy(), np.float32)


def _module(model: TextClassifier) -> Any:
    import torch

    peft, terms = model.peft, model.terms

    class Classifier(torch.nn.Module):
        """Batch -> logits, float32 (n, classes)."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = peft, model.head

        def forward(self, batch: Batch) -> torch.Tensor:
            model.inject(batch.hidden)
            out = self.encoder(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
            if terms.pooling == "cls":
                pooled = out[:, 0]
            else:
                weight = batch.mask[..., None].to(out.dtype)
                pooled = (out * weight).sum(1) / weight.sum(1).clamp(min=1)
            logits: torch.Tensor = self.head(torch.nn.functional.normalize(pooled, dim=-1) * terms.scale)
            return logits

    return Classifier()
