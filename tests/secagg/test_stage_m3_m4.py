"""M3 and M4: commitments and shares. The coordinator's checks of M3, a site's checks of M4."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from secagg_kit import Change, Scene, edit, flipped, left_out

from privacy.errors import Aborted
from privacy.secagg import hybrid, shamir
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1, M3, M4, M3Body, dump, load
from privacy.secagg.site import SECRET
from simulations.adversary import Consortium


def signed(**body: Any) -> Change:
    """Site 1's M3 with these fields of the body, signed by it; a value may be a function of the old one."""
    def change(scene: Scene, data: bytes) -> bytes:
        old = load(M3, data).body
        return dump(scene.m3(1, data, **{k: v(getattr(old, k)) if callable(v) else v for k, v in body.items()}))

    return change


@pytest.mark.parametrize(("change", "code"), [
    (signed(index=2), "secagg.sender"),
    (edit(lambda v: v["body"].update(index=2)), "secagg.sender"),
    (lambda s, data: dump(load(M3, data).model_copy(update={"signature": bytes(64)})), "identity.signature"),
    (lambda s, data: s.sites[1].signer.sign(data), "secagg.message"),
    (signed(com_b=bytes(31)), "secagg.share_list"),
    (signed(com_s=bytes(32)), "secagg.share_list"),
    (signed(ciphertexts=bytes(4 * 32)), "secagg.share_list"),
    (edit(lambda v: v["ciphertexts"].pop()), "secagg.share_list"),
    (edit(lambda v: v["ciphertexts"].reverse()), "secagg.share_list"),
    (edit(lambda v: v["ciphertexts"][0].__setitem__(0, 1)), "secagg.share_list"),
    (edit(lambda v: v["ciphertexts"].append(v["ciphertexts"][0])), "secagg.share_list"),
    (edit(lambda v: v["ciphertexts"][1].__setitem__(1, v["ciphertexts"][2][1])), "secagg.inbound"),
    (signed(ciphertexts=flipped), "secagg.inbound"),
], ids=["another's", "another's, unsigned", "signature", "no message", "com_b", "com_s", "hashes", "one missing", "order",
        "to itself", "twice", "swapped", "another hash"])
def test_m3_of_one_site_is_left_out(consortium: Consortium, change: Change, code: str) -> None:
    left_out(consortium, "m3", 1, change, code)


@pytest.mark.parametrize("to", [0, 2])
@pytest.mark.parametrize("alter", [lambda ct: ct[:-1], lambda ct: ct + b"\0", lambda ct: b"", lambda ct: ct + bytes(32)])
def test_a_ciphertext_of_another_length_is_its_senders_fault(consortium: Consortium, to: int, alter: Any) -> None:
    """Signed by it: its peers would have to abort."""
    def change(scene: Scene, data: bytes) -> bytes:
        cts = tuple((v, alter(ct) if v == to else ct) for v, ct in load(M3, data).ciphertexts)
        hashes = b"".join(hashlib.sha256(ct).digest() for _, ct in cts)
        return dump(scene.m3(1, data, ciphertexts=hashes).model_copy(update={"ciphertexts": cts}))

    left_out(consortium, "m3", 1, change, "secagg.plaintext")


def test_m3_twice_late_or_from_outside_is_refused(consortium: Consortium) -> None:
    s = Scene.of(consortium, 5, 4)
    for u in range(4):
        s.coordinator.take_m1(u, s.sites[u].m1())
    m2 = s.coordinator.m2()
    m3 = [site.m3(m2) for site in s.sites[:4]]
    for u in range(4):
        s.coordinator.take_m3(u, m3[u])
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        s.coordinator.take_m3(0, m3[0])
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        s.coordinator.take_m3(4, dump(s.m3(1, m3[1], index=4)))
    late = Scene.of(consortium)
    for u in range(4):
        late.coordinator.take_m1(u, late.sites[u].m1())
    m2 = late.coordinator.m2()
    m3 = [site.m3(m2) for site in late.sites]
    for u in range(3):
        late.coordinator.take_m3(u, m3[u])
    late.coordinator.m4()
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        late.coordinator.take_m3(3, m3[3])


