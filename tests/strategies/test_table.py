"""Tables: any record by its number, in memory that doesn't follow the file; one that can't be read keeps its place."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import ConsiloError, UsageError
from strategies import formats, table
from strategies.table import STRIDE, Table

ASK = {"prompt": "question", "answer": "reply"}
CANARY = "canary-90c2"
BROKEN = b'{"question": "never closed'


def jsonl(folder: Path, lines: list[Any], end: bytes = b"\n") -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(end.join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def rows(n: int) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "reply": f"r{i} \u00e9\u4e2d" * (i % 5), "who": f"p{i % 7}", "more": [i]}
            for i in range(n)]


def error(path: Path, fields: dict[str, str] = ASK, person: str | None = None) -> UsageError:
    with pytest.raises(UsageError) as caught:
        Table.open(path, fields, person=person)
    return caught.value


def jumps_agree(path: Path, fields: dict[str, str], want: list[Any]) -> bool:
    """Whether every record by number, in any order, is the one that stands there."""
    got = Table.open(path, fields)
    order = np.random.default_rng(3).permutation(len(got))
    return list(got) == want and {int(i): got[int(i)] for i in order} == dict(enumerate(want))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n  \n"], ids=["unix", "windows", "blank lines"])
@pytest.mark.parametrize("n", [1, STRIDE - 1, STRIDE, STRIDE + 1, 5 * STRIDE + 3])
def test_any_record_by_its_number(tmp_path: Path, n: int, end: bytes) -> None:
    lines: list[Any] = rows(n)
    want = [{"prompt": r["question"], "answer": r["reply"]} for r in lines]
    if n > 5:
        lines[n // 2], want[n // 2] = BROKEN, None  # type: ignore[call-overload]
    assert jumps_agree(jsonl(tmp_path, lines, end), ASK, want)


def test_planted_index_that_forgets_blank_lines_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, want = jsonl(tmp_path, rows(40), b"\n\n"), [{"prompt": r["question"], "answer": r["reply"]} for r in rows(40)]
    assert jumps_agree(path, ASK, want)
    honest = formats.lines
    monkeypatch.setattr(table, "lines", lambda file: ((start + (start > 900), line) for start, line in honest(file)))
    assert not jumps_agree(path, ASK, want)


def test_csv_by_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffreply,id,question\n' + "".join(f'"r, {i}",{i},q{i}\n' for i in range(40)) + "short\n", "utf-8")
    assert jumps_agree(path, ASK, [*({"prompt": f"q{i}", "answer": f"r, {i}"} for i in range(40)), None])


def test_nested_values_come_as_they_are(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": {"text": "b"}}]
    got = Table.open(jsonl(tmp_path, [{"turns": turns, "who": "p"}]), {"turns": "turns"}, person="who")
    assert got[0] == {"turns": turns}
    assert got.contents[0] == sha256(str(turns).encode()).digest()


def test_a_person_is_named_once_in_the_record_itself(tmp_path: Path) -> None:
    """A key of the same name within a value is no second person."""
    inside = jsonl(tmp_path, [{"turns": {"who": "q"}, "who": "p"}])
    assert Table.open(inside, {"turns": "turns"}, person="who").owners.tolist() == [0]  # type: ignore[union-attr]
    assert error(jsonl(tmp_path, [b'{"turns": 1, "who": "p", "who": "p"}']), {"turns": "turns"}, "who").code == "data.person"


def test_persons_by_order_of_appearance_and_a_broken_record_is_its_own(tmp_path: Path) -> None:
    lines = [{"q": 1, "who": "z"}, b"{", {"q": 1, "who": 7}, {"q": 1, "who": " z "}, b"{", {"q": 1, "who": "7"}]
    got = Table.open(jsonl(tmp_path, lines), {"q": "q"}, person="who")
    assert got.owners is not None
    assert got.owners.tolist() == [0, 1, 2, 0, 3, 2]
    assert list(got.people) == ["z", "7", "z", "7"]


def test_a_content_does_not_depend_on_columns_names_or_place(tmp_path: Path) -> None:
    """Nor on the labels of a contract: it is what registered lineages know a record by."""
    one = Table.open(jsonl(tmp_path, [{"t": "a pulse", "l": "heart"}, {"t": "b", "l": None}]), {"text": "t", "label": "l"})
    (tmp_path / "b.csv").write_text("label,words\nlung,c\nheart,a pulse\n")
    two = Table.open(tmp_path / "b.csv", {"label": "label", "text": "words"})
    assert one.contents[0] == two.contents[1] == sha256(b"heart\na pulse").digest()
    assert list(one.contents) == [one.contents[0], one.contents[1]]
    assert len({*one.contents, *two.contents}) == 3


def test_a_line_without_end_is_one_record_and_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_LINE", 1000)
    good = {"question": "q", "reply": "r"}
    for long in (b"x" * 1000, b"x" * 1001, b"x" * 1999, b"x" * 2000, b"x" * 50_000):
        assert jumps_agree(jsonl(tmp_path, [good, long, good]), ASK, [{"prompt": "q", "answer": "r"}, None,
                                                                      {"prompt": "q", "answer": "r"}])
    exact = json.dumps(good | {"more": "x" * 900}).encode()
    assert jumps_agree(jsonl(tmp_path, [exact.ljust(999), good]), ASK, [{"prompt": "q", "answer": "r"}] * 2)


def test_a_column_that_some_record_lacks_is_no_error_but_one_that_all_lack_is(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"question": "q"}, b"{", {"question": "q", "reply": "late"}])
    assert [row and row["answer"] for row in Table.open(path, ASK)] == [None, None, "late"]
    wrong = error(jsonl(tmp_path, [{"question": CANARY, "replies": CANARY}] * 30))
    assert wrong.code == "data.column"
    assert "'replies'" in str(wrong)
    assert CANARY not in str(wrong)


@pytest.mark.parametrize("how", ["appended", "replaced in place"])
def test_a_file_that_changes_under_the_table_is_refused(tmp_path: Path, how: str) -> None:
    path = jsonl(tmp_path, rows(30))
    got = Table.open(path, ASK)
    got.require_unchanged()
    with path.open("r+b") as f:
        f.seek(0, 2 if how == "appended" else 0)
        f.write(b'{"question": "new"')
    os.utime(path, ns=(1, 1))
    with pytest.raises(ConsiloError) as caught:
        got.require_unchanged()
    assert caught.value.code == "data.changed"


@given(body=st.binary(max_size=400), kind=st.sampled_from([".csv", ".jsonl"]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_bytes_are_records_or_a_coded_error(tmp_path_factory: pytest.TempPathFactory, body: bytes, kind: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{kind}"
    path.write_bytes((b"a,b\n" if kind == ".csv" else b'{"a": 1, "b": 2}\n') + body)
    try:
        got = Table.open(path, {"one": "a", "two": "b"})
    except UsageError as e:
        assert e.code == "data.empty"
        return
    assert [got[i] for i in range(len(got))] == list(got)
    assert len(list(got.contents)) == len(got)


def test_memory_does_not_follow_the_file(tmp_path: Path) -> None:
    """8 MB of records: the index and one block of lines are all that is held, with persons and without."""
    path, line = tmp_path / "big.jsonl", json.dumps({"question": "x" * 400, "reply": "y" * 400, "who": "p"}) + "\n"
    path.write_text(line * 9600)
    tracemalloc.start()
    try:
        got = Table.open(path, ASK, person="who")
        for content in got.contents:
            assert len(content) == 32
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(got) == 9600
    assert held < 9600 * 8
    assert peak < 2**21


# Parquet


def parquet(folder: Path, columns: dict[str, Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra consilo[parquet]")
    from pyarrow import parquet as pq

    pq.write_table(pyarrow.table(columns), folder / "rows.parquet", row_group_size=100)
    return folder / "rows.parquet"


def test_parquet_by_number(tmp_path: Path) -> None:
    n = 2500
    path = parquet(tmp_path, {"id": list(range(n)), "question": [f"q{i}" for i in range(n)],
                              "reply": [None if i % 9 == 0 else f"r\n{i}" for i in range(n)],
                              "who": [i // 2 for i in range(n)]})
    want = [{"prompt": f"q{i}", "answer": None if i % 9 == 0 else f"r\n{i}"} for i in range(n)]
    assert jumps_agree(path, ASK, want)
    owners = Table.open(path, ASK, person="who").owners
    assert owners is not None
    np.testing.assert_array_equal(owners, np.arange(n) // 2)


def test_a_parquet_record_is_the_same_record_as_in_json(tmp_path: Path) -> None:
    a = Table.open(parquet(tmp_path, {"question": ["q"], "reply": [None]}), ASK)
    b = Table.open(jsonl(tmp_path, [{"question": "q", "reply": None}]), ASK)
    assert list(a.contents) == list(b.contents)


def test_values_that_are_no_text_or_number_are_missing(tmp_path: Path) -> None:
    assert list(Table.open(parquet(tmp_path, {"question": [b"\xff"], "reply": [["a"]]}), ASK)) == [
        {"prompt": None, "answer": ["a"]}]


def test_bad_parquet_is_refused_without_quoting_it(tmp_path: Path) -> None:
    parquet(tmp_path, {"question": [CANARY], "replies": [CANARY]})
    wrong = error(tmp_path / "rows.parquet")
    assert (wrong.code, "'replies'" in str(wrong), CANARY in str(wrong)) == ("data.column", True, False)
    (tmp_path / "bad.parquet").write_bytes(CANARY.encode() * 9)
    wrong = error(tmp_path / "bad.parquet")
    assert wrong.code == "data.format"
    assert CANARY not in f"{wrong} {wrong.__cause__}"
    assert error(parquet(tmp_path, {"question": ["q"], "reply": ["r"], "who": [None]}), person="who").code == "data.person"


def test_parquet_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path, {"question": ["q"], "reply": ["r"]})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert len(Table.open(path, ASK)) == 1
    assert not list(scratch.iterdir())


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    wrong = error(tmp_path / "rows.parquet")
    assert wrong.code == "data.extra"
    assert "consilo[parquet]" in str(wrong)
