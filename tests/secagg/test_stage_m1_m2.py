"""M0 to M2: who may take part. The coordinator's checks of M1, a site's checks of M0 and M2."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from secagg_kit import DIM, Change, Scene, edit, flipped, forged_certificate, left_out

from privacy import ca
from privacy.errors import Aborted, ConsiloError, Refused
from privacy.identity import Peer, Role, create_request, fingerprint, load_certificate
from privacy.secagg import hybrid, peers
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.messages import M1, M2, dump, load
from privacy.trust import TrustStore
from simulations.adversary import Consortium

KEY = hybrid.HybridKey().public


@pytest.mark.parametrize(("change", "code"), [
    (lambda s, data: s.sites[2].m1(), "secagg.sender"),
    (lambda s, data: dump(s.m1(1, KEY, signature=bytes(64))), "identity.signature"),
    (lambda s, data: dump(load(M1, data).model_copy(update={"public": KEY})), "identity.signature"),
    (lambda s, data: dump(s.m1(1, KEY, certificate=s.pem(5))), "secagg.peer"),
    (lambda s, data: dump(s.m1(1, KEY, certificate=b"no certificate")), "identity.malformed"),
    (lambda s, data: dump(s.m1(1, load(M1, s.sites[0].m1()).public)), "secagg.peer"),
    (lambda s, data: dump(s.m1(1, KEY[:-1])), "secagg.ciphertext"),
    (lambda s, data: dump(s.m1(1, KEY[:1184] + bytes(32))), "secagg.ciphertext"),
    (lambda s, data: data[:-1], "secagg.message"),
], ids=["replay of another's", "signature", "key", "certificate", "no certificate", "another's key", "short key",
        "low-order", "cut"])
def test_m1_of_one_site_is_left_out(consortium: Consortium, change: Change, code: str) -> None:
    left_out(consortium, "m1", 1, change, code)


@pytest.mark.parametrize(("change", "code"), [
    (edit(lambda v: v["keys"].pop(0)), "secagg.own_entry"),
    (edit(lambda v: v["keys"].insert(2, v["keys"][1])), "secagg.key_list"),
    (edit(lambda v: v["keys"].reverse()), "secagg.key_list"),
    (edit(lambda v: v["keys"][3].update(index=4)), "secagg.key_list"),
    (edit(lambda v: v["keys"][3].update(index=99)), "secagg.key_list"),
    (edit(lambda v: v["keys"].__delitem__(slice(2, 4))), "secagg.too_few"),
    (edit(lambda v: v["keys"][2].update(certificate=v["keys"][3]["certificate"])), "secagg.peer"),
    (edit(lambda v: v["keys"][2].update(signature=v["keys"][3]["signature"])), "secagg.identity"),
    (edit(lambda v: v["keys"][2].update(public="AAAA")), "secagg.identity"),
    (edit(lambda v: v.update(more=1)), "secagg.message"),
    (lambda s, data: data + b" ", "secagg.message"),
    (lambda s, data: b"[]", "secagg.message"),
], ids=["own entry missing", "repeated", "order", "not of the cohort", "index out of range", "too few", "certificate",
        "signature", "key", "unknown field", "encoding", "another type"])
def test_site_refuses_m2(consortium: Consortium, change: Change, code: str) -> None:
    left_out(consortium, "m2", 0, change, code)


def put(u: int, key: M1, data: bytes) -> bytes:
    keys = list(load(M2, data).keys)
    keys[u] = key
    return dump(M2(keys=tuple(keys)))


def test_site_refuses_m2_with_another_key_of_its_own(consortium: Consortium) -> None:
    """Even one that it signed: a second process with the same identity."""
    left_out(consortium, "m2", 0, lambda s, data: put(0, s.m1(0, KEY), data), "secagg.own_entry")


def test_site_refuses_m2_with_one_key_twice(consortium: Consortium) -> None:
    """A member claims another's key: the other could read what is sealed to both."""
    left_out(consortium, "m2", 0, lambda s, data: put(2, s.m1(2, load(M2, data).keys[3].public), data), "secagg.peer")


def test_site_refuses_m2_with_a_key_that_is_none(consortium: Consortium) -> None:
    """Signed by its owner, so that only its use shows it."""
    left_out(consortium, "m2", 0, lambda s, data: put(2, s.m1(2, KEY[:-1]), data), "secagg.ciphertext")


def test_m1_twice_or_late_is_refused(consortium: Consortium) -> None:
    s = Scene.of(consortium)
    for u in (0, 1, 2):
        s.coordinator.take_m1(u, s.sites[u].m1())
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        s.coordinator.take_m1(0, s.sites[0].m1())
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        s.coordinator.take_m1(4, dump(s.m1(4, KEY)))
    m2 = s.coordinator.m2()
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        s.coordinator.take_m1(3, s.sites[3].m1())
    assert [k.index for k in load(M2, m2).keys] == [0, 1, 2]


def test_site_needs_its_own_certificate_once_in_the_cohort(consortium: Consortium) -> None:
    offer = consortium.offer(4, 3, DIM)
    with pytest.raises(Aborted, match=r"secagg\.cohort"):
        consortium.site(offer, 0, signer=consortium.signers[1])
    with pytest.raises(Aborted, match=r"secagg\.cohort"):
        consortium.site(offer, 4)
    twice = tuple(m.model_copy(update={"certificate": offer.cohort[min(m.index, 2)].certificate}) for m in offer.cohort)
    with pytest.raises(Aborted, match=r"secagg\.cohort"):
        consortium.site(consortium.offer(4, 3, DIM, cohort=twice), 0)


