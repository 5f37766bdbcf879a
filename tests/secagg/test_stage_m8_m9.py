"""M8 and M9: the votes, the shares that they release, and the sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from secagg_kit import Change, Scene, added, edit, left_out, vectors

from privacy.errors import Aborted, Refused
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M8, M9, dump, load
from privacy.secagg.site import SECRET
from simulations.adversary import Consortium


@pytest.mark.parametrize(("change", "code"), [
    (edit(lambda v: v["votes"].__delitem__(slice(2, 4))), "secagg.too_few"),
    (edit(lambda v: v["votes"].clear()), "secagg.too_few"),
    (edit(lambda v: v.update(votes=[v["votes"][1]] * 3)), "secagg.votes"),
    (edit(lambda v: v["votes"].reverse()), "secagg.votes"),
    (edit(lambda v: v["votes"][3].update(index=7)), "secagg.votes"),
    (edit(lambda v: v["votes"][1].update(signature=v["votes"][2]["signature"])), "secagg.identity"),
    (lambda s, data: dump(M8(votes=(*load(M8, data).votes[:3], s.m7(3, bytes(32))))), "secagg.identity"),
    (edit(lambda v: v["votes"][0].update(index=True)), "secagg.message"),
], ids=["too few", "none", "repeated", "order", "from outside", "signature", "another T3", "type"])
def test_site_refuses_m8(consortium: Consortium, change: Change, code: str) -> None:
    left_out(consortium, "m8", 0, change, code)


def test_its_own_vote_need_not_be_among_them(consortium: Consortium) -> None:
    s = Scene.of(consortium)
    played = s.play(lambda message, u, data: edit(lambda v: v["votes"].pop(0))(s, data) if message == "m8" else data)
    assert played.total is not None and not played.refused


def signed(**fields: Any) -> Change:
    """Site 1's M9 with these fields, signed by it; a value is a function of the old one."""
    def change(scene: Scene, data: bytes) -> bytes:
        m9 = load(M9, data)
        m9 = m9.model_copy(update={k: f(getattr(m9, k)) for k, f in fields.items()})
        signature = scene.consortium.signers[1].sign(tr.signed_m9(scene.coordinator.transcript, 1, m9.joined()))
        return dump(m9.model_copy(update={"signature": signature}))

    return change


def uneven(shares: Any) -> Any:
    """31 and 33 bytes: joined they are as long as they should be."""
    (u, a), (v, b), *rest = shares
    return ((u, a[:-1]), (v, a[-1:] + b), *rest)


@pytest.mark.parametrize(("change", "code"), [
    (signed(index=lambda _: 2), "secagg.sender"),
    (signed(shares=lambda shares: shares[:-1]), "secagg.shares"),
    (signed(shares=lambda shares: (*shares, shares[-1])), "secagg.shares"),
    (signed(shares=lambda shares: shares[::-1]), "secagg.shares"),
    (signed(pairs=lambda _: ((0, 1, bytes(SECRET)),)), "secagg.shares"),
    (signed(shares=uneven), "secagg.shares"),
    (signed(shares=lambda shares: tuple((u, b"") for u, _ in shares)), "secagg.shares"),
    (edit(lambda v: v["shares"][0].__setitem__(1, v["shares"][1][1])), "identity.signature"),
    (lambda s, data: data[1:], "secagg.message"),
], ids=["another's", "one missing", "one more", "order", "pair of survivors", "lengths", "empty", "unsigned", "cut"])
def test_m9_of_one_site_is_left_out(consortium: Consortium, change: Change, code: str) -> None:
    """The other three are enough."""
    left_out(consortium, "m9", 1, change, code)


def test_m9_of_a_pair_needs_all_its_shares(consortium: Consortium) -> None:
    """Site 4 drops out after M3; site 1 leaves the share of s_14 out, or cuts it."""
    for change in (signed(pairs=lambda pairs: pairs[:-1]), signed(pairs=lambda pairs: ((*pairs[0][:2], b""), *pairs[1:])),
                   signed(pairs=lambda pairs: tuple((high, low, share) for low, high, share in pairs))):
        s = Scene.of(consortium, 5, 4)
        played = s.play(lambda message, u, data, s=s, change=change: None if (message, u) == ("m5", 4) else  # type: ignore[misc]
                        change(s, data) if (message, u) == ("m9", 1) else data)
        assert played.refused == {("m9", 1): "secagg.shares"} and played.void == "secagg.too_few"