@pytest.mark.parametrize(("change", "code"), [
    (edit(lambda v: (v["bodies"].pop(0), v["inbound"].reverse())), "secagg.own_entry"),
    (edit(lambda v: v["bodies"].insert(2, v["bodies"][1])), "secagg.share_list"),
    (edit(lambda v: v["bodies"].reverse()), "secagg.share_list"),
    (edit(lambda v: v["bodies"][3][0].update(index=7)), "secagg.share_list"),
    (edit(lambda v: v["bodies"].__delitem__(slice(2, 4))), "secagg.too_few"),
    (edit(lambda v: v["bodies"][2].__setitem__(1, v["bodies"][1][1])), "secagg.identity"),
    (edit(lambda v: v["bodies"][2][0].update(com_b=v["bodies"][1][0]["com_b"])), "secagg.identity"),
    (edit(lambda v: v["bodies"].pop()), "secagg.inbound"),
    (edit(lambda v: v["inbound"].pop()), "secagg.inbound"),
    (edit(lambda v: v["inbound"].append(v["inbound"][0])), "secagg.inbound"),
    (edit(lambda v: v["inbound"].reverse()), "secagg.inbound"),
    (edit(lambda v: v["inbound"].insert(0, [0, v["inbound"][0][1]])), "secagg.inbound"),
    (edit(lambda v: v["inbound"][1].__setitem__(0, 7)), "secagg.inbound"),
    (edit(lambda v: v["inbound"][1].__setitem__(1, "AAAA")), "secagg.inbound"),
    (edit(lambda v: v.update(bodies={})), "secagg.message"),
], ids=["own entry missing", "repeated", "order", "not of U1", "too few", "signature", "commitment", "ciphertext of none",
        "no ciphertext", "one more", "ciphertexts' order", "from itself", "from outside", "other ciphertext", "type"])
def test_site_refuses_m4(consortium: Consortium, change: Change, code: str) -> None:
    left_out(consortium, "m4", 0, change, code)


def dealt_by_2(**body: Any) -> Change:
    """Site 2 signs another body for this receiver: a site that lies to one peer with the coordinator's help."""
    def change(scene: Scene, data: bytes) -> bytes:
        m4 = load(M4, data)
        old = m4.bodies[2][0]
        m3 = scene.m3(2, dump(M3(body=old, signature=b"", ciphertexts=())),
                      **{k: v(getattr(old, k)) if callable(v) else v for k, v in body.items()})
        return dump(m4.model_copy(update={"bodies": (*m4.bodies[:2], (m3.body, m3.signature), m4.bodies[3])}))

    return change


@pytest.mark.parametrize("body", [{"com_b": bytes(31)}, {"com_s": lambda old: old + bytes(32)},
                                  {"com_s": b""}, {"ciphertexts": lambda old: old + bytes(32)}],
                         ids=["com_b", "com_s longer", "com_s missing", "hashes longer"])
def test_site_refuses_a_body_of_another_length(consortium: Consortium, body: dict[str, Any]) -> None:
    left_out(consortium, "m4", 0, dealt_by_2(**body), "secagg.share_list")


def test_site_refuses_another_body_of_its_own(consortium: Consortium) -> None:
    """Even one that it signed: a second process with the same identity."""
    def change(scene: Scene, data: bytes) -> bytes:
        m4 = load(M4, data)
        m3 = scene.m3(0, dump(M3(body=m4.bodies[0][0], signature=b"", ciphertexts=())), com_b=bytes(32))
        return dump(m4.model_copy(update={"bodies": ((m3.body, m3.signature), *m4.bodies[1:])}))

    left_out(consortium, "m4", 0, change, "secagg.own_entry")


def sealed_by(dealer: int, receiver: int, alter: Any, t1: bytes = b"", **commitments: Any) -> Change:
    """The dealer seals something else for the receiver and signs it; `alter` maps its plaintext. t1: another one."""
    def change(scene: Scene, data: bytes) -> bytes:
        m4, u1 = load(M4, data), (0, 1, 2, 3)
        info = tr.share_info(scene.coordinator._t1, dealer, receiver)
        site = scene.sites[receiver]
        assert site._secrets is not None
        sealed = dict(m4.inbound)
        text = hybrid.seal(site._secrets.key.public, alter(site._secrets.key.open(sealed[dealer], info)),
                           tr.share_info(t1 or scene.coordinator._t1, dealer, receiver))
        body, at_item = m4.bodies[dealer][0], [v for v in u1 if v != dealer].index(receiver)
        hashes = body.ciphertexts[:32 * at_item] + hashlib.sha256(text).digest() + body.ciphertexts[32 * at_item + 32:]
        m3 = scene.m3(dealer, dump(M3(body=body, signature=b"", ciphertexts=())), ciphertexts=hashes, **commitments)
        bodies = tuple((m3.body, m3.signature) if b.index == dealer else (b, s) for b, s in m4.bodies)
        inbound = tuple((v, text if v == dealer else ct) for v, ct in m4.inbound)
        return dump(M4(bodies=bodies, inbound=inbound))

    return change


@pytest.mark.parametrize("dealer", [0, 3])
@pytest.mark.parametrize("alter", [lambda text: text[:-1], lambda text: text + b"\0", lambda text: text[:-SECRET],
                                   lambda text: text + bytes(SECRET), lambda text: b""],
                         ids=["short", "long", "an item less", "an item more", "empty"])
def test_site_refuses_a_share_message_of_another_length(consortium: Consortium, dealer: int, alter: Any) -> None:
    left_out(consortium, "m4", 1, sealed_by(dealer, 1, alter), "secagg.plaintext")


def test_site_refuses_a_pair_secret_that_is_not_the_committed_one(consortium: Consortium) -> None:
    left_out(consortium, "m4", 1, sealed_by(0, 1, lambda text: flipped(text, len(text) - 1)), "secagg.commitment")


def test_commitment_to_each_pair_is_its_own(consortium: Consortium) -> None:
    """The dealer commits to s_01 in the place of s_02."""
    left_out(consortium, "m4", 2, sealed_by(0, 2, lambda text: text, com_s=bytes(96)), "secagg.commitment")


def test_site_refuses_a_ciphertext_made_for_other_keys(consortium: Consortium) -> None:
    """Right recipient, length and hash, but sealed under another T1."""
    left_out(consortium, "m4", 1, sealed_by(3, 1, lambda text: text, t1=bytes(32)), "secagg.ciphertext")


def test_shares_relayed_are_those_that_were_sent(consortium: Consortium) -> None:
    """M4 holds each body once, and for each site of U2 exactly the ciphertexts of its peers in U2."""
    s = Scene.of(consortium)
    seen = dict[tuple[str, int], bytes]()

    def hook(message: str, u: int, data: bytes) -> bytes | None:
        seen[message, u] = data
        return None if (message, u) == ("m3", 3) else data

    s.play(hook)
    sent = {u: load(M3, seen["m3", u]) for u in range(4)}
    for u in range(3):
        m4 = load(M4, seen["m4", u])
        assert [b for b, _ in m4.bodies] == [sent[v].body for v in range(3)]
        assert m4.inbound == tuple((v, dict(sent[v].ciphertexts)[u]) for v in range(3) if v != u)
    assert ("m4", 3) not in seen


def test_a_site_commits_and_deals_as_specified(consortium: Consortium) -> None:
    """To each peer: shares of b_u and of s_uw for w > u, and s_uv if v > u; any three of four shares give all back."""
    s = Scene.of(consortium)
    for u in range(4):
        s.coordinator.take_m1(u, s.sites[u].m1())
    own = [site._secrets for site in s.sites]
    m2 = s.coordinator.m2()
    for u in range(4):
        m3 = load(M3, s.sites[u].m3(m2))
        t1, mine = s.coordinator._t1, own[u]
        assert mine is not None and len(mine.b) == 32 and len(set(mine.pairs.values()) | {mine.b}) == 4 - u
        shares = {u + 1: mine.held[u]}
        for v, ciphertext in m3.ciphertexts:
            text = own[v].key.open(ciphertext, tr.share_info(t1, u, v))  # type: ignore[union-attr]
            shares[v + 1], pair = text[:32 * (4 - u)], text[32 * (4 - u):]
            assert pair == (mine.pairs[v] if v > u else b"")
        secret = mine.b + b"".join(mine.pairs[w] for w in range(u + 1, 4))
        for without in range(1, 5):
            assert shamir.combine({x: share for x, share in shares.items() if x != without}) == secret
        assert shamir.combine(dict(list(shares.items())[:2])) != secret
        body = m3.body
        assert body.com_b == tr.commit_b(t1, u, mine.b)
        assert [body.pair(w, range(4)) for w in range(u + 1, 4)] == [tr.commit_s(t1, u, w, mine.pairs[w])
                                                                    for w in range(u + 1, 4)]
        assert [body.ciphertext(v, range(4)) for v, _ in m3.ciphertexts] == [hashlib.sha256(ct).digest()
                                                                             for _, ct in m3.ciphertexts]


def test_keys_secrets_and_shares_are_new_in_every_session(consortium: Consortium) -> None:
    """Three sessions of the same four sites: no key, b, pair secret or share in common."""
    keys, random = list[bytes](), list[bytes]()
    for _ in range(3):
        s = Scene.of(consortium)
        own = [site._secrets for site in s.sites]
        played = s.play(lambda message, u, data: None if message == "m4" else data)
        for u, mine in enumerate(own):
            assert mine is not None
            keys.append(load(M1, played.sent["m1", u]).public)
            random += [mine.b, *mine.pairs.values(), *(mine.held[u][i:i + 32] for i in range(0, len(mine.held[u]), 32))]
    assert len(set(keys)) == 12 and len(set(random)) == len(random) == 3 * 2 * (4 + 6)


def test_items_are_found_by_the_place_of_the_peer() -> None:
    """In a U1 with gaps."""
    items = [bytes([i]) * 32 for i in range(4)]
    u1 = (2, 5, 7, 8, 11)
    body = M3Body(index=5, com_b=bytes(32), com_s=b"".join(items[:3]), ciphertexts=b"".join(items))
    assert body.fits(u1)
    assert [body.pair(w, u1) for w in (7, 8, 11)] == items[:3]
    assert [body.ciphertext(v, u1) for v in (2, 7, 8, 11)] == items
