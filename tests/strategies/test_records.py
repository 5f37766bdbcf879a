"""Records from files: what doesn't fit stays a unit and contributes zero; no error quotes a record."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.errors import UsageError
from strategies.records import MAX_TEXT, count_items, load_records, public_labels

LABELS = ("heart", "lung")
CANARY = "canary-7d1f"
GOOD = {"text": f"{CANARY} a cough", "label": "lung"}
Loader = Callable[..., Any]


def csv_file(folder: Path, body: str | bytes, header: str = "text,label\n") -> Path:
    path = folder / "records.csv"
    path.write_bytes(header.encode() + (body if isinstance(body, bytes) else body.encode()))
    return path


def jsonl_file(folder: Path, *rows: Any) -> Path:
    path = folder / "records.jsonl"
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows) + b"\n")
    return path


def test_good_records_of_both_kinds(tmp_path: Path) -> None:
    a = load_records(csv_file(tmp_path, 'a pulse,heart\n\n"a ""dry"", bad cough",lung\n'), LABELS)
    assert a.texts == ["a pulse", 'a "dry", bad cough']
    np.testing.assert_array_equal(a.labels, [0, 1])
    assert a.valid.all()
    b = load_records(jsonl_file(tmp_path, {"text": "a pulse", "label": "heart", "other": [1]}), LABELS)
    assert b.texts == ["a pulse"]
    assert b.valid.all()


def test_own_column_names_and_order(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "7,lung,a cough\n", header="id,organ,words\n")
    got = load_records(path, LABELS, text="words", label="organ")
    assert (got.texts, got.labels.tolist()) == (["a cough"], [1])


def test_byte_order_mark_is_no_part_of_a_column_name(tmp_path: Path) -> None:
    assert load_records(csv_file(tmp_path, "a,lung\n", header="\ufefftext,label\n"), LABELS).valid.all()


@pytest.mark.parametrize("bad", ["only one field\n", "one,lung,too many\n", ",lung\n", "a cough,unknown label\n",
                                 "a cough,\n", "a cough,LUNG\n", "x" * (MAX_TEXT + 1) + ",lung\n",
                                 "x" * 140_000 + ",lung\n"],
                         ids=["short row", "long row", "empty text", "unknown label", "no label", "other case",
                              "too long", "over the parser's limit"])
@pytest.mark.case(8)
def test_malformed_csv_row_stays_an_invalid_unit(tmp_path: Path, bad: str) -> None:
    got = load_records(csv_file(tmp_path, f"a pulse,heart\n{bad}a cough,lung\n"), LABELS)
    assert len(got) == 3
    assert got.valid.tolist() == [True, False, True]
    assert got.texts[1] == ""
    assert got.texts[2] == "a cough"


@pytest.mark.parametrize("bad", [b"{", b"[1, 2]", b"null", b"[" * 100_000, b"1" * 5_000, b"\xff\xfe", b'"text"',
                                 {"text": 5, "label": "lung"}, {"text": None, "label": "lung"}, {"text": "a"},
                                 {"text": ["a"], "label": "lung"}, {"text": "a", "label": 1}, {"text": "a", "label": []},
                                 {"text": "a", "label": True}, {"label": "lung"}, {},
                                 b'{"text": "lone \\ud800 surrogate", "label": "lung"}'])
@pytest.mark.case(8)
def test_malformed_json_row_stays_an_invalid_unit(tmp_path: Path, bad: Any) -> None:
    got = load_records(jsonl_file(tmp_path, GOOD, bad, GOOD), LABELS)
    assert got.valid.tolist() == [True, False, True]
    assert got.texts[1] == ""


@pytest.mark.parametrize("bad", ['"opened and never closed,lung', 'a "quote" inside,lung', '"closed" too early,lung', '"'])
@pytest.mark.case(8)
def test_stray_quote_spoils_no_other_record(tmp_path: Path, bad: str) -> None:
    got = load_records(csv_file(tmp_path, f"a pulse,heart\n{bad}\na cough,lung\n"), LABELS)
    assert len(got) == 3
    assert (got.texts[0], got.texts[2]) == ("a pulse", "a cough")


def test_bytes_that_are_no_utf8_are_replaced_not_raised(tmp_path: Path) -> None:
    got = load_records(csv_file(tmp_path, b"caf\xe9 \x00 cough,lung\n"), LABELS)
    assert got.valid.all()
    assert got.texts[0].encode()


def test_count_is_the_number_of_units_good_or_not(tmp_path: Path) -> None:
    assert count_items(csv_file(tmp_path, "a,lung\nb\n,\n"), text="text", label="label") == 3


@pytest.mark.parametrize(("name", "body", "code"), [
    ("absent.csv", None, "data.missing"), ("x.xlsx", "", "data.format"), ("x.pkl", "", "data.format"),
    ("x.csv", "", "data.column"), ("x.csv", "text,label\n", "data.empty"), ("x.jsonl", "\n\n", "data.empty")])
def test_file_that_is_none(tmp_path: Path, name: str, body: str | None, code: str) -> None:
    if body is not None:
        (tmp_path / name).write_text(body)
    with pytest.raises(UsageError) as caught:
        load_records(tmp_path / name, LABELS)
    assert caught.value.code == code


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_missing_column_suggests_the_nearest(tmp_path: Path, kind: str) -> None:
    path = csv_file(tmp_path, "a,lung\n", header="texts,label\n") if kind == "csv" else \
        jsonl_file(tmp_path, {"texts": "a", "label": "lung"})
    with pytest.raises(UsageError, match=r"'text'.*'texts'") as caught:
        load_records(path, LABELS)
    assert caught.value.code == "data.column"


def headerless(folder: Path) -> Path:
    return csv_file(folder, f"{CANARY} cough,{CANARY}\n", header="")


def wrong_keys(folder: Path) -> Path:
    return jsonl_file(folder, {CANARY: "a", f"{CANARY} 2": CANARY})


def all_bad(folder: Path) -> Path:
    return csv_file(folder, f"{CANARY}\n{CANARY},{CANARY}\n")


def unclosed(folder: Path) -> Path:
    return csv_file(folder, f'"{CANARY}, lung\n{CANARY},lung\n')


def too_long(folder: Path) -> Path:
    return csv_file(folder, CANARY * 20_000 + ",lung\n")


@pytest.mark.parametrize("make", [headerless, wrong_keys, all_bad, unclosed, too_long])
@pytest.mark.parametrize("load", [lambda p: load_records(p, LABELS), lambda p: count_items(p, text="text", label="label"),
                                  lambda p: public_labels(p, text="text", label="label")])
@pytest.mark.case(31)
def test_canary_no_record_in_any_error_or_log(tmp_path: Path, make: Loader, load: Loader,
                                              caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown = ""
    try:
        load(make(tmp_path))
    except UsageError as e:
        shown = f"{e} {e.as_dict()} {e.__cause__} {e.__context__}"
    assert CANARY not in shown
    assert CANARY not in caplog.text


def test_public_labels_are_sorted_and_unique(tmp_path: Path) -> None:
    assert public_labels(csv_file(tmp_path, "a,lung\nb,heart\nc,lung\n"), text="text", label="label") == LABELS


def test_invalid_record_leaves_every_other_unit_in_its_place(tmp_path: Path) -> None:
    """A poison record changes no count, no order and no other record."""
    good = load_records(jsonl_file(tmp_path, GOOD, GOOD, GOOD), LABELS)
    bad = load_records(jsonl_file(tmp_path, GOOD, b"{", GOOD), LABELS)
    assert len(good) == len(bad)
    assert [good.texts[i] for i in (0, 2)] == [bad.texts[i] for i in (0, 2)]
    np.testing.assert_array_equal(good.labels[[0, 2]], bad.labels[[0, 2]])
