"""M5: the masked vector. What a site masks and signs, and the coordinator's checks before it adds."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from scipy.stats import chi2
from secagg_kit import DIM, Change, Scene, added, edit, left_out, vectors

from privacy.errors import Aborted, Refused
from privacy.identity import verify_signature
from privacy.secagg import prg
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M5, Ring, dump, load
from simulations.adversary import Consortium, play


def to_m4(scene: Scene) -> dict[int, bytes]:
    for u, site in enumerate(scene.sites):
        scene.coordinator.take_m1(u, site.m1())
    m2 = scene.coordinator.m2()
    for u, site in enumerate(scene.sites):
        scene.coordinator.take_m3(u, site.m3(m2))
    return scene.coordinator.m4()


@pytest.mark.parametrize(("change", "code"), [
    (edit(lambda v: v.update(index=2)), "secagg.sender"),
    (edit(lambda v: v.update(y_hash="0" * 64)), "secagg.vector"),
    (lambda s, data: dump(load(M5, data).model_copy(update={"signature": bytes(64)})), "identity.signature"),
    (lambda s, data: dump(s.m5(1, bytes.fromhex(load(M5, data).y_hash), bytes(32))), "identity.signature"),
    (edit(lambda v: v.update(y_hash=v["y_hash"].upper())), "secagg.message"),
], ids=["another's", "hash", "signature", "another view", "spelling"])
def test_m5_of_one_site_is_left_out(consortium: Consortium, change: Change, code: str) -> None:
    left_out(consortium, "m5", 1, change, code)


@pytest.mark.parametrize("y", [np.zeros(DIM + 1, np.uint32), np.zeros(1, np.uint32), np.zeros((1, DIM), np.uint32),
                               np.zeros(DIM, np.uint16), np.zeros(DIM, np.int32), np.zeros(DIM, ">u4")],
                         ids=["long", "one value", "matrix", "narrow", "signed", "big-endian"])
def test_vector_of_another_form_is_left_out(consortium: Consortium, y: Ring) -> None:
    """Its hash and signature are right."""
    s = Scene.of(consortium)
    m4, x = to_m4(s), vectors(s.offer)
    with pytest.raises(Aborted, match=r"secagg\.dimension"):
        s.coordinator.take_m5(3, dump(s.m5(3, hashlib.sha256(y.tobytes()).digest())), y)
    for u in range(3):
        s.coordinator.take_m5(u, *s.sites[u].m5(m4[u], x[u]))
    s.coordinator.m6()
    assert s.coordinator.survivors == (0, 1, 2)


def test_m5_twice_late_or_from_outside_is_refused(consortium: Consortium) -> None:
    s = Scene.of(consortium, 7, 5)
    x, lost = vectors(s.offer), 6
    for u in range(7):
        s.coordinator.take_m1(u, s.sites[u].m1())
    m2 = s.coordinator.m2()
    m3 = [site.m3(m2) for site in s.sites]
    for u in range(7):
        if u != lost:
            s.coordinator.take_m3(u, m3[u])
    m4 = s.coordinator.m4()
    made = {u: s.sites[u].m5(m4[u], x[u]) for u in m4}
    zero = np.zeros(DIM, np.uint32)
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        s.coordinator.take_m5(lost, dump(s.m5(lost, hashlib.sha256(zero.tobytes()).digest())), zero)
    for u in range(5):
        s.coordinator.take_m5(u, *made[u])
    before = s.coordinator.total.copy()
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        s.coordinator.take_m5(0, *made[0])
    s.coordinator.m6()
    with pytest.raises(Aborted, match=r"secagg\.sender"):
        s.coordinator.take_m5(5, *made[5])
    assert np.array_equal(s.coordinator.total, before)
    assert s.coordinator._m5[0].y_hash == hashlib.sha256(made[0][1].tobytes()).hexdigest() == s.sites[0].masked


@pytest.mark.parametrize("x", [np.zeros(DIM + 1, np.uint32), np.zeros((1, DIM), np.uint32), np.zeros(DIM, np.uint16),
                               np.zeros(DIM, np.int32), np.zeros(0, np.uint32)],
                         ids=["long", "matrix", "narrow", "signed", "empty"])
def test_site_masks_only_what_the_offer_says(consortium: Consortium, x: Ring) -> None:
    """Refused before anything is recorded as spent."""
    s = Scene.of(consortium)
    m4, before = to_m4(s), x.copy()
    with pytest.raises(Aborted, match=r"secagg\.dimension"):
        s.sites[0].m5(m4[0], x)
    assert np.array_equal(x, before) and s.sites[0]._journal.spends == []  # type: ignore[attr-defined]


def test_masks_are_those_of_the_specification(consortium: Consortium) -> None:
    """y = x + PRG(b_u; T2, u) +- PRG(s_uv; T2, u, v): the lower index adds, the higher subtracts; y is signed with T2."""
    s = Scene.of(consortium)
    m4, xs, own = to_m4(s), vectors(s.offer), [site._secrets for site in s.sites]
    for u, site in enumerate(s.sites):
        x, secrets = xs[u].copy(), own[u]
        data, y = site.m5(m4[u], xs[u])
        assert y is xs[u] and site.view == s.coordinator.view and secrets is not None
        prg.add_masks(x, [(prg.derive_key(secrets.b, tr.self_mask_info(site.view, u)), 1)])
        for v in {0, 1, 2, 3} - {u}:
            pair = own[min(u, v)].pairs[max(u, v)]  # type: ignore[union-attr]
            key = prg.derive_key(pair, tr.pair_mask_info(site.view, min(u, v), max(u, v)))
            prg.add_masks(x, [(key, 1 if u < v else -1)])
        assert np.array_equal(y, x)
        y_hash = hashlib.sha256(y.tobytes()).digest()
        verify_signature(consortium.signers[u].certificate, load(M5, data).signature, tr.signed_m5(site.view, u, y_hash))


def test_spent_is_durable_before_the_vector_is_masked(consortium: Consortium) -> None:
    """A journal that refuses: the update stays as it was, and the session is over."""
    class Full:
        def spent(self, run: str, slot: tuple[int, int, int], adapter: str) -> None:
            assert (run, slot, adapter) == ("ab" * 16, (1, 0, 1), "1" * 64)
            raise Refused("journal.write_failed", "Full.", "Make room.")

    s = Scene.of(consortium)
    m4, x = to_m4(s), np.arange(DIM, dtype=np.uint32)
    s.sites[0]._journal = Full()  # type: ignore[assignment]
    with pytest.raises(Aborted, match=r"journal\.write_failed"):
        s.sites[0].m5(m4[0], x)
    assert np.array_equal(x, np.arange(DIM)) and s.sites[0]._secrets is None
    s.sites[1].m5(m4[1], x)
    assert s.sites[1]._journal.spends == [("ab" * 16, (1, 0, 1), "1" * 64)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("ring", "bits"), [(32, 24), (16, 12)])
@pytest.mark.parametrize("n", [3, 5])
def test_masked_vector_is_uniform(consortium: Consortium, ring: int, bits: int, n: int) -> None:
    """Chi-square over the values of each byte of a word, of fixed vectors (zeros, ones, a ramp, all bits) and of the
    difference of one update's maskings in two attempts (no mask is used twice). Keys are the sessions' own, so a sound
    mask fails once in 1e8 runs: alpha = 1e-8 over all bytes."""
    dim = 50_000
    offers = [consortium.offer(n, n, dim, ring=ring, bits=bits, attempt=attempt) for attempt in (0, 1)]
    dtype, zero = offers[0].encoding.dtype, np.zeros(dim, offers[0].encoding.dtype)
    xs = [zero, zero + 1, np.arange(dim).astype(dtype), ~zero, zero][:n]
    first, second = (play(consortium, offer, xs) for offer in offers)
    assert first.total is not None and np.array_equal(first.total, added(xs, range(n)))
    looked_at = [y for played in (first, second) for y in played.masked.values()]
    looked_at += [first.masked[u] - second.masked[u] for u in range(n)]
    looked_at += [first.masked[u] - first.masked[v] for u in range(n) for v in range(u)]
    limit = chi2.isf(1e-8 / (len(looked_at) * ring // 8), 255)
    for y in looked_at:
        for byte in y.view(np.uint8).reshape(dim, -1).T:
            counts = np.bincount(byte, minlength=256)
            assert ((counts - dim / 256) ** 2 / (dim / 256)).sum() < limit
