"""A whole session, honest and with each message forged in turn; what this version must already refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness import Consortium, Journal, play

from privacy import ca
from privacy.canonical import canonical
from privacy.errors import Aborted, ConsiloError, Refused
from privacy.identity import FileSigner, Role, TrustStore
from privacy.secagg import hybrid
from privacy.secagg import transcript as tr
from privacy.secagg.peers import certificate_check
from privacy.secagg.site import SiteSession


def vectors(n: int, dim: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2**32, dim, dtype=np.uint32) for _ in range(n)]


@pytest.mark.parametrize(("n", "t"), [(3, 3), (4, 3), (4, 4), (6, 5)])
def test_sum_is_exact(consortium: Consortium, n: int, t: int) -> None:
    xs = vectors(n, 70_001)
    total, masked = play(consortium, consortium.offer(n, t, 70_001), xs)
    assert np.array_equal(total, np.sum(xs, axis=0, dtype=np.uint32))
    for x, y in zip(xs, masked, strict=True):
        assert not np.array_equal(x, y)


def test_a_masked_vector_is_uniform(consortium: Consortium) -> None:
    """alpha = 1e-3, chi-square over the 256 values of each byte of the masked zero vector; fixed by no seed."""
    from scipy.stats import chi2

    _, masked = play(consortium, consortium.offer(3, 3, 50_000), [np.zeros(50_000, np.uint32)] * 3)
    counts = np.bincount(masked[0].view(np.uint8), minlength=256)
    expected = masked[0].nbytes / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-6, 255)


def test_same_update_twice_gives_other_masks(consortium: Consortium) -> None:
    x = vectors(3, 100)
    _, first = play(consortium, consortium.offer(3, 3, 100), x)
    _, second = play(consortium, consortium.offer(3, 3, 100, attempt=1), x)
    assert not np.array_equal(first[0], second[0])


@pytest.mark.parametrize("stage", ["m1", "m2", "m3", "m4", "m5", "m6", "m9"])
@pytest.mark.parametrize("change", ["signature", "cut", "other_field"])
def test_forged_message_aborts(consortium: Consortium, stage: str, change: str) -> None:
    def hook(at: str, who: int, data: bytes) -> bytes:
        if (at, who) != (stage, 1):
            return data
        if change == "cut":
            return data[: len(data) // 2]
        value = json.loads(data)
        if change == "signature":
            _flip_first_blob(value)
        else:
            value["extra"] = 1
        return canonical(value)

    with pytest.raises(ConsiloError):
        play(consortium, consortium.offer(4, 3, 50), vectors(4, 50), hook)


def _flip_first_blob(value: object) -> bool:
    """Change one base64 character of the first long string found, depth first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        if isinstance(item, str) and len(item) > 40:
            at = 20
            value[key] = item[:at] + ("A" if item[at] != "A" else "B") + item[at + 1:]  # type: ignore[index]
            return True
        if _flip_first_blob(item):
            return True
    return False


def test_attack_certificate_and_keys_replaced(consortium: Consortium) -> None:
    """The coordinator puts its own (validly certified) site in the place of site 1."""
    offer = consortium.offer(4, 3, 10)
    members = tuple(tr.Member(index=i, name=f"site{k}", certificate=consortium.signers[k].fingerprint)
                    for i, k in enumerate((0, 5, 2, 3)))
    outsider = SiteSession(consortium.offer(4, 3, 10, cohort=members), index=1, n_c=1, signer=consortium.signers[5],
                           check_certificate=consortium.check, journal=Journal())
    forged = json.loads(outsider.m1())

    def hook(at: str, who: int, data: bytes) -> bytes:
        if at != "m2" or who == 1:
            return data
        value = json.loads(data)
        value["keys"][1] = forged
        return canonical(value)

    with pytest.raises(Aborted, match=r"secagg\.peer"):
        play(consortium, offer, vectors(4, 10), hook)


def test_attack_ephemeral_key_replaced(consortium: Consortium) -> None:
    import base64

    def hook(at: str, who: int, data: bytes) -> bytes:
        if at != "m2" or who == 1:
            return data
        value = json.loads(data)
        value["keys"][1]["public"] = base64.b64encode(hybrid.HybridKey().public).decode()
        return canonical(value)

    with pytest.raises(Aborted, match=r"secagg\.identity"):
        play(consortium, consortium.offer(4, 3, 10), vectors(4, 10), hook)


