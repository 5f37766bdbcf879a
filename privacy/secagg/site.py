"""A site's side of one secure sum. One method per inbound message, in order, each at most once.

`SiteSession` aborts for good on the first thing that is not exactly as specified: its secrets are dropped and every
later call raises. A byte-identical repetition of the last message gives the stored reply; a different one aborts.
Docs, with the argument for each check: docs/secure-aggregation.md.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from cryptography.hazmat.primitives.serialization import Encoding as Pem

from privacy.errors import Aborted, ConsiloError
from privacy.identity import Signer, verify_signature
from privacy.secagg import hybrid, prg, shamir
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1, M2, M3, M4, M5, M6, M7, M8, M9, M3Body, Ring, dump, load
from privacy.secagg.peers import CheckCertificate, check_keys, check_members

SECRET = 32
R = TypeVar("R")


class SpentJournal(Protocol):
    """Durable memory of a site: each method returns only after fsync."""

    def started(self, run: str, slot: tr.Slot) -> None: ...
    def spent(self, run: str, slot: tr.Slot, adapter: str) -> None: ...
    def unmasked(self, run: str, slot: tr.Slot, transcript: str) -> None: ...


@dataclass
class _Secrets:
    """What must not outlive the session. Python can't overwrite bytes; the references are dropped."""

    key: hybrid.HybridKey = field(default_factory=hybrid.HybridKey)
    b: bytes = b""
    pairs: dict[int, bytes] = field(default_factory=dict)  # s_uv by the peer's index
    held: dict[int, bytes] = field(default_factory=dict)  # dealer -> its shares for this site: of b, then of each s


