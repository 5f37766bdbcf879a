"""What the coordinator may measure: the contract's metrics on a public split that no site trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from conf.settings import Evaluation
from privacy.contract import Contract
from privacy.errors import UsageError
from strategies.adapter import Tensors
from strategies.examples import open_examples
from strategies.lora_model import LoraModel


@dataclass(frozen=True)
class Score:
    """values: by name of the metric, in the contract's order. units: records that they are over."""

    values: Mapping[str, float]
    units: int


class PublicSplit:
    """The split, prepared once. Raises UsageError `evaluation.missing`, and as `Table.open`."""

    def __init__(self, model: LoraModel, contract: Contract, split: Evaluation) -> None:
        self._model, self.name = model, split.name
        if split.file is None:
            raise UsageError("evaluation.missing", "There is no public split to measure on.",
                             "Set data.evaluation.file to a public labelled file.")
        records = open_examples(Path(split.file), contract, text=split.text, label=split.label).load()
        self._units, self._measure = int(records.valid.sum()), model.measure(records)

    def score(self, adapter: Tensors) -> Score:
        """Over the valid records."""
        self._model.load(adapter)
        return Score(self._measure(), self._units)
