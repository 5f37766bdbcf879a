"""The same interface without masks, for plain mode: single updates are visible, and the report's title says so."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from privacy.errors import Aborted
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M5, Ring, dump, load
from privacy.secagg.peers import check_members
from privacy.secagg.site import SpentJournal

NOTHING = b"{}"


class PlainSite:
    """`SiteSession` that hides nothing and signs nothing; the round's statement binds the vector."""

    view = transcript = b""
    masked = ""

    def __init__(self, offer: tr.Offer, index: int, journal: SpentJournal) -> None:
        self.offer, self.index, self._journal = offer, index, journal
        self.sites = tuple(m.name for m in offer.cohort)  # a second pass needs them all

    def m1(self) -> bytes:
        self._journal.started(self.offer.run, self.offer.slot)
        return NOTHING

    def m3(self, m2: bytes) -> bytes:
        return NOTHING

    def m5(self, m4: bytes, encoded: Ring) -> tuple[bytes, Ring]:
        o = self.offer
        self._journal.spent(o.run, o.slot, o.adapter)
        self.masked = hashlib.sha256(encoded.data).hexdigest()
        return dump(M5(index=self.index, y_hash=self.masked, signature=b"")), encoded

    def m7(self, m6: bytes) -> bytes:
        return NOTHING

    def m9(self, m8: bytes) -> bytes:
        return NOTHING

    def expire(self) -> None:
        pass


class PlainCoordinator:
    """`CoordinatorSession` that adds what it sees, with the same least number of sites. keep: whether `vectors` holds each
    site's own, by index, for a rule that isn't linear."""

    view = transcript = b""
    suspects = ()

    def __init__(self, offer: tr.Offer, *, keep: bool = False) -> None:
        self.offer, self._seen, self._keep = offer, dict[int, str](), keep
        self.vectors: dict[int, Ring] = {}
        self.survivors: tuple[int, ...] = ()
        self.votes: dict[int, bytes] = {}
        self.total = np.zeros(offer.dim, offer.encoding.dtype)

    def take_m1(self, index: int, data: bytes) -> None:
        pass

    def m2(self) -> bytes:
        return NOTHING

    def take_m3(self, index: int, data: bytes) -> None:
        pass

    def m4(self) -> Mapping[int, bytes]:
        return {m.index: NOTHING for m in self.offer.cohort}

    def take_m5(self, index: int, data: bytes, y: Ring) -> None:
        m5 = load(M5, data)
        if (m5.index != index or index in self._seen or self.survivors
                or y.dtype != self.total.dtype or y.shape != self.total.shape
                or hashlib.sha256(np.ascontiguousarray(y).data).hexdigest() != m5.y_hash):
            raise Aborted("secagg.dimension", "A vector has the wrong shape or sender.", "That site is left out.")
        self._seen[index] = m5.y_hash
        np.add(self.total, y, out=self.total)
        if self._keep:
            self.vectors[index] = y.copy()

    def m6(self) -> bytes:
        check_members(sorted(self._seen), range(len(self.offer.cohort)), self.offer.survivors, "stage")
        self.survivors = tuple(sorted(self._seen))
        return NOTHING

    def take_m7(self, index: int, data: bytes) -> None:
        pass

    def m8(self) -> bytes:
        return NOTHING

    def take_m9(self, index: int, data: bytes) -> None:
        pass

    def unmask(self) -> Ring:
        return self.total
