"""What a model learns from: texts with a label, or prompts with an answer, in one file, by the contract's task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from privacy.contract import Contract
from strategies.formats import Row
from strategies.records import LabelledFile
from strategies.table import Contents, Owners, Table, is_text


class Examples(Protocol):
    """A file of records that stay in it: their number, some of them, all of them, and what `Population` needs."""

    owners: Owners | None
    contents: Contents

    def __len__(self) -> int: ...

    def take(self, rows: Iterable[int]) -> Any: ...

    def load(self) -> Any: ...

    def require_unchanged(self) -> None: ...


@dataclass(frozen=True)
class Instructions:
    """prompts, answers: one per record, "" where invalid. valid: bool (n,)."""

    prompts: list[str]
    answers: list[str]
    valid: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.prompts)


class InstructionFile:
    """Prompts with their answers, as `Examples`. Raises as `Table.open`.

    contents: as those of a `LabelledFile` on the same two columns, so that a lineage knows a record in either task.
    """

    def __init__(self, path: Path, *, prompt: str, answer: str, person: str | None = None) -> None:
        self._table = Table.open(path, {"text": prompt, "label": answer}, person=person)
        self.owners: Owners | None = self._table.owners
        self.contents: Contents = self._table.contents
        self.require_unchanged = self._table.require_unchanged

    def __len__(self) -> int:
        return len(self._table)

    def take(self, rows: Iterable[int]) -> Instructions:
        """The records of these numbers, in this order."""
        return _judge(self._table[int(row)] for row in rows)

    def load(self) -> Instructions:
        """All of them, in memory."""
        return _judge(self._table)


def _judge(rows: Iterable[Row | None]) -> Instructions:
    """A record without two texts is a unit all the same, and contributes zero."""
    prompts, answers, valid = [], [], []
    for row in rows:
        prompt, answer = (None, None) if row is None else (row["text"], row["label"])
        ok = is_text(prompt) and is_text(answer)
        prompts.append(str(prompt) if ok else "")
        answers.append(str(answer) if ok else "")
        valid.append(ok)
    return Instructions(prompts, answers, np.array(valid, bool))


def open_examples(path: Path, contract: Contract, *, text: str, label: str, person: str | None = None) -> Examples:
    """text, label: the columns of what the model reads and of what it learns to give: a label, or an answer.

    Raises as `Table.open`; never quotes a record.
    """
    if contract.model.task == "causal_lm":
        return InstructionFile(path, prompt=text, answer=label, person=person)
    return LabelledFile(path, contract.data.labels, text=text, label=label, person=person)
