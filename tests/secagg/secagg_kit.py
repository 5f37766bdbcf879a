"""What the tests of secure aggregation share: vectors, edited and newly signed messages, and what must come of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding as Pem

from privacy.canonical import canonical
from privacy.identity import load_certificate, load_key, subject
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.messages import M1, M3, M5, M7, Ring, load
from privacy.secagg.site import SiteSession
from simulations.adversary import Consortium, Hook, Played, play

DIM = 40


def vectors(offer: tr.Offer, seed: int = 0) -> list[Ring]:
    """Any elements of the ring: sums wrap."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2**offer.ring, offer.dim, dtype=offer.encoding.dtype) for _ in offer.cohort]


def added(xs: Sequence[Ring], members: Sequence[int]) -> Ring:
    return np.sum([xs[u] for u in members], axis=0, dtype=xs[0].dtype)


@dataclass
class Scene:
    """Four sites with threshold 3: the round goes on when one falls out."""

    consortium: Consortium
    offer: tr.Offer
    sites: list[SiteSession]
    coordinator: CoordinatorSession

    @classmethod
    def of(cls, consortium: Consortium, n: int = 4, t: int = 3, **changes: Any) -> Scene:
        offer = consortium.offer(n, t, DIM, **changes)
        return cls(offer=offer, consortium=consortium, sites=consortium.sites(offer),
                   coordinator=CoordinatorSession(offer, consortium.check))

    def play(self, hook: Hook) -> Played:
        return play(self.consortium, self.offer, vectors(self.offer), hook, sites=dict(enumerate(self.sites)),
                    coordinator=self.coordinator)

    def pem(self, u: int) -> bytes:
        return self.consortium.signers[u].certificate.public_bytes(Pem.PEM)

    def m1(self, u: int, public: bytes, **changes: Any) -> M1:
        """As site u would sign it."""
        signed = tr.signed_m1(self.offer.ctx, u, public)
        fields = {"index": u, "certificate": self.pem(u), "public": public,
                  "signature": self.consortium.signers[u].sign(signed)}
        return M1.model_validate(fields | changes)

    def m3(self, u: int, data: bytes, **body: Any) -> M3:
        """Site u's M3 with another body, signed by it."""
        m3 = load(M3, data)
        changed = m3.body.model_copy(update=body)
        signed = tr.signed_m3(self.coordinator._t1, changed.to_bytes())
        return m3.model_copy(update={"body": changed, "signature": self.consortium.signers[u].sign(signed)})

    def m5(self, u: int, y_hash: bytes, view: bytes | None = None) -> M5:
        signed = tr.signed_m5(self.coordinator.view if view is None else view, u, y_hash)
        return M5(index=u, y_hash=y_hash.hex(), signature=self.consortium.signers[u].sign(signed))

    def m7(self, u: int, transcript: bytes | None = None) -> M7:
        signed = tr.signed_m7(self.coordinator.transcript if transcript is None else transcript, u)
        return M7(index=u, signature=self.consortium.signers[u].sign(signed))


Change = Callable[[Scene, bytes], bytes]


def edit(change: Callable[[Any], object]) -> Change:
    """`change` alters the message's JSON in place."""
    def changed(scene: Scene, data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return canonical(value)

    return changed


def at(scene: Scene, message: str, site: int, change: Change) -> Hook:
    """A hook that changes one message of or to one site."""
    return lambda m, u, data: change(scene, data) if (m, u) == (message, site) else data


def left_out(consortium: Consortium, message: str, site: int, change: Change, code: str, **offer: Any) -> None:
    """The changed message is refused with that code, once; its site falls out for good, and the others' sum is exact."""
    scene = Scene.of(consortium, **offer)
    played = scene.play(at(scene, message, site, change))
    assert played.refused == {(message, site): code}
    n = len(scene.sites)
    survivors = [u for u in range(n) if u != site or int(message[1:]) >= 6]
    assert played.coordinator.survivors == tuple(survivors)
    assert played.total is not None and np.array_equal(played.total, added(vectors(scene.offer), survivors))
    if message in ("m2", "m4", "m6", "m8"):
        assert scene.sites[site]._secrets is None
        assert (f"m{int(message[1:]) + 1}", site) not in played.sent


def flipped(data: bytes, at_byte: int = 0) -> bytes:
    out = bytearray(data)
    out[at_byte] ^= 1
    return bytes(out)


def forged_certificate(consortium: Consortium, public: Any, name: str, organisation: str) -> x509.Certificate:
    """Signed with the CA's key although `ca.issue` never would."""
    ca = consortium.folder / "ca"
    issuer, now = load_certificate((ca / "issuing-site.pem").read_bytes()), datetime.now(UTC)
    builder = (x509.CertificateBuilder().subject_name(subject(name, organisation)).issuer_name(issuer.subject)
               .public_key(public).serial_number(x509.random_serial_number())
               .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
               .add_extension(x509.BasicConstraints(False, None), True)
               .add_extension(x509.KeyUsage(True, False, False, False, False, False, False, False, False), True))
    key = load_key(ca / "keys" / "issuing-site.key")
    return builder.sign(key, hashes.SHA256())