class SiteSession:
    """State machine of site `index`. `offer` is the M0 that the site itself derived from its contract.

    check_certificate: PEM -> verified certificate, raising on anything else (chain, role, validity, revocation).
    `view` is T2 once M5 is made, `masked` the hex H(y), `transcript` T3 and `sites` the names of U3 once M7 is made.
    Raises Refused `secagg.cohort`, `secagg.threshold`, `secagg.survivors`; every method Aborted `secagg.*`.
    """

    def __init__(self, offer: tr.Offer, *, index: int, n_c: int, signer: Signer, check_certificate: CheckCertificate,
                 journal: SpentJournal) -> None:
        self.offer, self.index, self.signer = offer, index, signer
        self._check_certificate, self._journal = check_certificate, journal
        self._next = "m1"
        self._last: tuple[str, bytes, object] | None = None  # stage, digest of what came in, reply
        n = len(offer.cohort)
        tr.check_cohort(n, offer.threshold, offer.survivors, n_c)
        own = offer.cohort[index].certificate if index < n else ""
        if own != signer.fingerprint or len({m.certificate for m in offer.cohort}) != n:
            raise _abort("cohort", "The cohort does not list this site once under its own certificate.")
        self.view, self.masked, self.transcript = b"", "", b""
        self.sites: tuple[str, ...] = ()
        self._secrets: _Secrets | None = _Secrets()

    def m1(self) -> bytes:
        """Answer to M0. The journal holds (run, round, attempt) durably before the key leaves."""
        return self._step("m1", "m3", b"", self._m1)

    def m3(self, m2: bytes) -> bytes:
        return self._step("m3", "m5", m2, lambda own: self._m3(own, load(M2, m2)))

    def m5(self, m4: bytes, encoded: Ring) -> tuple[bytes, Ring]:
        """Masks `encoded` (of the offer's ring, shape (dim,)) in place; it is y afterwards and nothing else's.
        A repeated M4 gives the y of the first call."""
        return self._step("m5", "m7", m4, lambda own: self._m5(own, load(M4, m4), encoded))

    def m7(self, m6: bytes) -> bytes:
        return self._step("m7", "m9", m6, lambda own: self._m7(load(M6, m6)))

    def m9(self, m8: bytes) -> bytes:
        """Drops all secrets: a session releases shares once."""
        return self._step("m9", "done", m8, lambda own: self._m9(own, load(M8, m8)))

    def expire(self) -> None:
        """Past its deadline a session ends like any that aborted."""
        self._drop()

    def _step(self, stage: str, following: str, inbound: bytes, work: Callable[[_Secrets], R]) -> R:
        key = hashlib.sha256(inbound).digest()
        if self._last and self._last[:2] == (stage, key):
            return self._last[2]  # type: ignore[return-value]  # made by the same `work`
        try:
            if self._secrets is None or self._next != stage:
                raise _abort("stage", f"Message for {stage} in a session that has ended or waits for {self._next}.")
            reply = work(self._secrets)
        except Aborted:
            self._drop()
            raise
        except ConsiloError as e:
            self._drop()
            code = "identity" if e.code.startswith("identity.") else "internal"
            raise _abort(code, f"The session met {e.code}.") from e
        except Exception as e:  # a session that failed anywhere must never go on
            self._drop()
            raise _abort("internal", f"The session failed with {type(e).__name__}.") from e
        except BaseException:  # this process is being ended
            self._drop()
            raise
        self._next, self._last = following, (stage, key, reply)
        return reply

    def _drop(self) -> None:
        self._last = self._secrets = None

    def _m1(self, own: _Secrets) -> bytes:
        o, public = self.offer, own.key.public
        self._journal.started(o.run, o.slot)
        return dump(M1(index=self.index, certificate=self.signer.certificate.public_bytes(Pem.PEM), public=public,
                       signature=self.signer.sign(tr.signed_m1(o.ctx, self.index, public))))

    def _m3(self, own: _Secrets, m2: M2) -> bytes:
        o, u = self.offer, self.index
        self._peers = check_keys(o, m2.keys, self._check_certificate)
        self._public = {k.index: k.public for k in m2.keys}
        if self._public.get(u) != own.key.public:
            raise _abort("own_entry", "The key list holds another key for this site, or none.")
        self._u1 = tuple(self._public)
        self._t1 = tr.t1(o.ctx, list(self._public.items()))
        own.b = secrets.token_bytes(SECRET)
        own.pairs = {w: secrets.token_bytes(SECRET) for w in self._u1 if w > u}
        dealt = shamir.split(own.b + b"".join(own.pairs.values()), threshold=o.threshold,
                             points=[v + 1 for v in self._u1])
        own.held[u] = dealt[u + 1]
        ciphertexts = {v: hybrid.seal(public, dealt[v + 1] + own.pairs.get(v, b""), tr.share_info(self._t1, u, v))
                       for v, public in self._public.items() if v != u}
        self._body = M3Body(index=u, com_b=tr.commit_b(self._t1, u, own.b),
                            com_s=b"".join(tr.commit_s(self._t1, u, w, s) for w, s in own.pairs.items()),
                            ciphertexts=b"".join(hashlib.sha256(ct).digest() for ct in ciphertexts.values()))
        return dump(M3(body=self._body, signature=self.signer.sign(tr.signed_m3(self._t1, self._body.to_bytes())),
                       ciphertexts=tuple(ciphertexts.items())))

    def _m5(self, own: _Secrets, m4: M4, encoded: Ring) -> tuple[bytes, Ring]:
        o, u = self.offer, self.index
        if encoded.dtype != o.encoding.dtype or encoded.shape != (o.dim,):
            raise _abort("dimension", "The encoded update has another shape than the offer.")
        bodies = {body.index: body for body, _ in m4.bodies}
        check_members([body.index for body, _ in m4.bodies], self._u1, o.survivors, "share_list")
        if bodies.get(u) != self._body:
            raise _abort("own_entry", "The share list holds another entry for this site, or none.")
        for body, signature in m4.bodies:
            if not body.fits(self._u1):
                raise _abort("share_list", "A site's share list is not complete.")
            verify_signature(self._peers[body.index], signature, tr.signed_m3(self._t1, body.to_bytes()))
        if [v for v, _ in m4.inbound] != [v for v in bodies if v != u]:
            raise _abort("inbound", "There is not exactly one ciphertext from each peer.")
        for v, ciphertext in m4.inbound:
            self._open(bodies[v], ciphertext, own)
        self.view = tr.t2(self._t1, [(v, body.to_bytes()) for v, body in bodies.items()])
        self._u2 = tuple(bodies)
        masks = [(prg.derive_key(own.b, tr.self_mask_info(self.view, u)), 1)]
        for v in self._u2:
            if v != u:
                low, high = sorted((u, v))
                masks.append((prg.derive_key(own.pairs[v], tr.pair_mask_info(self.view, low, high)), 1 if u == low else -1))
        self._journal.spent(o.run, o.slot, o.adapter)
        prg.add_masks(encoded, masks)
        y_hash = hashlib.sha256(encoded.data).digest()
        self.masked = y_hash.hex()
        return dump(M5(index=u, y_hash=self.masked,
                       signature=self.signer.sign(tr.signed_m5(self.view, u, y_hash)))), encoded

    def _open(self, body: M3Body, ciphertext: bytes, own: _Secrets) -> None:
        """Take one peer's shares, and the pair secret if it is the lower one of the pair."""
        u, v = self.index, body.index
        if body.ciphertext(u, self._u1) != hashlib.sha256(ciphertext).digest():
            raise _abort("inbound", "A ciphertext is not the one that its sender signed.")
        plain = own.key.open(ciphertext, tr.share_info(self._t1, v, u))
        length = SECRET * sum(w >= v for w in self._u1)  # b_v, and s_vw for every w > v
        if len(plain) != length + (SECRET if v < u else 0):
            raise _abort("plaintext", "A share message has the wrong length.")
        own.held[v] = plain[:length]
        if v < u:
            own.pairs[v] = plain[length:]
            if body.pair(u, self._u1) != tr.commit_s(self._t1, v, u, own.pairs[v]):
                raise _abort("commitment", "A pair secret is not the committed one.")

    def _m7(self, m6: M6) -> bytes:
        o, u = self.offer, self.index
        vectors = {m.index: m for m in m6.survivors}
        check_members([m.index for m in m6.survivors], self._u2, o.survivors, "survivors")
        if u not in vectors or vectors[u].y_hash != self.masked:
            raise _abort("own_entry", "The survivor list holds another vector for this site, or none.")
        for v, m in vectors.items():
            verify_signature(self._peers[v], m.signature, tr.signed_m5(self.view, v, bytes.fromhex(m.y_hash)))
        self._u3, self.sites = tuple(vectors), tuple(o.cohort[v].name for v in vectors)
        self.transcript = tr.t3(self.view, [(v, bytes.fromhex(m.y_hash)) for v, m in vectors.items()])
        return dump(M7(index=u, signature=self.signer.sign(tr.signed_m7(self.transcript, u))))

    def _m9(self, own: _Secrets, m8: M8) -> bytes:
        o = self.offer
        check_members([vote.index for vote in m8.votes], self._u3, o.threshold, "votes")
        for vote in m8.votes:
            verify_signature(self._peers[vote.index], vote.signature, tr.signed_m7(self.transcript, vote.index))
        shares = tuple((v, own.held[v][:SECRET]) for v in self._u3)
        pairs = tuple((low, high, self._share(own, low, high)) for low, high in tr.released_pairs(self._u2, self._u3))
        self._journal.unmasked(o.run, o.slot, self.transcript.hex())
        m9 = M9(index=self.index, shares=shares, pairs=pairs, signature=b"")
        signature = self.signer.sign(tr.signed_m9(self.transcript, self.index, m9.joined()))
        self._secrets = None
        return dump(m9.model_copy(update={"signature": signature}))

    def _share(self, own: _Secrets, low: int, high: int) -> bytes:
        """This site's share of s_low,high, which `low` dealt after b_low, in order of the higher index."""
        at = SECRET * sum(low <= w < high for w in self._u1)
        return own.held[low][at:at + SECRET]


def _abort(code: str, cause: str) -> Aborted:
    return Aborted(f"secagg.{code}", cause, "The round is void; a new attempt needs a fresh update.")
