"""One record a line: how CSV and JSONL lines are read, and how Parquet becomes lines.

A line that can't be read is a record all the same (`None`): it stays a unit and contributes zero. No error quotes one.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from privacy.errors import UsageError

MAX_LINE = 4 * 2**20  # bytes; a longer line is a record that can't be read
MAX_NAMES = 1000  # of columns, remembered for a hint where one is missing
PARQUET_ROWS = 1024  # rows of a Parquet file that are in memory at a time
Row = dict[str, object]  # field -> value as the file has it; None where the record lacks it


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Offset and content of each line that isn't blank, from where the file stands; None for one over MAX_LINE."""
    start = file.tell()
    while line := file.readline(MAX_LINE):
        size, whole = len(line), line.endswith(b"\n") or len(line) < MAX_LINE
        while not whole:
            more = file.readline(MAX_LINE)
            size, whole = size + len(more), more.endswith(b"\n") or len(more) < MAX_LINE
            line = b""
        if not line:
            yield start, None
        elif line.strip():
            yield start, line
        start += size


class CsvLines:
    """A header, then one record a line: a stray quote spoils its own line only. Texts with line breaks need JSONL."""

    def __init__(self, file: BinaryIO, fields: Mapping[str, str], person: str | None) -> None:
        first = file.readline(MAX_LINE).decode("utf-8-sig", errors="replace").rstrip("\r\n")
        try:
            header = next(csv.reader([first]), [])
        except csv.Error:
            header = []
        for column in [*fields.values(), *([person] if person else [])]:
            if column not in header:
                raise no_column(column, header)
        if person and header.count(person) > 1:
            raise no_person()
        self._width, self._at = len(header), {field: header.index(column) for field, column in fields.items()}
        self._person_at = header.index(person) if person else None

    def read(self, line: bytes) -> tuple[Row, object] | None:
        try:
            row = next(csv.reader([line.decode("utf-8", errors="replace").rstrip("\r\n")], strict=True), [])
        except csv.Error:
            return None
        if len(row) != self._width:
            return None
        return ({field: row[i] for field, i in self._at.items()},
                None if self._person_at is None else person_key(row[self._person_at]))

    def check(self) -> None:
        """The header has told already."""

    complete = True


class JsonLines:
    """One JSON object a line. A column has to be in one of them at least."""

    def __init__(self, file: BinaryIO, fields: Mapping[str, str], person: str | None) -> None:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark
            file.seek(0)
        self._fields, self._person = dict(fields), person
        self._missing, self._seen = {*fields.values()}, set[str]()

    def read(self, line: bytes) -> tuple[Row, object] | None:
        last: list[tuple[str, Any]] = []

        def outermost(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            nonlocal last
            last = pairs  # objects end from the inside out
            return dict(pairs)

        try:
            row = json.loads(line.decode("utf-8", errors="replace"), object_pairs_hook=outermost)
        except (ValueError, TypeError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        if self._missing:
            self._missing -= row.keys()
            self._seen.update(list(row)[:100] if len(self._seen) < MAX_NAMES else ())
        if self._person is not None and sum(key == self._person for key, _ in last) != 1:
            raise no_person()
        return ({field: row.get(column) for field, column in self._fields.items()},
                None if self._person is None else person_key(row[self._person]))

    def check(self) -> None:
        """Raises UsageError `data.column` for a column that no record has."""
        for column in self._fields.values():
            if self._seen and column in self._missing:
                raise no_column(column, sorted(self._seen))

    @property
    def complete(self) -> bool:
        """Whether every column was seen, so that the rest of the file need not be read for that."""
        return not self._missing


LINES: dict[str, type[CsvLines] | type[JsonLines]] = {".csv": CsvLines, ".jsonl": JsonLines}


def parquet_as_lines(path: Path, columns: Sequence[str]) -> BinaryIO:
    """The columns as JSON lines in a temporary file that has no name (TMPDIR) and is gone with its last handle.

    Raises UsageError `data.extra` without pyarrow, `data.column`, and `data.format` for what isn't Parquet.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise UsageError("data.extra", "Parquet is read with pyarrow, which isn't installed.",
                         "pip install 'consilo[parquet]', or give .csv or .jsonl.") from e
    out = tempfile.TemporaryFile(prefix="consilo-")  # noqa: SIM115 - the table closes it
    try:
        with parquet.ParquetFile(path) as source:
            names = source.schema_arrow.names
            for column in columns:
                if names.count(column) != 1:
                    raise no_column(column, [n for n in names if n != column])
            for batch in source.iter_batches(batch_size=PARQUET_ROWS, columns=list(dict.fromkeys(columns)),
                                             use_threads=False):
                for row in batch.to_pylist():
                    out.write(json.dumps(row, default=_unknown).encode() + b"\n")
    except (pyarrow.ArrowException, OSError, ValueError):
        out.close()
        raise UsageError("data.format", "The data file isn't one that can be read as Parquet.",
                         "Write it again, or give .csv or .jsonl.") from None
    except BaseException:
        out.close()
        raise
    out.seek(0)
    return out


def _unknown(_value: object) -> None:
    """Bytes, dates and other values that aren't text or numbers count as missing."""


def person_key(key: object) -> str:
    """A person's key: text that isn't blank, or a whole number."""
    if isinstance(key, bool) or not isinstance(key, str | int) or not str(key).strip():
        raise no_person()
    return str(key).strip()


def no_person() -> UsageError:
    return UsageError("data.person", "A record names no person, or more than one.",
                      "Give every record exactly one person's key, or use the record as the privacy unit.")


def no_column(column: str, header: Sequence[str]) -> UsageError:
    """Only a close name is quoted: a file without a header has a record in its place."""
    close = get_close_matches(column, header, n=1)
    return UsageError("data.column", f"The data has no column {column!r}, or has it twice.",
                      f"Did you mean {close[0]!r}?" if close else "Name the columns in the file, and set the fields.")
