"""A site's side of one secure sum. One method per inbound message, in order, each at most once.

`SiteSession` aborts for good on the first thing that is not exactly as specified: its secrets are dropped and every
later call raises. A byte-identical repetition of the last message gives the stored reply; a different one aborts.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding as Pem
from numpy.typing import NDArray

from privacy.errors import Aborted, ConsiloError
from privacy.identity import Signer, verify_signature
from privacy.secagg import hybrid, prg, shamir
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1, M2, M3, M4, M5, M6, M9, M3Body, dump, load
from privacy.secagg.peers import CheckCertificate, check_keys

SECRET = 32


class SpentJournal(Protocol):
    """Durable memory of a site: each method returns only after fsync."""

    def started(self, run: str, round_no: int, attempt: int) -> None: ...
    def spent(self, run: str, round_no: int, attempt: int, update: bytes) -> None: ...


class SiteSession:
    """State machine of site `index`. `offer` is the M0 that the site itself derived from its contract.

    check_certificate: PEM -> verified certificate, raising on anything else (chain, role, validity, revocation).
    """

    def __init__(self, offer: tr.Offer, *, index: int, n_c: int, signer: Signer, check_certificate: CheckCertificate,
                 journal: SpentJournal) -> None:
        self.offer, self.index, self.signer = offer, index, signer
        self._check_certificate, self._journal = check_certificate, journal
        self._next = "m1"
        self._last: tuple[str, bytes, bytes] | None = None  # stage, digest of what came in, reply
        self._n = len(offer.cohort)
        tr.check_cohort(self._n, offer.threshold, n_c)
        own = offer.cohort[index].certificate if index < self._n else ""
        if own != signer.fingerprint or len({m.certificate for m in offer.cohort}) != self._n:
            raise _abort("cohort", "The cohort does not list this site once under its own certificate.")
        self.transcript, self.masked = b"", ""

    def m1(self) -> bytes:
        """Answer to M0. The journal holds (run, round, attempt) durably before the key leaves."""
        return self._step("m1", "m3", b"", self._m1)

    def m3(self, m2: bytes) -> bytes:
        return self._step("m3", "m5", m2, lambda: self._m3(load(M2, m2)))

    def m5(self, m4: bytes, encoded: NDArray[np.uint32]) -> tuple[bytes, NDArray[np.uint32]]:
        """Masks `encoded` (uint32, shape (dim,)) in place; it is y afterwards and must not be used for anything else."""
        if self._next == "m5" and (encoded.dtype != np.uint32 or encoded.shape != (self.offer.dim,)):
            raise self._drop(_abort("dimension", "The encoded update has another shape than the offer."))
        body = self._step("m5", "m9", m4, lambda: self._m5(load(M4, m4), encoded))
        return body, encoded

    def m9(self, m6: bytes) -> bytes:
        return self._step("m9", "done", m6, lambda: self._m9(load(M6, m6)))

    def _step(self, stage: str, following: str, inbound: bytes, work: Callable[[], bytes]) -> bytes:
        key = hashlib.sha256(inbound).digest()
        if self._last and self._last[0] == stage and self._last[1] == key:
            return self._last[2]
        if self._next != stage:
            raise self._drop(_abort("stage", f"Message for {stage} in a session that waits for {self._next}."))
        try:
            reply = work()
        except Aborted as e:
            raise self._drop(e) from e
        except ConsiloError as e:
            raise self._drop(_abort("identity", "A signature or certificate was refused.")) from e
        except BaseException as e:  # a session that failed anywhere must never go on
            raise self._drop(_abort("internal", f"The session failed with {type(e).__name__}.")) from e
        self._next, self._last = following, (stage, key, reply)
        return reply

    def _drop(self, error: Aborted) -> Aborted:
        self._next, self._last = "aborted", None
        self._forget()
        return error

    def _forget(self) -> None:
        """Python can't overwrite bytes; the secrets are dropped."""
        for name in ("_b", "_key", "_pair", "_held"):
            self.__dict__.pop(name, None)

    def _m1(self) -> bytes:
        o = self.offer
        self._journal.started(o.run, o.round, o.attempt)
        self._key = hybrid.HybridKey()
        return dump(M1(index=self.index, certificate=self.signer.certificate.public_bytes(Pem.PEM), public=self._key.public,
                       signature=self.signer.sign(tr.signed_m1(o.ctx, self.index, self._key.public))))

    def _m3(self, m2: M2) -> bytes:
        o, u = self.offer, self.index
        self._peers = check_keys(o, m2.keys, self._check_certificate)
        if m2.keys[u].public != self._key.public:
            raise _abort("own_entry", "The key list holds another key for this site.")
        self._t1 = tr.t1(o.ctx, [(k.index, k.public) for k in m2.keys])
        points = [k.index + 1 for k in m2.keys]
        self._b = secrets.token_bytes(SECRET)
        self._pair = {w: secrets.token_bytes(SECRET) for w in range(u + 1, self._n)}
        # every secret is dealt to everyone: b_u first, then s_uw in order of w
        dealt = shamir.split(self._b + b"".join(self._pair.values()), threshold=o.threshold, points=points)
        ciphertexts = []
        for v in range(self._n):
            if v != u:
                plain = dealt[v + 1] + self._pair.get(v, b"")
                ciphertexts.append((v, hybrid.seal(m2.keys[v].public, plain, tr.share_info(self._t1, u, v))))
        body = M3Body(index=u, com_b=tr.commit_b(self._t1, u, self._b),
                      com_s=tuple((w, tr.commit_s(self._t1, u, w, s)) for w, s in self._pair.items()),
                      ciphertexts=tuple((v, hashlib.sha256(ct).digest()) for v, ct in ciphertexts))
        self._body, self._held = body, {u: dealt[u + 1]}
        return dump(M3(body=body, signature=self.signer.sign(tr.signed_m3(self._t1, body.to_bytes())),
                       ciphertexts=tuple(ciphertexts)))

    def _m5(self, m4: M4, encoded: NDArray[np.uint32]) -> bytes:
        o, u = self.offer, self.index
        if [b.index for b, _ in m4.bodies] != list(range(self._n)) or m4.bodies[u][0] != self._body:
            raise _abort("share_list", "The share list is not that of the whole cohort, with this site's own entry.")
        for body, signature in m4.bodies:
            verify_signature(self._peers[body.index], signature, tr.signed_m3(self._t1, body.to_bytes()))
        if [v for v, _ in m4.inbound] != [v for v in range(self._n) if v != u]:
            raise _abort("inbound", "There is not exactly one ciphertext from each peer.")
        pairs = dict(self._pair)
        for v, ciphertext in m4.inbound:
            body = m4.bodies[v][0]
            if dict(body.ciphertexts).get(u) != hashlib.sha256(ciphertext).digest():
                raise _abort("inbound", "A ciphertext is not the one that its sender signed.")
            plain = self._key.open(ciphertext, tr.share_info(self._t1, v, u))
            length = SECRET * (self._n - v)  # b_v and s_vw for every w > v
            if len(plain) != length + (SECRET if u > v else 0):
                raise _abort("plaintext", "A share message has the wrong length.")
            self._held[v] = plain[:length]
            if u > v:
                pairs[v] = plain[length:]
                if dict(body.com_s).get(u) != tr.commit_s(self._t1, v, u, pairs[v]):
                    raise _abort("commitment", "A pair secret is not the committed one.")
        self._t2 = tr.t2(self._t1, [(b.index, b.to_bytes()) for b, _ in m4.bodies])
        self._journal.spent(o.run, o.round, o.attempt, hashlib.sha256(encoded.tobytes()).digest())
        masks = [(prg.derive_key(self._b, tr.self_mask_info(self._t2, u)), 1)]
        for v, secret in pairs.items():
            low, high = sorted((u, v))
            masks.append((prg.derive_key(secret, tr.pair_mask_info(self._t2, low, high)), 1 if u == low else -1))
        prg.add_masks(encoded, masks)
        self._y_hash = hashlib.sha256(encoded.tobytes()).digest()
        return dump(M5(index=u, y_hash=self._y_hash.hex(),
                       signature=self.signer.sign(tr.signed_m5(self._t2, u, self._y_hash))))

    def _m9(self, m6: M6) -> bytes:
        u = self.index
        if [m.index for m in m6.survivors] != list(range(self._n)):
            raise _abort("survivors", "The survivors are not the whole cohort.")
        if m6.survivors[u].y_hash != self._y_hash.hex():
            raise _abort("own_entry", "The survivor list holds another vector for this site.")
        for m in m6.survivors:
            verify_signature(self._peers[m.index], m.signature, tr.signed_m5(self._t2, m.index, bytes.fromhex(m.y_hash)))
        self.transcript = tr.t3(self._t2, [(m.index, bytes.fromhex(m.y_hash)) for m in m6.survivors])
        self.masked = self._y_hash.hex()
        shares = tuple((v, self._held[v][:SECRET]) for v in range(self._n))  # of b_v only: never of a pair secret
        joined = b"".join(s for _, s in shares)
        reply = dump(M9(index=u, shares=shares, signature=self.signer.sign(tr.signed_m9(self.transcript, u, joined))))
        self._forget()
        return reply


def _abort(code: str, cause: str) -> Aborted:
    return Aborted(f"secagg.{code}", cause, "The round is void; a new attempt needs a fresh update.")
