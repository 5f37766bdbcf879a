"""Attacks by forged, swapped and repeated messages. Those by several views: test_attacks_views.py; by bad keys, lying sites
and a second y: test_attacks_sites.py.

Weights other than the contract's: tests/client/test_round.py. NaN, infinities, values out of range and overflow:
test_encoding.py. What a new process may do after a crash: tests/client/test_round.py and test_journal.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding as Pem
from secagg_kit import DIM, Scene, at, edit, flipped, forged_certificate, left_out

from privacy.errors import Aborted
from privacy.secagg import hybrid
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1, M2, M4, M6, dump, load
from simulations.adversary import Consortium

INBOUND = ("m2", "m4", "m6", "m8")


def nobody_goes_on(consortium: Consortium, message: str, change: Callable[[Any], object], code: str) -> None:
    """The coordinator sends the changed message to every site: all refuse, nothing more leaves them, and no sum."""
    scene = Scene.of(consortium)
    played = scene.play(lambda m, u, data: edit(change)(scene, data) if m == message else data)
    assert played.refused == {(message, u): code for u in range(4)}
    assert played.total is None and f"m{int(message[1:]) + 1}" not in {m for m, _ in played.sent}
    assert all(site._secrets is None for site in scene.sites)


def test_attack_certificate_and_keys_replaced(consortium: Consortium) -> None:
    """The coordinator puts a validly certified site of its own in the place of site 1: every other site refuses."""
    scene = Scene.of(consortium)
    outsider = json.loads(dump(scene.m1(5, hybrid.HybridKey().public))) | {"index": 1}
    played = scene.play(lambda m, u, data: edit(lambda v: v["keys"].__setitem__(1, outsider))(scene, data)
                        if m == "m2" else data)
    assert played.refused == {("m2", u): "secagg.peer" for u in range(4)} and played.total is None


def test_attack_second_certificate_of_the_same_name(consortium: Consortium) -> None:
    """The coordinator talked the CA into a certificate for its own key under site 1's name and organisation: it is not the
    one in M0, and every other site refuses."""
    own = Ed25519PrivateKey.generate()
    pem = forged_certificate(consortium, own.public_key(), "site1", "Hospital 1").public_bytes(Pem.PEM)
    scene, key = Scene.of(consortium), hybrid.HybridKey().public
    assert consortium.check(pem).name == "site1"
    made = M1(index=1, certificate=pem, public=key, signature=own.sign(tr.signed_m1(scene.offer.ctx, 1, key)))
    played = scene.play(lambda m, u, data: dump(M2(keys=tuple(made if k.index == 1 else k for k in load(M2, data).keys)))
                        if m == "m2" else data)
    assert played.refused == {("m2", u): "secagg.peer" for u in range(4)} and played.total is None


def test_attack_ephemeral_key_replaced(consortium: Consortium) -> None:
    """The coordinator's own key under site 1's certificate and signature, to read what is sealed for it: refused."""
    key = hybrid.HybridKey().public
    left_out(consortium, "m2", 0, lambda s, data: dump(M2(keys=tuple(
        k.model_copy(update={"public": key}) if k.index == 1 else k for k in load(M2, data).keys))), "secagg.identity")


@pytest.mark.parametrize("message", INBOUND)
@pytest.mark.parametrize("changes", [{"round": 2}, {"attempt": 1}, {"run": "cd" * 16}])
def test_attack_round_replayed(consortium: Consortium, message: str, changes: dict[str, Any]) -> None:
    """A message of an earlier, honest round in place of this one's: refused, at every stage."""
    earlier, kept = Scene.of(consortium), dict[tuple[str, int], bytes]()

    def keep(m: str, u: int, data: bytes) -> bytes:
        return kept.setdefault((m, u), data)

    assert earlier.play(keep).total is not None
    scene = Scene.of(consortium, **changes)
    played = scene.play(lambda m, u, data: kept[m, u] if m == message else data)
    code = {"m2": "secagg.identity", "m4": "secagg.own_entry", "m6": "secagg.own_entry", "m8": "secagg.identity"}[message]
    assert played.refused == {(message, u): code for u in range(4)} and played.total is None


@pytest.mark.parametrize("message", ["m1", "m3", "m5", "m7", "m9"])
def test_attack_sites_messages_replayed(consortium: Consortium, message: str) -> None:
    """An outsider repeats site 1's message of an earlier round: left out, as everything is bound to its round."""
    earlier = Scene.of(consortium)
    kept = earlier.play(lambda m, u, data: data).sent[message, 1]
    code = {"m5": "secagg.vector", "m3": "identity.signature"}.get(message, "identity.signature")
    left_out(consortium, message, 1, lambda s, data: kept, code, round=2)


@pytest.mark.parametrize(("change", "code"), [(lambda v: v["survivors"].insert(1, v["survivors"][1]), "secagg.survivors"),
                                              (lambda v: v["survivors"].append(v["survivors"][1]), "secagg.survivors"),
                                              (lambda v: v["survivors"][1].update(dead=True), "secagg.message"),
                                              (lambda v: v.update(dead=[1]), "secagg.message")])
