"""What is kept of records: within its bytes, right for any rows in any order, and nothing of an encoding that failed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from strategies.cache import RowCache, flat, rebuilt

RECORDS, ROW = 20, 4 * 3 + 8


class Source:
    """Encodes record i as ([i, i + 0.25, i + 0.5], 7 i), and writes down what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.bad: int | None = None

    def __call__(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        self.asked.append(rows.tolist())
        if self.bad in rows:
            raise ValueError("text of the record")
        return torch.from_numpy(rows[:, None] + np.array([0, 0.25, 0.5])).float(), torch.from_numpy(rows * 7)


LIKE = Source()(np.zeros(1, np.int64))


def right(cache: RowCache, rows: NDArray[np.int64]) -> bool:
    got = cache.take(rows)
    want = Source()(rows)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@given(asks=st.lists(st.lists(st.integers(0, RECORDS - 1), min_size=1, max_size=12), max_size=6),
       limit=st.sampled_from([0, ROW - 1, ROW, 7 * ROW, RECORDS * ROW, 10**6]))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_every_row_is_its_own_whatever_is_kept(asks: list[list[int]], limit: int) -> None:
    source = Source()
    cache = RowCache(source, RECORDS, like=LIKE, limit=limit)
    assert cache.row_bytes == ROW
    assert cache.kept * ROW <= limit
    for rows in asks:
        assert right(cache, np.array(rows))
    seen = [row for ask in source.asked for row in ask]
    assert all(seen.count(row) == 1 for row in seen if row < cache.kept), "what is kept is made once"


def test_what_fits_is_encoded_once_in_blocks() -> None:
    source = Source()
    cache = RowCache(source, RECORDS, like=LIKE, limit=10**6)
    cache.fill(8)
    assert cache.whole
    assert [len(ask) for ask in source.asked] == [8, 8, 4]
    assert right(cache, np.arange(RECORDS)[::-1].copy())
    assert len(source.asked) == 3


def test_nothing_is_kept_of_an_encoding_that_raised() -> None:
    source = Source()
    cache = RowCache(source, RECORDS, like=LIKE, limit=10**6)
    source.bad = 5
    with pytest.raises(ValueError):
        cache.take(np.array([4, 5]))
    source.bad = None
    assert right(cache, np.array([4, 5]))


def test_planted_row_of_another_record_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RowCache(Source(), RECORDS, like=LIKE, limit=7 * ROW)
    assert right(cache, np.array([9, 3, 15]))
    honest = np.searchsorted
    monkeypatch.setattr(np, "searchsorted", lambda a, v: honest(a, v) if np.ndim(v) == 0 else honest(a, v)[::-1].copy())
    assert not right(cache, np.array([9, 3, 15]))


@dataclass(frozen=True)
class Inner:
    ids: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    valid: torch.Tensor


@pytest.mark.parametrize("hidden", [None, torch.arange(6).reshape(3, 2)])
def test_what_is_taken_apart_is_put_together_again(hidden: torch.Tensor | None) -> None:
    whole = Outer(Inner(torch.arange(3), hidden), torch.ones(3))
    parts = flat(whole)
    assert len(parts) == 2 + (hidden is not None)
    again = rebuilt(whole, (part[1:] for part in parts))
    assert torch.equal(again.inner.ids, torch.tensor([1, 2]))
    assert (again.inner.hidden is None) == (hidden is None)
    assert hidden is None or torch.equal(again.inner.hidden, hidden[1:])
    assert torch.equal(again.valid, torch.ones(2))
