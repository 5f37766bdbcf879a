"""What a frozen part of the model makes of each record, kept as far as memory may go and made again beyond it.

Records are sampled alike, so which of them are kept doesn't matter: it is the first ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Encode = Callable[[NDArray[np.int64]], tuple["Tensor", ...]]


class RowCache:
    """encode: numbers of records, int64 (k,) -> tensors of k rows each, the same for a record whatever it is called with.

    records: numbered 0 .. records - 1. limit: bytes that are kept; one record is encoded here to learn what it takes.
    """

    def __init__(self, encode: Encode, records: int, *, limit: int) -> None:
        import torch

        self._encode = encode
        first = encode(np.zeros(1, np.int64))
        self.row_bytes = sum(part.element_size() * part[0].numel() for part in first)
        self.kept = min(records, limit // max(1, self.row_bytes))
        self._parts = tuple(torch.empty((self.kept, *part.shape[1:]), dtype=part.dtype) for part in first)
        self._known, self.whole = np.zeros(self.kept, bool), self.kept == records

    def fill(self, block: int) -> None:
        """Encode what will be kept, `block` records at a time."""
        for start in range(0, self.kept, block):
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
