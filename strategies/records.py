"""Labelled records of a file, with a text and a label column. Judged record by record; nothing here leaves.

A record that doesn't fit (not text, too long, a label outside the contract) stays a unit but contributes zero: its
place, and so every count that leaves, is the same as if it had been good.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strategies.formats import Row
from strategies.table import MAX_TEXT, Contents, Owners, Table, is_text

__all__ = ["MAX_TEXT", "LabelledFile", "Records", "count_items", "load_records", "public_labels"]


@dataclass(frozen=True)
class Records:
    """texts: one per record, "" where invalid. labels: int64 (n,), 0 where invalid. valid: bool (n,).

    owners: person of each record, int32 (n,), where a person column was asked for; a record that can't be read is a
    person of its own. contents: SHA-256 of each record as it stands in the file, whatever the labels of a contract: what a
    lineage knows it by.
    """

    texts: list[str]
    labels: NDArray[np.int64]
    valid: NDArray[np.bool_]
    owners: Owners | None = None
    contents: Contents | Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(self.texts)


class LabelledFile:
    """A file of labelled records that stay in it; memory is that of `Table`. Raises as `Table.open`.

    contents: SHA-256 of each record as it stands in the file, whatever the labels of a contract: what a lineage knows it
    by. people: key of the person of each record.
    """

    def __init__(self, path: Path, labels: Sequence[str], *, text: str = "text", label: str = "label",
                 person: str | None = None) -> None:
        self._table = Table.open(path, {"text": text, "label": label}, person=person)
        self._known = {name: i for i, name in enumerate(labels)}
        self.owners: Owners | None = self._table.owners
        self.contents: Contents = self._table.contents
        self.require_unchanged = self._table.require_unchanged

    def __len__(self) -> int:
        return len(self._table)

    @property
    def people(self) -> Iterator[str]:
        return self._table.people if self.owners is not None else iter(())

    def take(self, rows: Iterable[int]) -> Records:
        """The records of these numbers, in this order, without owners."""
        return self._judge(self._table[int(row)] for row in rows)

    def load(self) -> Records:
        """All of them, in memory."""
        return replace(self._judge(self._table), owners=self.owners, contents=self.contents)

    def _judge(self, rows: Iterable[Row | None]) -> Records:
        texts, numbers, valid = [], [], []
        for row in rows:
            text, label = (None, None) if row is None else (row["text"], row["label"])
            ok = is_text(text) and isinstance(label, str) and label in self._known
            texts.append(str(text) if ok else "")
            numbers.append(self._known[str(label)] if ok else 0)
            valid.append(ok)
        return Records(texts, np.array(numbers, np.int64), np.array(valid, bool))


def load_records(path: Path, labels: Sequence[str], *, text: str = "text", label: str = "label",
                 person: str | None = None) -> Records:
    """A whole file in memory. Raises as `Table.open`; never quotes a record."""
    return LabelledFile(path, labels, text=text, label=label, person=person).load()


def count_items(path: Path, *, text: str, label: str, person: str | None = None) -> int:
    """Number of records of a file, or of persons where a column names them. Raises as `Table.open`."""
    table = Table.open(path, {"text": text, "label": label}, person=person)
    return len(table) if table.owners is None else int(table.owners.max()) + 1


def public_labels(path: Path, *, text: str, label: str) -> tuple[str, ...]:
    """The sorted labels of a PUBLIC file (a site's labels never leave it). Raises as `Table.open`."""
    table = Table.open(path, {"text": text, "label": label})
    return tuple(sorted({name for row in table if row is not None and isinstance(name := row["label"], str)}))
