"""M6 and M7: the survivors, and a site's vote for them."""

from __future__ import annotations

import pytest
from secagg_kit import Change, Scene, edit, left_out

from privacy.errors import Aborted
from privacy.identity import verify_signature
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M6, M7, dump, load
from simulations.adversary import Consortium


@pytest.mark.parametrize(("change", "code"), [
    (edit(lambda v: v["survivors"].pop(0)), "secagg.own_entry"),
    (edit(lambda v: v["survivors"][0].update(y_hash="0" * 64)), "secagg.own_entry"),
    (lambda s, data: dump(M6(survivors=(s.m5(0, bytes(32)), *load(M6, data).survivors[1:]))), "secagg.own_entry"),
    (edit(lambda v: v["survivors"].insert(2, v["survivors"][1])), "secagg.survivors"),
    (edit(lambda v: v["survivors"].reverse()), "secagg.survivors"),
    (edit(lambda v: v["survivors"][3].update(index=7)), "secagg.survivors"),
    (edit(lambda v: v["survivors"].__delitem__(slice(2, 4))), "secagg.too_few"),
    (edit(lambda v: v["survivors"].clear()), "secagg.too_few"),
    (edit(lambda v: v["survivors"][1].update(y_hash="0" * 64)), "secagg.identity"),
    (edit(lambda v: v["survivors"][1].update(signature=v["survivors"][2]["signature"])), "secagg.identity"),
    (edit(lambda v: v["survivors"][0].update(signature=v["survivors"][2]["signature"])), "secagg.identity"),
    (edit(lambda v: v.update(dead=[1])), "secagg.message"),
], ids=["own entry missing", "own vector", "own vector, signed", "repeated", "order", "from outside", "too few", "none",
        "another vector", "signature", "own signature", "unknown field"])
def test_site_refuses_m6(consortium: Consortium, change: Change, code: str) -> None:
    left_out(consortium, "m6", 0, change, code)


@pytest.mark.parametrize(("change", "code"), [
    (lambda s, data: dump(s.m7(2)), "secagg.sender"),
    (lambda s, data: dump(s.m7(1, bytes(32))), "identity.signature"),
    (lambda s, data: dump(M7(index=1, signature=s.m7(2).signature)), "identity.signature"),
    (lambda s, data: b"{}", "secagg.message"),
], ids=["another's", "another T3", "signature", "no message"])
def test_m7_of_one_site_is_left_out(consortium: Consortium, change: Change, code: str) -> None:
    """Its vector stays in the sum: three votes are enough."""
    left_out(consortium, "m7", 1, change, code)


def test_m7_twice_or_from_outside_is_refused(consortium: Consortium) -> None:
    s = Scene.of(consortium)
    seen = dict[int, bytes]()

    def hook(message: str, u: int, data: bytes) -> bytes | None:
        if message == "m7":
            seen[u] = data
        return None if (message, u) == ("m5", 3) else data

    played = s.play(hook)
    assert played.total is not None and s.coordinator.survivors == (0, 1, 2)
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        s.coordinator.take_m7(0, seen[0])
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        s.coordinator.take_m7(3, dump(s.m7(3)))
    assert s.coordinator.votes == {u: load(M7, seen[u]).signature for u in range(3)}


def test_a_vote_binds_everything_before_it(consortium: Consortium) -> None:
    """T3 of site and coordinator are one; the vote is a signature on it under its own prefix."""
    s = Scene.of(consortium)
    played = s.play(lambda message, u, data: data)
    t3 = s.coordinator.transcript
    assert {site.transcript for site in s.sites} == {t3}
    vectors = [(u, bytes.fromhex(s.coordinator._m5[u].y_hash)) for u in range(4)]
    assert t3 == tr.t3(s.coordinator.view, vectors)
    for u in range(4):
        vote = load(M7, played.sent["m7", u])
        verify_signature(consortium.signers[u].certificate, vote.signature, b"consilo secagg M7\n"
                         + tr.labelled_hash("s7", t3, u))


def test_one_list_of_survivors_for_a_site(consortium: Consortium) -> None:
    """A shorter one after the vote, each signed and large enough: refused, and the session is over."""
    s = Scene.of(consortium)
    kept = dict[str, bytes]()

    def hook(message: str, u: int, data: bytes) -> bytes | None:
        if (message, u) == ("m6", 0):
            kept["m6"] = data
        return None if message == "m8" else data

    s.play(hook)
    shorter = dump(M6(survivors=load(M6, kept["m6"]).survivors[:3]))
    with pytest.raises(Aborted, match=r"secagg\.stage"):
        s.sites[0].m7(shorter)
    with pytest.raises(Aborted, match=r"secagg\.stage"):
        s.sites[0].m7(kept["m6"])
