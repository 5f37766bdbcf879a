"""Plain mode has the same interface, the same least number of sites, and the same journal; only the masks are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from secagg_kit import DIM, added, vectors

from privacy.errors import Aborted
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M5, Ring, dump
from privacy.secagg.plain import PlainCoordinator, PlainSite
from simulations.adversary import Consortium, MemoryJournal

Taken = tuple[bytes, Ring]


def play(offer: tr.Offer, lost: tuple[int, ...] = ()) -> tuple[PlainCoordinator, list[MemoryJournal]]:
    c, journals = PlainCoordinator(offer), [MemoryJournal() for _ in offer.cohort]
    for u, journal in enumerate(journals):
        site = PlainSite(offer, u, journal)
        c.take_m1(u, site.m1())
        c.take_m3(u, site.m3(c.m2()))
        if u not in lost:
            c.take_m5(u, *site.m5(c.m4()[u], vectors(offer)[u]))
            assert c._seen[u] == site.masked == hashlib.sha256(vectors(offer)[u].tobytes()).hexdigest()
            c.take_m7(u, site.m7(b""))
            c.take_m9(u, site.m9(b""))
        site.expire()
        assert site.view == site.transcript == b""
    return c, journals


@pytest.mark.parametrize("lost", [(), (1,), (0, 3)])
def test_sum_of_those_that_are_there(consortium: Consortium, lost: tuple[int, ...]) -> None:
    offer = consortium.offer(5, 4, DIM, survivors=3)
    c, journals = play(offer, lost)
    there = [u for u in range(5) if u not in lost]
    c.m6()
    assert c.survivors == tuple(there) and c.votes == {} and c.view == c.transcript == b""
    assert np.array_equal(c.unmask(), added(vectors(offer), there)) and (c.m2(), c.m8()) == (b"{}", b"{}")
    for u, journal in enumerate(journals):
        assert journal.starts == [("ab" * 16, (1, 0, 1))]
        assert journal.spends == [("ab" * 16, (1, 0, 1), "1" * 64)] * (u in there)


def test_too_few_sites_give_no_sum(consortium: Consortium) -> None:
    c, _ = play(consortium.offer(5, 4, DIM), (1, 2))
    with pytest.raises(Aborted, match=r"secagg\.too_few"):
        c.m6()


def sent(u: int, y: Ring, said: bytes | None = None) -> Taken:
    return dump(M5(index=u, y_hash=hashlib.sha256(y.tobytes() if said is None else said).hexdigest(), signature=b"")), y


X = np.arange(DIM, dtype=np.uint32)


@pytest.mark.parametrize("make", [lambda: sent(1, X), lambda: sent(3, X[:1]), lambda: sent(3, X.astype(np.uint16)),
                                  lambda: sent(3, X.view(np.int32)), lambda: sent(3, X, b"other")],
                         ids=["another's", "shape", "narrow", "signed", "hash"])
def test_a_vector_that_does_not_fit_is_left_out(consortium: Consortium, make: Callable[[], Any]) -> None:
    c, _ = play(consortium.offer(4, 3, DIM), (3,))
    with pytest.raises(Aborted, match=r"secagg\.dimension"):
        c.take_m5(3, *make())
    c.m6()
    assert c.survivors == (0, 1, 2)


def test_a_vector_twice_or_late_is_left_out(consortium: Consortium) -> None:
    offer = consortium.offer(4, 3, DIM)
    c, _ = play(offer, (3,))
    with pytest.raises(Aborted, match=r"secagg\.dimension"):
        c.take_m5(0, *sent(0, X))
    c.m6()
    with pytest.raises(Aborted, match=r"secagg\.dimension"):
        c.take_m5(3, *sent(3, X))
    assert np.array_equal(c.unmask(), added(vectors(offer), range(3)))


def test_a_site_outside_the_cohort_is_none(consortium: Consortium) -> None:
    c, _ = play(consortium.offer(4, 3, DIM), (3,))
    c.take_m5(7, *sent(7, X))
    with pytest.raises(Aborted, match=r"secagg\.stage"):
        c.m6()
