"""A whole session, honest and with each message forged in turn; what this version must already refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from harness import Consortium, Journal, play

from privacy.errors import Aborted, ConsiloError, Refused
from privacy.secagg import hybrid
from privacy.secagg import transcript as tr
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
        return json.dumps(value).encode()

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
    outsider = SiteSession(consortium.offer(4, 3, 10, cohort=tuple(
        tr.Member(index=i, certificate=consortium.signers[5 if i == 1 else i].fingerprint) for i in range(4))),
        index=1, n_c=1, signer=consortium.signers[5], check_certificate=consortium.check, journal=Journal())
    forged = json.loads(outsider.m1())

    def hook(at: str, who: int, data: bytes) -> bytes:
        if at != "m2" or who == 1:
            return data
        value = json.loads(data)
        value["keys"][1] = forged
        return json.dumps(value).encode()

    with pytest.raises(Aborted, match=r"secagg\.peer"):
        play(consortium, offer, vectors(4, 10), hook)


def test_attack_ephemeral_key_replaced(consortium: Consortium) -> None:
    import base64

    def hook(at: str, who: int, data: bytes) -> bytes:
        if at != "m2" or who == 1:
            return data
        value = json.loads(data)
        value["keys"][1]["public"] = base64.b64encode(hybrid.HybridKey().public).decode()
        return json.dumps(value).encode()

    with pytest.raises(Aborted, match=r"secagg\.identity"):
        play(consortium, consortium.offer(4, 3, 10), vectors(4, 10), hook)


def test_attack_single_survivor_named(consortium: Consortium) -> None:
    def hook(at: str, who: int, data: bytes) -> bytes:
        if at != "m6":
            return data
        value = json.loads(data)
        value["survivors"] = value["survivors"][:1]
        return json.dumps(value).encode()

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
        return json.dumps(value).encode()

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
        return json.dumps(value).encode()

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