def test_attack_single_survivor_named(consortium: Consortium) -> None:
    def hook(at: str, who: int, data: bytes) -> bytes:
        if at != "m6":
            return data
        value = json.loads(data)
        value["survivors"] = value["survivors"][:1]
        return canonical(value)

    with pytest.raises(Aborted, match=r"secagg\.survivors"):
        play(consortium, consortium.offer(4, 3, 10), vectors(4, 10), hook)


def test_attack_understated_n(consortium: Consortium) -> None:
    """A cohort of 4 in M0, 6 certified sites in M2."""
    offer = consortium.offer(4, 3, 10)
    more = [json.loads(SiteSession(consortium.offer(6, 5, 10), index=i, n_c=1, signer=consortium.signers[i],
                                   check_certificate=consortium.check, journal=Journal()).m1()) for i in (4, 5)]

    def hook(at: str, who: int, data: bytes) -> bytes:
        if at != "m2":
            return data
        value = json.loads(data)
        value["keys"] += more
        return canonical(value)

    with pytest.raises(Aborted, match=r"secagg\.key_list"):
        play(consortium, offer, vectors(4, 10), hook)


@pytest.mark.parametrize(("n", "t"), [(2, 2), (4, 2), (4, 5), (6, 4)])
def test_attack_low_threshold_or_small_cohort(consortium: Consortium, n: int, t: int) -> None:
    with pytest.raises(Refused, match=r"secagg\.(cohort|threshold)"):
        consortium.sites(consortium.offer(n, t, 10))


def test_attack_m4_redelivered_with_another_body_gives_no_second_y(consortium: Consortium) -> None:
    offer = consortium.offer(3, 3, 10)
    sites, captured = consortium.sites(offer), {}
    from privacy.secagg.coordinator import CoordinatorSession

    c = CoordinatorSession(offer, consortium.check)
    for u, s in enumerate(sites):
        c.take_m1(u, s.m1())
    m2 = c.m2()
    for u, s in enumerate(sites):
        c.take_m3(u, s.m3(m2))
    m4 = c.m4()
    x = np.arange(10, dtype=np.uint32)
    captured["first"] = sites[0].m5(m4[0], x)[0]
    assert sites[0].m5(m4[0], np.zeros(10, np.uint32))[0] == captured["first"], "identical bytes get the stored reply"
    with pytest.raises(Aborted):
        sites[0].m5(m4[1], np.zeros(10, np.uint32))
    with pytest.raises(Aborted):
        sites[0].m9(b"{}")


def test_attack_ciphertexts_swapped(consortium: Consortium) -> None:
    def hook(at: str, who: int, data: bytes) -> bytes:
        if (at, who) != ("m4", 0):
            return data
        value = json.loads(data)
        (a, x), (b, y) = value["inbound"][0], value["inbound"][1]
        value["inbound"][:2] = [[a, y], [b, x]]
        return canonical(value)

    with pytest.raises(Aborted, match=r"secagg\.inbound"):
        play(consortium, consortium.offer(4, 3, 10), vectors(4, 10), hook)


def test_attack_forged_share_never_gives_a_wrong_sum(consortium: Consortium) -> None:
    """One site of four releases a wrong, correctly signed share: another t-subset gives the committed secret."""
    import privacy.secagg.site as site_module
    from privacy.secagg.coordinator import CoordinatorSession

    offer, xs = consortium.offer(4, 3, 100), vectors(4, 100)
    sites, c = consortium.sites(offer), CoordinatorSession(offer, consortium.check)
    for u, s in enumerate(sites):
        c.take_m1(u, s.m1())
    m2 = c.m2()
    for u, s in enumerate(sites):
        c.take_m3(u, s.m3(m2))
    m4 = c.m4()
    for u, s in enumerate(sites):
        body, y = s.m5(m4[u], xs[u].copy())
        c.take_m5(u, body, y)
    m6 = c.m6()
    sites[0]._held = {v: bytes(site_module.SECRET) + h[site_module.SECRET:] for v, h in sites[0]._held.items()}
    for u, s in enumerate(sites):
        c.take_m9(u, s.m9(m6))
    assert np.array_equal(c.unmask(), np.sum(xs, axis=0, dtype=np.uint32))


def test_low_order_x25519_key_aborts() -> None:
    with pytest.raises(Aborted, match=r"secagg\.ciphertext"):
        hybrid.seal(hybrid.HybridKey().public[:1184] + bytes(32), b"x", b"info")