def test_m9_twice_or_from_outside_is_refused(consortium: Consortium) -> None:
    s = Scene.of(consortium)
    kept = dict[int, bytes]()

    def hook(message: str, u: int, data: bytes) -> bytes | None:
        if message == "m9":
            kept[u] = data
            if u == 2:
                for sender in (0, 3):
                    with pytest.raises(Aborted, match=r"secagg\.sender"):
                        s.coordinator.take_m9(sender, kept[0].replace(b'"index":0', b'"index":%d' % sender))
        return None if (message, u) == ("m5", 3) else data

    played = s.play(hook)
    assert played.total is not None and np.array_equal(played.total, added(vectors(s.offer), range(3)))


def released(scene: Scene, lost: dict[str, int]) -> dict[int, M9]:
    """All M9, after the sites in `lost` (by message) fell out."""
    played = scene.play(lambda message, u, data: None if lost.get(message) == u else data)
    assert played.total is not None
    return {u: load(M9, data) for (message, u), data in played.sent.items() if message == "m9"}


def test_exactly_these_shares_leave_a_site(consortium: Consortium) -> None:
    """Seven sites of which 0 falls out before M3, 4 before M5: b of survivors, s of pairs with exactly one survivor in U2.
    Nothing of 0; never b of 4; no pair of two survivors."""
    s = Scene.of(consortium, 7, 5)
    secrets = [site._secrets for site in s.sites]
    got = released(s, {"m3": 0, "m5": 4})
    assert sorted(got) == [1, 2, 3, 5, 6]
    for v, m9 in got.items():
        held = secrets[v].held  # type: ignore[union-attr]
        assert m9.shares == tuple((u, held[u][:SECRET]) for u in (1, 2, 3, 5, 6))
        places = {(1, 4): 3, (2, 4): 2, (3, 4): 1, (4, 5): 1, (4, 6): 2}  # its place after b_low
        assert m9.pairs == tuple((low, high, held[low][SECRET * k:SECRET * (k + 1)]) for (low, high), k in places.items())


def test_released_pairs_against_the_definition() -> None:
    """Every U3 within every U2 within six sites."""
    for mask in range(64):
        u2 = [u for u in range(6) if mask >> u & 1]
        for chosen in range(2 ** len(u2)):
            u3 = [u for k, u in enumerate(u2) if chosen >> k & 1]
            wanted = [(a, b) for a in u2 for b in u2 if a < b and len({a, b} & set(u3)) == 1]
            assert tr.released_pairs(u2, u3) == wanted


def test_sum_is_in_the_journal_before_its_shares_leave(consortium: Consortium) -> None:
    class Full:
        def unmasked(self, run: str, slot: tr.Slot, transcript: str) -> None:
            assert (run, slot, transcript) == ("ab" * 16, (1, 0, 1), s.coordinator.transcript.hex())
            raise Refused("journal.write_failed", "Full.", "Make room.")

    s = Scene.of(consortium)
    spent = [site._journal for site in s.sites]

    def hook(message: str, u: int, data: bytes) -> bytes:
        if (message, u) == ("m8", 0):
            s.sites[0]._journal = Full()  # type: ignore[assignment]
        return data

    played = s.play(hook)
    assert list(played.refused) == [("m8", 0)] and played.total is not None
    assert spent[1].sums == [("ab" * 16, (1, 0, 1), s.coordinator.transcript.hex())]  # type: ignore[attr-defined]


def test_m9_is_the_last_and_drops_all_secrets(consortium: Consortium) -> None:
    s = Scene.of(consortium)
    kept = dict[tuple[str, int], bytes]()

    def hook(message: str, u: int, data: bytes) -> bytes:
        kept[message, u] = data
        return data

    played = s.play(hook)
    assert all(site._secrets is None for site in s.sites)
    assert s.sites[0].m9(kept["m8", 0]) == played.sent["m9", 0]  # a redelivery
    other = dump(M8(votes=load(M8, kept["m8", 0]).votes[:3]))
    for data in (other, kept["m8", 0]):
        with pytest.raises(Aborted, match=r"secagg\.stage"):
            s.sites[0].m9(data)


@pytest.mark.parametrize("stage", [1, 3, 5, 7, 9])
def test_too_few_answers_void_the_attempt_at_once(consortium: Consortium, stage: int) -> None:
    """Two of four fall out before a message: the others are told nothing more, and there is no sum."""
    s, seen = Scene.of(consortium), set[str]()

    def hook(message: str, u: int, data: bytes) -> bytes | None:
        seen.add(message)
        return None if message == f"m{stage}" and u < 2 else data

    played = s.play(hook)
    assert played.void == "secagg.too_few" and played.total is None and not played.refused
    assert seen == {f"m{k}" for k in range(stage + 1)}


def test_the_sum_is_given_once(consortium: Consortium) -> None:
    s = Scene.of(consortium)
    s.play(lambda message, u, data: data)
    with pytest.raises(Aborted, match=r"secagg\.too_few"):
        s.coordinator.unmask()
