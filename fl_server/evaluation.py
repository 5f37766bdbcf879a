"""What the coordinator may measure: accuracy on a public split that no site trains on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conf.settings import Evaluation
from privacy.contract import Contract
from privacy.errors import UsageError
from strategies.adapter import Tensors
from strategies.model import TextClassifier
from strategies.records import load_records


@dataclass(frozen=True)
class Score:
    accuracy: float
    units: int


class PublicSplit:
    """The split, encoded once. None configured: every score has 0 units."""

    def __init__(self, model: TextClassifier, contract: Contract, split: Evaluation) -> None:
        self._model, self.name = model, split.name
        if split.file is None:
            raise UsageError("evaluation.missing", "There is no public split to measure on.",
                             "Set data.evaluation.file to a public labelled file.")
        records = load_records(Path(split.file), contract.data.labels, text=split.text, label=split.label)
        self._labels, self._valid = records.labels, records.valid
        self._batch = model.encode(records.texts)

    def score(self, adapter: Tensors) -> Score:
        """accuracy: 0..1 over the valid records."""
        self._model.load(adapter)
        right = (self._model.logits(self._batch).argmax(axis=1) == self._labels) & self._valid
        units = int(self._valid.sum())
        return Score(float(right.sum()) / max(units, 1), units)
