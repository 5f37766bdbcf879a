"""The coordinator's side of one secure sum: relays, adds masked vectors as they arrive, unmasks the total.

It runs the sites' own checks first, so that one bad site is left out instead of stopping the honest ones. It never holds
an unmasked vector of a site. A reconstruction is used only if it matches its commitment: a forged or mis-dealt share
never gives a wrong sum.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from privacy.errors import Aborted
from privacy.identity import Peer, verify_signature
from privacy.secagg import hybrid, prg, shamir
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1, M2, M3, M4, M5, M6, M7, M8, M9, M3Body, Ring, dump, load
from privacy.secagg.peers import CheckCertificate, check_distinct, check_key, check_members
from privacy.secagg.site import SECRET

MAX_SUBSETS = 200  # random sets of t holders tried before the round is void
Pair = tuple[int, int]


class CoordinatorSession:
    """One attempt of one round. `take_*` check and keep one site's message; the methods between make the next one of
    those that were taken, and fix who takes part from there on: U1 (m2), U2 (m4), U3 (m6).

    Raises Aborted `secagg.*`: of `take_*` it is about that site, which is then left out; of the others the attempt is void.
    `suspects`: after `secagg.forged_share`, who dealt the secrets that can't be had (or whose holders lie together).
    """

    def __init__(self, offer: tr.Offer, check_certificate: CheckCertificate) -> None:
        self.offer, self._check_certificate = offer, check_certificate
        self._peers: dict[int, Peer] = {}
        self._m1: dict[int, M1] = {}
        self._m3: dict[int, M3] = {}
        self._m5: dict[int, M5] = {}
        self._m7: dict[int, M7] = {}
        self._m9: dict[int, M9] = {}
        self._u1: tuple[int, ...] = ()
        self._u2: tuple[int, ...] = ()
        self.survivors: tuple[int, ...] = ()
        self.suspects: tuple[int, ...] = ()
        self.total = np.zeros(offer.dim, offer.encoding.dtype)
        self.view = self.transcript = b""

    def take_m1(self, index: int, data: bytes) -> None:
        key = load(M1, data)
        _check_sender(index, key.index, range(len(self.offer.cohort)), self._m1, bool(self._u1))
        peer = check_key(self.offer, key, self._check_certificate)
        if any(key.public == other.public for other in self._m1.values()):
            raise _left_out("peer", "Two sites sent one key.")
        check_distinct([*self._peers.values(), peer])
        hybrid.seal(key.public, b"", b"")  # a key that can't be used is its sender's fault, found before others meet it
        self._peers[index], self._m1[index] = peer, key

    def m2(self) -> bytes:
        self._u1 = self._members(self._m1)
        self._t1 = tr.t1(self.offer.ctx, [(u, self._m1[u].public) for u in self._u1])
        return dump(M2(keys=tuple(self._m1[u] for u in self._u1)))

    def take_m3(self, index: int, data: bytes) -> None:
        m3 = load(M3, data)
        _check_sender(index, m3.body.index, self._u1, self._m3, bool(self._u2))
        self._verify(index, m3.signature, tr.signed_m3(self._t1, m3.body.to_bytes()))
        if not m3.body.fits(self._u1) or [v for v, _ in m3.ciphertexts] != [v for v in self._u1 if v != index]:
            raise _left_out("share_list", "A site's share list is not complete.")
        if b"".join(hashlib.sha256(ct).digest() for _, ct in m3.ciphertexts) != m3.body.ciphertexts:
            raise _left_out("inbound", "A site's ciphertexts are not the ones that it signed.")
        shares = SECRET * sum(w >= index for w in self._u1)  # b_index, and s_index,w for every w above
        if any(len(ct) != hybrid.OVERHEAD + shares + (SECRET if v > index else 0) for v, ct in m3.ciphertexts):
            raise _left_out("plaintext", "A site's ciphertext has the wrong length.")
        self._m3[index] = m3

    def m4(self) -> Mapping[int, bytes]:
        """The message for each site of U2, made when it is looked up: all of them together grow with the cohort's square."""
        self._u2 = self._members(self._m3)
        bodies: tuple[tuple[M3Body, bytes], ...] = tuple((self._m3[u].body, self._m3[u].signature) for u in self._u2)
        self.view = tr.t2(self._t1, [(b.index, b.to_bytes()) for b, _ in bodies])
        sent = {u: dict(self._m3[u].ciphertexts) for u in self._u2}
        for u in self._u2:  # relayed; only the commitments are needed from here on
            self._m3[u] = self._m3[u].model_copy(update={"ciphertexts": ()})
        inbound = {u: tuple((v, sent[v][u]) for v in self._u2 if v != u) for u in self._u2}
        shared = dump(M4(bodies=bodies, inbound=())).removesuffix(b"[]}")  # the same for all, and most of the message
        return _Relayed(shared, inbound)

    def take_m5(self, index: int, data: bytes, y: Ring) -> None:
        """Verify, then add. Memory stays at one vector however many sites there are."""
        m5 = load(M5, data)
        _check_sender(index, m5.index, self._u2, self._m5, bool(self.survivors))
        if y.dtype != self.total.dtype or y.shape != self.total.shape:
            raise _left_out("dimension", "A masked vector has the wrong shape.")
        y_hash = hashlib.sha256(np.ascontiguousarray(y).data).digest()
        if y_hash.hex() != m5.y_hash:
            raise _left_out("vector", "A masked vector is not the one that was signed.")
        self._verify(index, m5.signature, tr.signed_m5(self.view, index, y_hash))
        self._m5[index] = m5
        np.add(self.total, y, out=self.total)

    def m6(self) -> bytes:
        """The message for each survivor. Nobody's vector is taken from here on."""
        self.survivors = self._members(self._m5)
        self.transcript = tr.t3(self.view, [(u, bytes.fromhex(self._m5[u].y_hash)) for u in self.survivors])
        return dump(M6(survivors=tuple(self._m5[u] for u in self.survivors)))

    def take_m7(self, index: int, data: bytes) -> None:
        vote = load(M7, data)
        _check_sender(index, vote.index, self.survivors, self._m7, False)
        self._verify(index, vote.signature, tr.signed_m7(self.transcript, index))
        self._m7[index] = vote

    @property
    def votes(self) -> dict[int, bytes]:
        """Signatures on T3, by cohort index."""
        return {u: self._m7[u].signature for u in sorted(self._m7)}

    def m8(self) -> bytes:
        check_members(sorted(self._m7), self.survivors, self.offer.threshold, "votes")
        return dump(M8(votes=tuple(self._m7[u] for u in sorted(self._m7))))

    def take_m9(self, index: int, data: bytes) -> None:
        m9 = load(M9, data)
        _check_sender(index, m9.index, self.survivors, self._m9, False)
        named = [v for v, _ in m9.shares], [(low, high) for low, high, _ in m9.pairs]
        if named != (list(self.survivors), tr.released_pairs(self._u2, self.survivors)):
            raise _left_out("shares", "A site's unmasking shares are not complete.")
        if {len(share) for _, share in m9.shares} | {len(share) for _, _, share in m9.pairs} != {SECRET}:
            raise _left_out("shares", "An unmasking share has the wrong length.")
        self._verify(index, m9.signature, tr.signed_m9(self.transcript, index, m9.joined()))
        self._m9[index] = m9

    def unmask(self) -> Ring:
        """The sum of the survivors' encoded updates mod 2^ring; what pair masks don't cancel is taken off. Once."""
        check_members(sorted(self._m9), self.survivors, self.offer.threshold, "shares")
        pairs = tr.released_pairs(self._u2, self.survivors)
        found = self._reconstruct([(u, u) for u in self.survivors] + pairs)
        masks = [(prg.derive_key(found[u, u], tr.self_mask_info(self.view, u)), -1) for u in self.survivors]
        masks += [(prg.derive_key(found[low, high], tr.pair_mask_info(self.view, low, high)),
                   -1 if low in self.survivors else 1) for low, high in pairs]
        self._m9.clear()
        total, self.total = self.total, np.zeros(0, self.total.dtype)
        prg.add_masks(total, masks)
        return total

    def _reconstruct(self, wanted: Sequence[Pair]) -> dict[Pair, bytes]:
        """(u, u) -> b_u and (low, high) -> s_low,high, from t holders' shares of all of them. Other holders are tried
        for those that don't fit their commitment: by turns any, and those whose shares agree with what was found. Any,
        because a dealer can make honest holders disagree, to leave the others at a forger's mercy."""
        held = {u + 1: m.joined() for u, m in self._m9.items()}
        commitments = {pair: self._commitment(*pair) for pair in wanted}
        parts = {pair: slice(k * SECRET, (k + 1) * SECRET) for k, pair in enumerate(wanted)}
        found: dict[Pair, bytes] = {}
        agreed = sorted(held)
        for attempt in range(MAX_SUBSETS):
            points = secrets.SystemRandom().sample(agreed if attempt % 2 else sorted(held), self.offer.threshold)
            joined = shamir.combine({x: held[x] for x in points})
            fits = [pair for pair in wanted if self._commit(*pair, joined[parts[pair]]) == commitments[pair]]
            found |= {pair: joined[parts[pair]] for pair in fits}
            if len(found) == len(wanted):
                return found
            line = shamir.interpolate({x: held[x] for x in points}, at=agreed)
            agree = [x for x in agreed if all(line[x][parts[pair]] == held[x][parts[pair]] for pair in fits)]
            agreed = agree if len(agree) >= self.offer.threshold else agreed
        self.suspects = tuple(sorted({low for low, high in wanted if (low, high) not in found}))
        raise Aborted("secagg.forged_share", "No set of shares gives a committed secret.",
                      "The round is void; a site dealt or released wrong shares.")

    def _commitment(self, low: int, high: int) -> bytes:
        body = self._m3[low].body
        return body.com_b if low == high else body.pair(high, self._u1)

    def _commit(self, low: int, high: int, secret: bytes) -> bytes:
        return tr.commit_b(self._t1, low, secret) if low == high else tr.commit_s(self._t1, low, high, secret)

    def _members(self, got: Mapping[int, object]) -> tuple[int, ...]:
        """Who goes on to the next stage, in order. Raises Aborted `secagg.too_few`."""
        check_members(sorted(got), range(len(self.offer.cohort)), self.offer.survivors, "stage")
        return tuple(sorted(got))

    def _verify(self, index: int, signature: bytes, signed: bytes) -> None:
        verify_signature(self._peers[index].certificate, signature, signed)


class _Relayed(Mapping[int, bytes]):
    """M4 by site. shared: its beginning; inbound: (sender, ciphertext) by receiver."""

    def __init__(self, shared: bytes, inbound: Mapping[int, tuple[tuple[int, bytes], ...]]) -> None:
        self._shared, self._inbound = shared, inbound

    def __getitem__(self, u: int) -> bytes:
        return self._shared + dump(M4(bodies=(), inbound=self._inbound[u])).partition(b'"inbound":')[2]

    def __iter__(self) -> Iterator[int]:
        return iter(self._inbound)

    def __len__(self) -> int:
        return len(self._inbound)


def _check_sender(index: int, claimed: int, among: Sequence[int], seen: Mapping[int, object], over: bool) -> None:
    if claimed != index or index not in among or index in seen or over:
        raise _left_out("sender", "A message names another sender, came twice, late, or from a site that is out.")


def _left_out(code: str, cause: str) -> Aborted:
    return Aborted(f"secagg.{code}", cause, "That site is left out of the round; its software differs.")