def test_certificate_must_carry_the_members_name(consortium: Consortium) -> None:
    s = Scene.of(consortium)
    names = tuple(m.model_copy(update={"name": f"site{m.index ^ (m.index > 1)}"}) for m in s.offer.cohort)
    offer = consortium.offer(4, 3, DIM, cohort=names)
    with pytest.raises(Aborted, match=r"secagg\.peer"):
        CoordinatorSession(offer, consortium.check).take_m1(3, consortium.site(offer, 3).m1())


def test_members_are_distinct_in_key_name_and_organisation(consortium: Consortium) -> None:
    """Whatever a careless CA certified."""
    one, other = Ed25519PrivateKey.generate().public_key(), Ed25519PrivateKey.generate().public_key()

    def peer(key: object, name: str, organisation: str) -> Peer:
        made = forged_certificate(consortium, key, name, organisation)
        return Peer(name, organisation, Role.SITE, fingerprint(made), made)

    peers.check_distinct([peer(one, "a", "A"), peer(other, "b", "B")])
    for second in (peer(one, "b", "B"), peer(other, "a", "B"), peer(other, "b", "A")):
        with pytest.raises(Aborted, match=r"secagg\.peer"):
            peers.check_distinct([peer(one, "a", "A"), second])


def careless(tmp_path: Path) -> tuple[Consortium, tr.Offer]:
    """Four sites, the last of which is of the third one's organisation."""
    made = Consortium(tmp_path, 3)
    ca.issue(tmp_path / "ca", create_request(tmp_path / "site3", "site3", "Hospital 2"), Role.SITE)
    made.signers.append(type(made.signers[0])(tmp_path / "site3" / "sign.key", tmp_path / "ca/issued/site3/sign.pem"))
    return made, made.offer(4, 3, DIM)


def test_both_sides_refuse_two_members_of_one_organisation(tmp_path: Path) -> None:
    """A coordinator that lists them all the same gets nothing from honest sites."""
    consortium, offer = careless(tmp_path)
    sites = consortium.sites(offer)
    honest = CoordinatorSession(offer, consortium.check)
    for u in range(3):
        honest.take_m1(u, sites[u].m1())
    with pytest.raises(Aborted, match=r"secagg\.peer"):
        honest.take_m1(3, sites[3].m1())
    with pytest.raises(Aborted, match=r"secagg\.peer"):
        sites[0].m3(dump(M2(keys=tuple(load(M1, site.m1()) for site in sites))))


def test_no_revocation_list_is_no_trust(tmp_path: Path) -> None:
    Consortium(tmp_path, 1)
    (tmp_path / "ca" / "crl-site.pem").unlink()
    with pytest.raises(Refused, match=r"identity\.crl_missing"):
        peers.certificate_check(TrustStore.load(tmp_path / "ca"))


def test_only_signing_certificates_of_sites_count(consortium: Consortium) -> None:
    check = peers.certificate_check(TrustStore.load(consortium.folder / "ca"))
    folder = consortium.folder / "ca" / "issued" / "site0"
    assert check((folder / "sign.pem").read_bytes()).name == "site0"
    with pytest.raises(ConsiloError, match=r"identity\.usage"):
        check((folder / "tls.pem").read_bytes())
    with pytest.raises(ConsiloError, match=r"identity\.untrusted"):
        check((consortium.folder / "ca" / "root.pem").read_bytes())
    assert load_certificate((folder / "sign.pem").read_bytes()) == consortium.signers[0].certificate


def test_tampered_ciphertext_of_either_kem_is_refused() -> None:
    """ML-KEM-768's part first (1088 bytes), then the X25519 point, then the sealed text."""
    key = hybrid.HybridKey()
    sealed = hybrid.seal(key.public, b"secret", b"info")
    for byte in (0, 500, 1087, 1088, 1119, len(sealed) - 1):
        with pytest.raises(Aborted, match=r"secagg\.ciphertext"):
            key.open(flipped(sealed, byte), b"info")
    with pytest.raises(Aborted, match=r"secagg\.ciphertext"):
        key.open(sealed, b"other")
    for cut in (b"", sealed[:1000], sealed[:1120]):
        with pytest.raises(Aborted, match=r"secagg\.ciphertext"):
            key.open(cut, b"info")
    assert key.open(sealed, b"info") == b"secret"


@pytest.mark.parametrize("public", [KEY[:1184] + bytes(32), KEY[:-1], KEY + b"\0", b"", KEY[:1184],
                                    KEY[:1184] + b"\1" + bytes(31), b"\xff" * 1184 + KEY[1184:]],
                         ids=["zero point", "short", "long", "empty", "no point", "point of order 1", "ML-KEM not reduced"])
def test_key_that_is_none_is_refused(public: bytes) -> None:
    with pytest.raises(Aborted, match=r"secagg\.ciphertext"):
        hybrid.seal(public, b"secret", b"info")


def test_bytes_have_one_encoding(consortium: Consortium) -> None:
    """The last character of a signature has spare bits: A and B, Q and R, g and h, w and x read the same."""
    def spare(v: dict[str, str]) -> None:
        last = chr(ord(v["signature"][-3]) + 1)
        changed = v["signature"][:-3] + last + "=="
        assert base64.b64decode(changed) == base64.b64decode(v["signature"])
        v["signature"] = changed

    left_out(consortium, "m1", 1, edit(spare), "secagg.message")
