"""A data file of any size, by number of the record: CSV, JSONL or Parquet, with the columns that a task needs.

    table = Table.open(path, {"prompt": "question", "answer": "reply"}, person="patient")
    table[7]            {"prompt": ..., "answer": ...} as the file has them; None for a record that can't be read
    for row in table    all of them, in the file's order
    table.owners        person of each record, int32 (n,); None where no column was asked for
    table.contents[7]   SHA-256 of the record's fields: what a lineage knows it by

Records stay in the file. What grows with their number n, in memory: n / 2 bytes for the index, which holds the place of
every 16th line, and 4 n for owners where persons were asked for (about 30 n more while the file is opened). A Parquet file
is first written out as lines into a temporary file without a name. A record that can't be read keeps its place, so that
every count is the same as if it had been good; values are not judged here (`is_text` tells what a tokenizer can take).
"""

from __future__ import annotations

import hashlib
import os
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from privacy.errors import Refused, UsageError
from strategies.formats import LINES, CsvLines, JsonLines, Row, lines, parquet_as_lines

MAX_TEXT = 100_000  # characters; longer ones are cut to the contract's length anyway
STRIDE = 16  # lines between two places in the index
PARQUET = ".parquet"
SUFFIXES = (*LINES, PARQUET)
Owners = NDArray[np.int32]


def is_text(value: object) -> bool:
    """Whether a tokenizer can take it: 1 to MAX_TEXT characters, no lone surrogate."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and not any(0xD800 <= ord(c) < 0xE000 for c in value)


class Table:
    """See above. The file has to stay as it is while the table is in use: `require_unchanged`."""

    def __init__(self, file: BinaryIO, reader: CsvLines | JsonLines, fields: Mapping[str, str], *, persons: bool) -> None:
        self._file, self._reader = file, reader
        weakref.finalize(self, file.close)
        self._stamp = _stamp(file)
        marks, people, count = array("q"), _People() if persons else None, 0
        for start, line in lines(file):
            if count % STRIDE == 0:
                marks.append(start)
            if people is not None:
                found = None if line is None else reader.read(line)
                people.add(count, None if found is None else str(found[1]))
            elif line is not None and not reader.complete:
                reader.read(line)
            count += 1
        reader.check()
        if not count:
            raise UsageError("data.empty", "The data file holds no records.", "Check the path of the data.")
        self._marks, self._count = marks, count
        self.owners: Owners | None = None if people is None else people.owners()
        self._fields = tuple(fields)

    @classmethod
    def open(cls, path: Path, fields: Mapping[str, str], *, person: str | None = None) -> Table:
        """fields: name in the task -> column in the file. person: column of the key of each record's person.

        Raises UsageError `data.missing`, `data.format`, `data.extra`, `data.column`, `data.empty`, and `data.person` for a
        record without exactly one person.
        """
        if path.suffix not in SUFFIXES:
            raise UsageError("data.format", f"Data of type {path.suffix!r} is not read.",
                             f"Use {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
        try:
            if not path.is_file():
                raise FileNotFoundError
            columns = [*fields.values(), *([person] if person else [])]
            file = parquet_as_lines(path, columns) if path.suffix == PARQUET else path.open("rb")
        except OSError as e:
            raise UsageError("data.missing", "The data file can't be read.", "Check the path of the data.") from e
        try:
            return cls(file, LINES.get(path.suffix, JsonLines)(file, fields, person), fields,
                       persons=person is not None)
        except BaseException:
            file.close()
            raise

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, record: int) -> Row | None:
        found = self._read(record)
        return None if found is None else found[0]

    def __iter__(self) -> Iterator[Row | None]:
        return (None if found is None else found[0] for found in self._all())

    @property
    def contents(self) -> Contents:
        return Contents(self, self._fields)

    @property
    def people(self) -> Iterator[str]:
        """Key of the person of each record that can be read; a person with several comes again."""
        return (str(found[1]) for found in self._all() if found is not None)

    def require_unchanged(self) -> None:
        """Raises Refused `data.changed` where the file was written to after it was opened."""
        if _stamp(self._file) != self._stamp:
            raise Refused("data.changed", "The data file was changed while it was in use.",
                          "Start again on a file that nothing writes to; register it if it holds other records.")

    def _read(self, record: int) -> tuple[Row, object] | None:
        if not 0 <= record < self._count:
            raise IndexError(record)
        mark, skip = divmod(record, STRIDE)
        self._file.seek(self._marks[mark])
        for number, (_, line) in enumerate(lines(self._file)):
            if number == skip:
                return None if line is None else self._reader.read(line)
        self.require_unchanged()
        raise IndexError(record)

    def _all(self) -> Iterator[tuple[Row, object] | None]:
        """In the file's order; other reads may come in between."""
        for mark in self._marks:
            self._file.seek(mark)
            for _, line in list(islice(lines(self._file), STRIDE)):
                yield None if line is None else self._reader.read(line)


class Contents:
    """SHA-256 of each record, 32 bytes, read when asked for: of its fields' values in the order of the fields' names."""

    def __init__(self, table: Table, fields: Sequence[str]) -> None:
        self._table, self._fields = table, sorted(fields)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, record: int) -> bytes:
        return self._digest(self._table[record])

    def __iter__(self) -> Iterator[bytes]:
        return map(self._digest, self._table)

    def _digest(self, row: Row | None) -> bytes:
        values = "\n".join(str(None if row is None else row[field]) for field in self._fields)
        return hashlib.sha256(values.encode("utf-8", "surrogatepass")).digest()


class _People:
    """Numbers persons in order of appearance. A record without a key is a person of its own. Two keys with one 64-bit hash
    (a chance of 3e-8 among a million persons) are one person, whose records are then bounded together."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, record: int, key: str | None) -> None:
        digest = (hashlib.blake2b(str(record).encode(), digest_size=8, person=b"unreadable") if key is None
                  else hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8)).digest()
        self._hashes.append(int.from_bytes(digest, "little"))

    def owners(self) -> Owners:
        hashes = np.frombuffer(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        new = np.ones(len(order), bool)
        new[1:] = np.diff(hashes[order]) != 0
        first = order[new]  # of each person: stable, so its earliest record
        rank = np.empty(len(first), np.int32)
        rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
        owners = np.empty(len(order), np.int32)
        owners[order] = rank[np.cumsum(new, dtype=np.int32) - 1]
        return owners


def _stamp(file: BinaryIO) -> tuple[int, int]:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns
