"""What a frozen part of the model makes of each record, kept as far as memory may go and made again beyond it.

Records are sampled alike, so which of them are kept doesn't matter: it is the first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Encode = Callable[[NDArray[np.int64]], tuple["Tensor", ...]]


class RowCache:
    """encode: numbers of records, int64 (k,) -> tensors of k rows each, the same for a record whatever it is called with.

    records: numbered 0 .. records - 1. like: what a synthetic record becomes. limit: bytes that are kept.
    """

    def __init__(self, encode: Encode, records: int, *, like: tuple[Tensor, ...], limit: int) -> None:
        import torch

        self._encode = encode
        self.row_bytes = sum(part.element_size() * part[0].numel() for part in like)
        self.kept = min(records, limit // max(1, self.row_bytes))
        self._parts = tuple(torch.empty((self.kept, *part.shape[1:]), dtype=part.dtype) for part in like)
        self._known, self.whole = np.zeros(self.kept, bool), self.kept == records

    def fill(self, block: int) -> None:
        """Encode what will be kept, `block` records at a time; a block that raises is left for `take`."""
        for start in range(0, self.kept, block):
            with suppress(Exception):
                self.take(np.arange(start, min(start + block, self.kept)))

    def take(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Of these records, in this order; they may come again. Raises what `encode` raises, and keeps nothing then."""
        import torch

        inside = rows < self.kept
        new = np.unique(rows[~inside | ~self._known[np.where(inside, rows, 0)]]) if self.kept else np.unique(rows)
        made = self._encode(new) if len(new) else ()
        keep = int(np.searchsorted(new, self.kept))
        for part, fresh in zip(self._parts, made, strict=False):
            part[new[:keep]] = fresh[:keep]
        self._known[new[:keep]] = True
        if inside.all():
            return tuple(part[rows] for part in self._parts)
        out = tuple(torch.empty((len(rows), *part.shape[1:]), dtype=part.dtype) for part in self._parts)
        places = np.searchsorted(new, rows[~inside])
        for whole, part, fresh in zip(out, self._parts, made, strict=True):
            whole[inside] = part[rows[inside]]
            whole[~inside] = fresh[places]
        return out


def flat(prepared: Any) -> tuple[Tensor, ...]:
    """The tensors of a dataclass of tensors, None, and such dataclasses, in the order of its fields."""
    if prepared is None:
        return ()
    if not is_dataclass(prepared):
        return (prepared,)
    return tuple(part for field in fields(prepared) for part in flat(getattr(prepared, field.name)))


def rebuilt(like: Any, parts: Iterable[Tensor]) -> Any:
    """What `flat` took apart, of the same form as `like`."""
    left = iter(parts)

    def build(value: Any) -> Any:
        if value is None:
            return None
        if not is_dataclass(value):
            return next(left)
        return replace(value, **{f.name: build(getattr(value, f.name)) for f in fields(value)})  # type: ignore[type-var]

    return build(like)