def test_attack_node_both_alive_and_dead(consortium: Consortium, change: Callable[[Any], object], code: str) -> None:
    """A list that names site 1 twice, or as a survivor and as dropped out: no vote, and no share leaves."""
    nobody_goes_on(consortium, "m6", change, code)


def test_attack_own_site_listed_dead(consortium: Consortium) -> None:
    """Site 0's pair secrets would be released, although its vector was sent: it refuses."""
    left_out(consortium, "m6", 0, edit(lambda v: v["survivors"].pop(0)), "secagg.own_entry")


def test_attack_single_survivor_named(consortium: Consortium) -> None:
    """The sum over one site is its update: each site is told that it alone is left, and refuses."""
    scene = Scene.of(consortium)
    played = scene.play(lambda m, u, data: dump(M6(survivors=(load(M6, data).survivors[u],))) if m == "m6" else data)
    assert played.refused == {("m6", u): "secagg.too_few" for u in range(4)}


@pytest.mark.parametrize(("n", "t", "survivors"), [(4, 3, 3), (4, 3, 4), (5, 4, 5), (7, 5, 6)])
def test_attack_survivors_below_the_minimum(consortium: Consortium, n: int, t: int, survivors: int) -> None:
    """One site fewer than agreed in the list of keys, of shares or of vectors: refused, though t may be reached."""
    for message, field, last in (("m2", "keys", ()), ("m4", "bodies", ("inbound",)), ("m6", "survivors", ())):
        scene = Scene.of(consortium, n, t, survivors=survivors)

        def fewer(v: Any, field: str = field, last: tuple[str, ...] = last) -> None:
            for name in (field, *last):
                del v[name][survivors - 1 - (name in last):]

        played = scene.play(at(scene, message, 0, edit(fewer)))
        assert played.refused[message, 0] == "secagg.too_few"


@pytest.mark.parametrize(("message", "field", "code"), [("m2", "keys", "key_list"), ("m4", "bodies", "share_list"),
                                                        ("m6", "survivors", "survivors"), ("m8", "votes", "votes")])
@pytest.mark.parametrize("kind", ["unknown", "repeated", "invented"])
def test_attack_unknown_repeated_or_invented_peer(consortium: Consortium, message: str, field: str, code: str,
                                                  kind: str) -> None:
    """A peer outside the cohort, one twice, or one made up from another's entry, in any list: all sites refuse."""
    def change(v: Any) -> None:
        if kind == "repeated":
            v[field].insert(2, v[field][1])
        else:
            made = json.loads(json.dumps(v[field][3]))
            entry = made[0] if message == "m4" else made
            entry["index"] = 4 if kind == "unknown" else 99
            v[field].append(made)

    nobody_goes_on(consortium, message, change, f"secagg.{code}")


def test_attack_another_model_to_one_site(consortium: Consortium) -> None:
    """Site 3 gets another adapter: its messages fit nobody else's, and it refuses theirs.

    That each site compares M0 with its own contract: tests/client/test_round.py."""
    scene = Scene.of(consortium)
    crafted = consortium.offer(4, 3, DIM, adapter="f" * 64)
    scene.sites[3] = consortium.site(crafted, 3)
    played = scene.play(lambda m, u, data: data)
    assert played.refused == {("m1", 3): "identity.signature"} and played.coordinator.survivors == (0, 1, 2)
    keys = tuple(load(M1, played.sent["m1", u]) for u in range(4))
    with pytest.raises(Aborted, match=r"secagg\.identity"):
        scene.sites[3].m3(dump(M2(keys=keys)))
    fresh = consortium.sites(scene.offer)
    keys = tuple(load(M1, fresh[u].m1()) if u < 3 else keys[3] for u in range(4))
    with pytest.raises(Aborted, match=r"secagg\.identity"):
        fresh[0].m3(dump(M2(keys=keys)))


def test_attack_ciphertexts_swapped(consortium: Consortium) -> None:
    """Site 0 gets two peers' ciphertexts in each other's place: refused."""
    def swap(v: Any) -> None:
        (a, x), (b, y) = v["inbound"][:2]
        v["inbound"][:2] = [[a, y], [b, x]]

    left_out(consortium, "m4", 0, edit(swap), "secagg.inbound")


@pytest.mark.parametrize("byte", [0, 1087, 1088, 1119, 1120, -1])
def test_attack_ciphertext_tampered(consortium: Consortium, byte: int) -> None:
    """One bit of a ciphertext, in any of its parts: refused by the hash that its sender signed."""
    left_out(consortium, "m4", 0, lambda s, data: dump(load(M4, data).model_copy(update={"inbound": tuple(
        (v, flipped(ct, byte) if v == 2 else ct) for v, ct in load(M4, data).inbound)})), "secagg.inbound")


def test_attack_repeated_vote(consortium: Consortium) -> None:
    """One colluder's vote t times, or under others' indices: refused, no share leaves."""
    nobody_goes_on(consortium, "m8", lambda v: v.update(votes=v["votes"][:1] * 3), "secagg.votes")
    nobody_goes_on(consortium, "m8", lambda v: v.update(votes=[v["votes"][0] | {"index": k} for k in range(4)]),
                   "secagg.identity")
