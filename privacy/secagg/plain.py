"""The same interface without masks, for plain mode: single updates are visible, and the report's title says so."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from privacy.errors import Aborted
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M5, dump, load


class PlainSite:
    """`SiteSession` that hides nothing and signs nothing; the round's statement binds the vector."""

    transcript = b""

    def __init__(self, offer: tr.Offer, index: int) -> None:
        self.offer, self.index = offer, index

    def m1(self) -> bytes:
        return b"{}"

    def m3(self, m2: bytes) -> bytes:
        return b"{}"

    def m5(self, m4: bytes, encoded: NDArray[np.uint32]) -> tuple[bytes, NDArray[np.uint32]]:
        self.masked = hashlib.sha256(encoded.tobytes()).hexdigest()
        return dump(M5(index=self.index, y_hash=self.masked, signature=b"")), encoded

    def m9(self, m6: bytes) -> bytes:
        return b"{}"


class PlainCoordinator:
    """`CoordinatorSession` that adds what it sees."""

    transcript = b""

    def __init__(self, offer: tr.Offer) -> None:
        self.offer, self._seen = offer, dict[int, str]()
        self.total = np.zeros(offer.dim, np.uint32)

    def take_m1(self, index: int, data: bytes) -> None:
        pass

    def m2(self) -> bytes:
        return b"{}"

    def take_m3(self, index: int, data: bytes) -> None:
        pass

    def m4(self) -> dict[int, bytes]:
        return {m.index: b"{}" for m in self.offer.cohort}

    def take_m5(self, index: int, data: bytes, y: NDArray[np.uint32]) -> None:
        m5 = load(M5, data)
        if (m5.index != index or index in self._seen or y.dtype != np.uint32 or y.shape != (self.offer.dim,)
                or hashlib.sha256(np.ascontiguousarray(y).data).hexdigest() != m5.y_hash):
            raise Aborted("secagg.dimension", "A vector has the wrong shape or sender.", "The round is void.")
        self._seen[index] = m5.y_hash
        np.add(self.total, y, out=self.total)

    def y_hash(self, index: int) -> str:
        return self._seen[index]

    def m6(self) -> bytes:
        if len(self._seen) != len(self.offer.cohort):
            raise Aborted("secagg.dropout", "A site dropped out.", "The round is void; try a new attempt.")
        return b"{}"

    def take_m9(self, index: int, data: bytes) -> None:
        pass

    def unmask(self) -> NDArray[np.uint32]:
        return self.total