def test_tampered_mlkem_ciphertext_aborts() -> None:
    key = hybrid.HybridKey()
    sealed = bytearray(hybrid.seal(key.public, b"secret", b"info"))
    for at in (0, 500, 1100, len(sealed) - 1):
        bad = bytearray(sealed)
        bad[at] ^= 1
        with pytest.raises(Aborted, match=r"secagg\.ciphertext"):
            key.open(bytes(bad), b"info")
    assert key.open(bytes(sealed), b"info") == b"secret"


def test_attack_one_organisation_fills_the_cohort_with_renewals(tmp_path: Path) -> None:
    """One victim and three certificates of one key: without the check the sum is the victim's vector plus known ones."""
    small = Consortium(tmp_path, 2)
    renewed = []
    for _ in range(2):
        ca.issue(tmp_path / "ca", (tmp_path / "site1" / "request.json").read_bytes(), Role.SITE)
        renewed.append(FileSigner(tmp_path / "site1" / "sign.key", tmp_path / "ca" / "issued" / "site1" / "sign.pem"))
    small.signers += renewed
    assert len({s.fingerprint for s in small.signers}) == 4
    for names in ((0, 1, 2, 3), (0, 1, 1, 1)):  # invented names, and the certificate's own
        cohort = tuple(tr.Member(index=i, name=f"site{k}", certificate=small.signers[i].fingerprint)
                       for i, k in enumerate(names))
        with pytest.raises(Aborted, match=r"secagg\.peer"):
            play(small, small.offer(4, 3, 5, cohort=cohort), vectors(4, 5))


def test_low_order_key_is_its_senders_fault(consortium: Consortium) -> None:
    """The coordinator refuses it from its sender, so that honest sites don't abort and get the blame."""
    from privacy.secagg.coordinator import CoordinatorSession
    from privacy.secagg.messages import M1, dump, load

    offer = consortium.offer(4, 3, 10)
    sites, c = consortium.sites(offer), CoordinatorSession(offer, consortium.check)
    m1 = load(M1, sites[3].m1())
    bad = m1.public[:1184] + bytes(32)
    forged = m1.model_copy(update={"public": bad, "signature": consortium.signers[3].sign(tr.signed_m1(offer.ctx, 3, bad))})
    with pytest.raises(Aborted, match=r"secagg\.ciphertext"):
        c.take_m1(3, dump(forged))


def test_any_failure_ends_the_session_for_good(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory right after masking: the same M4 must not mask the vector a second time."""
    import privacy.secagg.site as module
    from privacy.secagg.coordinator import CoordinatorSession

    offer = consortium.offer(3, 3, 10)
    sites, c = consortium.sites(offer), CoordinatorSession(offer, consortium.check)
    for u, s in enumerate(sites):
        c.take_m1(u, s.m1())
    m2 = c.m2()
    for u, s in enumerate(sites):
        c.take_m3(u, s.m3(m2))
    m4, real = c.m4(), module.prg.add_masks

    def full(vector: np.ndarray, masks: object) -> None:
        real(vector, masks)  # type: ignore[arg-type]
        raise MemoryError

    with monkeypatch.context() as m:
        m.setattr(module.prg, "add_masks", full)
        with pytest.raises(Aborted, match=r"secagg\.internal"):
            sites[0].m5(m4[0], np.zeros(10, np.uint32))
    with pytest.raises(Aborted):
        sites[0].m5(m4[0], np.zeros(10, np.uint32))
    assert not {"_b", "_key", "_pair", "_held"} & sites[0].__dict__.keys(), "secrets are dropped"


def test_no_revocation_list_is_no_trust(tmp_path: Path) -> None:
    Consortium(tmp_path, 1)
    (tmp_path / "ca" / "crl-site.pem").unlink()
    with pytest.raises(Refused, match=r"identity\.crl_missing"):
        certificate_check(TrustStore.load(tmp_path / "ca"))


def test_a_message_has_one_encoding(consortium: Consortium) -> None:
    def hook(at: str, who: int, data: bytes) -> bytes:
        return json.dumps(json.loads(data), indent=1).encode() if (at, who) == ("m2", 0) else data

    with pytest.raises(Aborted, match=r"secagg\.message"):
        play(consortium, consortium.offer(3, 3, 10), vectors(3, 10), hook)
