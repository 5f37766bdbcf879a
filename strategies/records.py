"""Labelled records from a file: CSV or JSONL with a text and a label column. Judged record by record; nothing here leaves.

A record that doesn't fit (not text, too long, a label outside the contract) stays a unit but contributes zero: its
place, and so every count that leaves, is the same as if it had been good.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privacy.errors import UsageError

MAX_TEXT = 100_000  # characters; longer ones are cut to the contract's length anyway
MAX_FILE = 4 * 2**30


@dataclass(frozen=True)
class Records:
    """texts: one per unit, "" where invalid. labels: int64 (n,), 0 where invalid. valid: bool (n,)."""

    texts: list[str]
    labels: NDArray[np.int64]
    valid: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.texts)


def load_records(path: Path, labels: Sequence[str], *, text: str = "text", label: str = "label") -> Records:
    """Read a file. Raises UsageError `data.missing`, `data.format`, `data.column`, `data.empty`; never quotes a record."""
    if not path.is_file() or path.stat().st_size > MAX_FILE:
        raise UsageError("data.missing", "The data file can't be read, or is too large.", "Check site.data.path.")
    if path.suffix not in READERS:
        raise UsageError("data.format", f"Data of type {path.suffix!r} is not read.", "Use .csv or .jsonl.")
    known = {name: i for i, name in enumerate(labels)}
    texts, numbers, valid = [], [], []
    for value, name in READERS[path.suffix](path, (text, label)):
        ok = _is_text(value) and isinstance(name, str) and name in known
        texts.append(str(value) if ok else "")
        numbers.append(known[str(name)] if ok else 0)
        valid.append(ok)
    if not texts:
        raise UsageError("data.empty", "The data file holds no records.", "Check site.data.path.")
    return Records(texts, np.array(numbers, np.int64), np.array(valid, bool))


def _is_text(value: object) -> bool:
    """Whether a tokenizer can take it: a lone surrogate is no text."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and not any(0xD800 <= ord(c) < 0xE000 for c in value)


def count_records(path: Path, *, text: str, label: str) -> int:
    """Number of units of a file. Raises UsageError as `load_records`."""
    return len(load_records(path, (), text=text, label=label))


def public_labels(path: Path, *, text: str, label: str) -> tuple[str, ...]:
    """The sorted labels of a PUBLIC file (a site's labels never leave it). Raises UsageError as `load_records`."""
    if path.suffix not in READERS or not path.is_file():
        raise UsageError("data.missing", "The public split can't be read.", "Give a .csv or .jsonl file.")
    return tuple(sorted({name for _, name in READERS[path.suffix](path, (text, label)) if isinstance(name, str)}))


def _csv(path: Path, columns: tuple[str, str]) -> Iterator[tuple[object, object]]:
    """One record a line: a stray quote spoils its own line only. Texts with line breaks need JSONL."""
    with path.open(encoding="utf-8-sig", errors="replace") as f:
        header = next(csv.reader([f.readline().rstrip("\n")]), [])
        for column in columns:
            if column not in header:
                raise _no_column(column, header)
        at = [header.index(c) for c in columns]
        for line in f:
            if line.strip():
                yield _csv_line(line.rstrip("\n"), at, len(header))


def _csv_line(line: str, at: list[int], width: int) -> tuple[object, object]:
    try:
        row = next(csv.reader([line], strict=True), [])
    except csv.Error:
        return None, None
    return (row[at[0]], row[at[1]]) if len(row) == width else (None, None)


def _jsonl(path: Path, columns: tuple[str, str]) -> Iterator[tuple[object, object]]:
    with path.open(encoding="utf-8", errors="replace") as f:
        seen: set[str] = set()
        for line in f:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                seen |= row.keys()
                yield row.get(columns[0]), row.get(columns[1])
            else:
                yield None, None
        for column in columns:
            if seen and column not in seen:
                raise _no_column(column, sorted(seen))


def _no_column(column: str, header: Sequence[str]) -> UsageError:
    """Only a close name is quoted: a file without a header has a record in its place."""
    close = get_close_matches(column, header, n=1)
    return UsageError("data.column", f"The data has no column {column!r}.",
                      f"Did you mean {close[0]!r}?" if close else "Name the columns in the file, and set text and label.")


READERS = {".csv": _csv, ".jsonl": _jsonl}
