"""Labelled records from a file: CSV or JSONL with a text and a label column. Judged record by record; nothing here leaves.

A record that doesn't fit (not text, too long, a label outside the contract) stays a unit but contributes zero: its
place, and so every count that leaves, is the same as if it had been good.
"""

from __future__ import annotations

import csv
import hashlib
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
    """texts: one per record, "" where invalid. labels: int64 (n,), 0 where invalid. valid: bool (n,).

    owners: person of each record, int64 (n,), where a person column was asked for; a record that can't be read is a
    person of its own. people: the persons' keys. contents: SHA-256 of each record as it stands in the file, whatever the
    labels of a contract: what a lineage knows it by.
    """

    texts: list[str]
    labels: NDArray[np.int64]
    valid: NDArray[np.bool_]
    contents: list[bytes]
    owners: NDArray[np.int64] | None = None
    people: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)


def load_records(path: Path, labels: Sequence[str], *, text: str = "text", label: str = "label",
                 person: str | None = None) -> Records:
    """Read a file. Raises UsageError `data.missing`, `data.format`, `data.column`, `data.empty`, and `data.person` for a
    record without exactly one person; never quotes a record."""
    if not path.is_file() or path.stat().st_size > MAX_FILE:
        raise UsageError("data.missing", "The data file can't be read, or is too large.", "Check site.data.path.")
    if path.suffix not in READERS:
        raise UsageError("data.format", f"Data of type {path.suffix!r} is not read.", "Use .csv or .jsonl.")
    known = {name: i for i, name in enumerate(labels)}
    texts, numbers, valid, contents, people = [], [], [], [], _People()
    for value, name, key in READERS[path.suffix](path, (text, label, *([person] if person else []))):
        ok = _is_text(value) and isinstance(name, str) and name in known
        texts.append(str(value) if ok else "")
        numbers.append(known[str(name)] if ok else 0)
        valid.append(ok)
        contents.append(hashlib.sha256(f"{name}\n{value}".encode("utf-8", "surrogatepass")).digest())
        people.add(key)
    if not texts:
        raise UsageError("data.empty", "The data file holds no records.", "Check site.data.path.")
    return Records(texts, np.array(numbers, np.int64), np.array(valid, bool), contents,
                   people.owners if person else None, people.keys)


class _People:
    """Numbers persons in order of appearance."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._of: list[int] = []
        self._count = 0

    def add(self, key: object) -> None:
        """key: UNREADABLE (a broken record is a person of its own), or the person's key."""
        number = None if key is UNREADABLE else self._known.get(str(key))
        if number is None:
            number, self._count = self._count, self._count + 1
            if key is not UNREADABLE:
                self._known[str(key)] = number
        self._of.append(number)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._known)

    @property
    def owners(self) -> NDArray[np.int64]:
        return np.array(self._of, np.int64)


def _is_text(value: object) -> bool:
    """Whether a tokenizer can take it: a lone surrogate is no text."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and not any(0xD800 <= ord(c) < 0xE000 for c in value)


def count_items(path: Path, *, text: str, label: str, person: str | None = None) -> int:
    """Number of records of a file, or of persons where a column names them. Raises UsageError as `load_records`."""
    records = load_records(path, (), text=text, label=label, person=person)
    return len(records) if records.owners is None else int(records.owners.max()) + 1


def public_labels(path: Path, *, text: str, label: str) -> tuple[str, ...]:
    """The sorted labels of a PUBLIC file (a site's labels never leave it). Raises UsageError as `load_records`."""
    if path.suffix not in READERS or not path.is_file():
        raise UsageError("data.missing", "The public split can't be read.", "Give a .csv or .jsonl file.")
    return tuple(sorted({name for _, name, _ in READERS[path.suffix](path, (text, label)) if isinstance(name, str)}))


Row = tuple[object, object, object]  # text, label, person (or UNREADABLE, also where no person was asked for)
UNREADABLE = object()
_BROKEN: Row = (None, None, UNREADABLE)


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """One record a line: a stray quote spoils its own line only. Texts with line breaks need JSONL."""
    with path.open(encoding="utf-8-sig", errors="replace") as f:
        header = next(csv.reader([f.readline().rstrip("\n")]), [])
        for column in columns:
            if column not in header:
                raise _no_column(column, header)
        if len(columns) == 3 and header.count(columns[2]) > 1:
            raise _no_person()
        at = [header.index(c) for c in columns]
        for line in f:
            if line.strip():
                yield _csv_line(line.rstrip("\n"), at, len(header))


def _csv_line(line: str, at: Sequence[int], width: int) -> Row:
    try:
        row = next(csv.reader([line], strict=True), [])
    except csv.Error:
        return _BROKEN
    if len(row) != width:
        return _BROKEN
    return row[at[0]], row[at[1]], _person(row[at[2]]) if len(at) == 3 else UNREADABLE


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8", errors="replace") as f:
        seen: set[str] = set()
        for line in f:
            if not line.strip():
                continue
            try:
                pairs = json.loads(line, object_pairs_hook=list)
                row = dict(pairs) if isinstance(pairs, list) else None
            except (ValueError, TypeError, RecursionError):
                row = None
            if row is None or line.lstrip()[0] != "{":
                yield _BROKEN
                continue
            seen |= row.keys()
            if len(columns) == 3 and sum(key == columns[2] for key, _ in pairs) != 1:
                raise _no_person()
            yield row.get(columns[0]), row.get(columns[1]), _person(row[columns[2]]) if len(columns) == 3 else UNREADABLE
        for column in columns:
            if seen and column not in seen:
                raise _no_column(column, sorted(seen))


def _person(key: object) -> object:
    """A person's key: text that isn't blank, or a whole number."""
    if isinstance(key, bool) or not isinstance(key, str | int) or not str(key).strip():
        raise _no_person()
    return str(key).strip()


def _no_person() -> UsageError:
    return UsageError("data.person", "A record names no person, or more than one.",
                      "Give every record exactly one person's key, or use the record as the privacy unit.")


def _no_column(column: str, header: Sequence[str]) -> UsageError:
    """Only a close name is quoted: a file without a header has a record in its place."""
    close = get_close_matches(column, header, n=1)
    return UsageError("data.column", f"The data has no column {column!r}.",
                      f"Did you mean {close[0]!r}?" if close else "Name the columns in the file, and set text and label.")


READERS = {".csv": _csv, ".jsonl": _jsonl}
