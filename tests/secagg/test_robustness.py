"""What one bad party costs the others: messages that are too large or malformed a million times, forged and wrong shares."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from privacy.canonical import canonical
from privacy.contract import validate
from privacy.errors import Aborted, UsageError
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M2, M3, M4, M6, M8, M9, dump, load
from privacy.secagg.site import SECRET, SiteSession
from simulations.adversary import Consortium, play


@pytest.mark.parametrize(("model", "rest", "field"), [
    (M2, {}, "keys"), (M3, {"body": None, "signature": ""}, "ciphertexts"), (M4, {"bodies": []}, "inbound"),
    (M6, {}, "survivors"), (M8, {}, "votes"), (M9, {"index": 0, "pairs": [], "signature": ""}, "shares"),
    (M9, {"index": 0, "shares": [], "signature": ""}, "pairs")])
def test_attack_a_message_of_a_million_wrong_items(model: Any, rest: dict[str, Any], field: str) -> None:
    """4 MiB of items, each of which would be an error of its own: refused at the first, in the message's own size."""
    data = canonical(rest | {field: [1] * 1_300_000})
    tracemalloc.start()
    try:
        with pytest.raises(Aborted, match=r"secagg\.message"):
            load(model, data)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


def test_attack_an_offer_of_a_million_ranges(consortium: Consortium) -> None:
    value = consortium.offer(3, 3, 10).model_dump(mode="json") | {"ranges": [0] * 1_000_000}
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r"config\.invalid"):
            validate(tr.Offer, value)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


def test_attack_shares_so_large_that_m4_cannot_be_sent(consortium: Consortium) -> None:
    """A signed M3 just under the limit of a message: its sender is left out, and the others go on."""
    class Huge(SiteSession):
        def m3(self, m2: bytes) -> bytes:
            import hashlib

            m3 = load(M3, super().m3(m2))
            ciphertexts = tuple((v, ct + bytes(700_000)) for v, ct in m3.ciphertexts)
            body = m3.body.model_copy(update={"ciphertexts": b"".join(hashlib.sha256(ct).digest() for _, ct in ciphertexts)})
            return dump(M3(body=body, ciphertexts=ciphertexts,
                           signature=self.signer.sign(tr.signed_m3(self._t1, body.to_bytes()))))

    offer = consortium.offer(5, 4, 10)
    vectors = [np.arange(10, dtype=np.uint32) + u for u in range(5)]
    played = play(consortium, offer, vectors, sites={2: consortium.site(offer, 2, Huge)})
    assert played.refused == {("m3", 2): "secagg.plaintext"}
    assert np.array_equal(played.total, sum(vectors[u] for u in (0, 1, 3, 4)))  # type: ignore[arg-type]


class Forger(SiteSession):
    """Releases shares of zeros, correctly signed."""

    def m9(self, m8: bytes) -> bytes:
        m9 = load(M9, super().m9(m8))
        shares = tuple((u, bytes(SECRET)) for u, _ in m9.shares)
        changed = m9.model_copy(update={"shares": shares})
        return dump(changed.model_copy(update={
            "signature": self.signer.sign(tr.signed_m9(self.transcript, self.index, changed.joined()))}))


class WrongDealer(SiteSession):
    """Deals shares of another secret than the one it commits to."""

    def m3(self, m2: bytes) -> bytes:
        m3 = load(M3, super().m3(m2))
        body = m3.body.model_copy(update={"com_b": bytes(32)})
        self._body = body
        return dump(m3.model_copy(update={"body": body,
                                          "signature": self.signer.sign(tr.signed_m3(self._t1, body.to_bytes()))}))


def test_attack_several_forgers_and_one_honest_majority(consortium: Consortium) -> None:
    """Twelve sites, t = 9: three forge every share. One of two hundred random sets of nine is honest by chance; the shares
    that agree with a secret once found point the way. Never a wrong sum."""
    offer = consortium.offer(12, 9, 10)
    vectors = [np.arange(10, dtype=np.uint32) * u for u in range(12)]
    played = play(consortium, offer, vectors, sites={u: consortium.site(offer, u, Forger) for u in (1, 5, 8)})
    expected = sum(vectors, np.zeros(10, np.uint32))
    assert played.void in ("", "secagg.forged_share")
    assert played.total is None or np.array_equal(played.total, expected)


def test_forgers_of_one_secret_do_not_hide_the_others(consortium: Consortium) -> None:
    """One forger of four, t = 3: a secret that fits tells it apart at once."""
    offer = consortium.offer(4, 3, 10)
    vectors = [np.arange(10, dtype=np.uint32) + u for u in range(4)]
    played = play(consortium, offer, vectors, sites={1: consortium.site(offer, 1, Forger)})
    assert np.array_equal(played.total, sum(vectors))  # type: ignore[arg-type]


def test_a_wrong_dealer_is_named(consortium: Consortium) -> None:
    offer = consortium.offer(4, 3, 10)
    played = play(consortium, offer, [np.zeros(10, np.uint32)] * 4, sites={2: consortium.site(offer, 2, WrongDealer)})
    assert (played.void, played.coordinator.suspects, played.total) == ("secagg.forged_share", (2,), None)


def test_the_shared_part_of_m4_is_the_same_message(consortium: Consortium) -> None:
    """M4 is put together from two parts; it must be what `dump` gives."""
    offer, seen = consortium.offer(4, 3, 10), []

    def hook(message: str, site: int, data: bytes) -> bytes:
        if message == "m4":
            seen.append(dump(load(M4, data)) == data == canonical(json.loads(data)))
        return data

    play(consortium, offer, [np.zeros(10, np.uint32)] * 4, hook)
    assert seen == [True] * 4
