"""The coordinator's side of one secure sum: relays, adds masked vectors as they arrive, unmasks the total.

It runs the sites' own checks first, so that one bad site is named instead of stopping the honest ones. It never holds
an unmasked vector of a site. A reconstruction is used only if it matches its commitment: a forged or mis-dealt share
never gives a wrong sum.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
from cryptography.x509 import Certificate
from numpy.typing import NDArray

from privacy.errors import Aborted
from privacy.identity import Peer, verify_signature
from privacy.secagg import prg, shamir
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1, M2, M3, M4, M5, M6, M9, M3Body, dump, load
from privacy.secagg.peers import CheckCertificate, check_distinct, check_key
from privacy.secagg.site import SECRET

MAX_SUBSETS = 200  # random sets of t holders tried before the round is void


class CoordinatorSession:
    """One attempt of one round. Methods raise Aborted; `take_*` about one site, so that the caller can name it."""

    def __init__(self, offer: tr.Offer, check_certificate: CheckCertificate) -> None:
        self.offer, self._check_certificate = offer, check_certificate
        self._n = len(offer.cohort)
        self._keys: dict[int, M1] = {}
        self._peers: list[Peer] = []
        self._certificates: dict[int, Certificate] = {}
        self._m3: dict[int, M3] = {}
        self._m5: dict[int, M5] = {}
        self._shares: dict[int, M9] = {}
        self.total = np.zeros(offer.dim, np.uint32)
        self.transcript = b""

    def take_m1(self, index: int, data: bytes) -> None:
        key = load(M1, data)
        self._sender(index, key.index, self._keys)
        peer = check_key(self.offer, key, self._check_certificate)
        if any(key.public == other.public for other in self._keys.values()):
            raise Aborted("secagg.peer", "Two sites sent one key.", "The round is void.")
        check_distinct([*self._peers, peer])
        self._peers.append(peer)
        self._certificates[index], self._keys[index] = peer.certificate, key

    def m2(self) -> bytes:
        self._complete(self._keys)
        keys = tuple(self._keys[u] for u in range(self._n))
        self._t1 = tr.t1(self.offer.ctx, [(k.index, k.public) for k in keys])
        return dump(M2(keys=keys))

    def take_m3(self, index: int, data: bytes) -> None:
        m3 = load(M3, data)
        self._sender(index, m3.body.index, self._m3)
        verify_signature(self._certificates[index], m3.signature, tr.signed_m3(self._t1, m3.body.to_bytes()))
        peers = [v for v in range(self._n) if v != index]
        signed, sent = m3.body.ciphertexts, m3.ciphertexts
        if [v for v, _ in signed] != peers or [w for w, _ in m3.body.com_s] != [v for v in peers if v > index]:
            raise Aborted("secagg.share_list", "A site's share list is not complete.", "The round is void.")
        if tuple((v, hashlib.sha256(ct).digest()) for v, ct in sent) != signed:
            raise Aborted("secagg.inbound", "A site's ciphertexts are not the ones that it signed.", "The round is void.")
        self._m3[index] = m3

    def m4(self) -> dict[int, bytes]:
        """The message for each site."""
        self._complete(self._m3)
        bodies: tuple[tuple[M3Body, bytes], ...] = tuple((self._m3[u].body, self._m3[u].signature) for u in range(self._n))
        self._t2 = tr.t2(self._t1, [(b.index, b.to_bytes()) for b, _ in bodies])
        sent = {u: dict(self._m3[u].ciphertexts) for u in range(self._n)}
        out = {u: dump(M4(bodies=bodies, inbound=tuple((v, sent[v][u]) for v in range(self._n) if v != u)))
               for u in range(self._n)}
        for u, m3 in self._m3.items():  # relayed; only the commitments are needed from here on
            self._m3[u] = m3.model_copy(update={"ciphertexts": ()})
        return out

    def take_m5(self, index: int, data: bytes, y: NDArray[np.uint32]) -> None:
        """Verify, then add. Memory stays at one vector however many sites there are."""
        m5 = load(M5, data)
        self._sender(index, m5.index, self._m5)
        if y.dtype != np.uint32 or y.shape != (self.offer.dim,):
            raise Aborted("secagg.dimension", "A masked vector has the wrong shape.", "The round is void.")
        y_hash = hashlib.sha256(np.ascontiguousarray(y).data).digest()
        if y_hash.hex() != m5.y_hash:
            raise Aborted("secagg.vector", "A masked vector is not the one that was signed.", "The round is void.")
        verify_signature(self._certificates[index], m5.signature, tr.signed_m5(self._t2, index, y_hash))
        self._m5[index] = m5
        np.add(self.total, y, out=self.total)

    def y_hash(self, index: int) -> str:
        """Hex SHA-256 of a site's masked vector, once taken."""
        return self._m5[index].y_hash

    def m6(self) -> bytes:
        self._complete(self._m5)
        survivors = tuple(self._m5[u] for u in range(self._n))
        self.transcript = tr.t3(self._t2, [(m.index, bytes.fromhex(m.y_hash)) for m in survivors])
        return dump(M6(survivors=survivors))

    def take_m9(self, index: int, data: bytes) -> None:
        m9 = load(M9, data)
        self._sender(index, m9.index, self._shares)
        if [v for v, _ in m9.shares] != list(range(self._n)) or any(len(s) != SECRET for _, s in m9.shares):
            raise Aborted("secagg.shares", "A site's unmasking shares are not complete.", "The round is void.")
        joined = b"".join(s for _, s in m9.shares)
        verify_signature(self._certificates[index], m9.signature, tr.signed_m9(self.transcript, index, joined))
        self._shares[index] = m9

    def unmask(self) -> NDArray[np.uint32]:
        """The sum of all encoded updates mod 2^32; pair masks have cancelled. At most one call."""
        if len(self._shares) < self.offer.threshold:
            raise Aborted("secagg.too_few", "Fewer sites than the threshold released shares.", "The round is void.")
        secrets_b = self._reconstruct({v + 1: b"".join(s for _, s in m.shares) for v, m in self._shares.items()})
        prg.add_masks(self.total, [(prg.derive_key(b, tr.self_mask_info(self._t2, u)), -1)
                                   for u, b in enumerate(secrets_b)])
        self._shares.clear()
        return self.total

    def _reconstruct(self, shares: dict[int, bytes]) -> list[bytes]:
        """Every b_u, from t holders' shares of all of them; other holders are tried for those that don't fit."""
        found: dict[int, bytes] = {}
        for _ in range(MAX_SUBSETS):
            points = secrets.SystemRandom().sample(sorted(shares), self.offer.threshold)
            joined = shamir.combine({x: shares[x] for x in points})
            for u in range(self._n):
                b = joined[u * SECRET:(u + 1) * SECRET]
                if u not in found and tr.commit_b(self._t1, u, b) == self._m3[u].body.com_b:
                    found[u] = b
            if len(found) == self._n:
                return [found[u] for u in range(self._n)]
        raise Aborted("secagg.forged_share", "No set of shares gives the committed secret.", "The round is void.")

    def _sender(self, index: int, claimed: int, seen: dict[int, M1] | dict[int, M3] | dict[int, M5] | dict[int, M9]) -> None:
        if claimed != index or index in seen:
            raise Aborted("secagg.sender", "A message names another sender, or came twice.", "The round is void.")

    def _complete(self, got: dict[int, M1] | dict[int, M3] | dict[int, M5]) -> None:
        if len(got) != self._n:
            raise Aborted("secagg.dropout", f"{self._n - len(got)} of {self._n} sites dropped out.",
                          "The round is void; a new attempt needs a fresh update and a fresh charge.")
