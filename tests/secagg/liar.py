"""A coordinator that follows no rule and colludes with sites, and what both can work out from all that they were sent.

`Liar` keeps as many views as it likes: at each stage it may tell each honest site another list, and its colluders sign
whatever makes the list whole. Honest sites are the product's own; nothing else of the product's checks is in its way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding as Pem

from privacy.errors import Aborted
from privacy.identity import FileSigner
from privacy.secagg import hybrid, prg, shamir
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1, M2, M3, M4, M5, M6, M7, M8, M9, M3Body, Ring, dump, load
from privacy.secagg.site import SECRET
from simulations.adversary import Consortium

Views = Mapping[int, Sequence[int]]  # what each honest site is told
Tamper = Callable[[str, int, bytes], bytes]


@dataclass
class Colluder:
    """Signs anything, in any number of views. held: the shares that honest sites dealt to it."""

    offer: tr.Offer
    index: int
    signer: FileSigner
    key: hybrid.HybridKey = field(default_factory=hybrid.HybridKey)
    held: dict[int, bytes] = field(default_factory=dict)

    def m1(self) -> M1:
        signature = self.signer.sign(tr.signed_m1(self.offer.ctx, self.index, self.key.public))
        return M1(index=self.index, certificate=self.signer.certificate.public_bytes(Pem.PEM), public=self.key.public,
                  signature=signature)

    def m3(self, t1: bytes, keys: Mapping[int, bytes]) -> M3:
        """Shares that are good for nothing, in a form that honest sites accept."""
        u, secret = self.index, bytes(SECRET)
        length = SECRET * sum(w >= u for w in keys)
        cts = {v: hybrid.seal(k, bytes(length) + (secret if v > u else b""), tr.share_info(t1, u, v))
               for v, k in keys.items() if v != u}
        body = M3Body(index=u, com_b=tr.commit_b(t1, u, secret),
                      com_s=b"".join(tr.commit_s(t1, u, w, secret) for w in keys if w > u),
                      ciphertexts=b"".join(hashlib.sha256(ct).digest() for ct in cts.values()))
        return M3(body=body, signature=self.signer.sign(tr.signed_m3(t1, body.to_bytes())), ciphertexts=tuple(cts.items()))

    def m5(self, t2: bytes) -> M5:
        return M5(index=self.index, y_hash="0" * 64, signature=self.signer.sign(tr.signed_m5(t2, self.index, bytes(32))))

    def m7(self, t3: bytes) -> M7:
        return M7(index=self.index, signature=self.signer.sign(tr.signed_m7(t3, self.index)))


class Liar:
    """Call keys, shares, survivors, votes in this order. refused: code by (message, site). tamper: last change to each
    message to a site."""

    def __init__(self, consortium: Consortium, offer: tr.Offer, colluders: Collection[int], vectors: Sequence[Ring], *,
                 n_c: int = 1, tamper: Tamper = lambda message, site, data: data) -> None:
        self.offer, self.vectors, self._tamper = offer, vectors, tamper
        everyone = range(len(offer.cohort))
        self.sites = {u: consortium.site(offer, u, n_c=n_c) for u in everyone if u not in colluders}
        self.secrets = {u: s._secrets for u, s in self.sites.items()}  # what the tests know, not the liar
        self.colluders = {u: Colluder(offer, u, consortium.signers[u]) for u in colluders}
        self.m1 = {u: load(M1, s.m1()) for u, s in self.sites.items()} | {u: c.m1() for u, c in self.colluders.items()}
        self.m3: dict[tuple[bytes, int], M3] = {}
        self.m5: dict[tuple[bytes, int], M5] = {}
        self.m7: dict[tuple[bytes, int], M7] = {}
        self.y: dict[int, Ring] = {}
        self.m9: dict[int, M9] = {}
        self.refused: dict[tuple[str, int], str] = {}

    def keys(self, views: Views) -> None:
        for u, view in views.items():
            m2 = M2(keys=tuple(self.m1[v] for v in view))
            if (reply := self._ask("m2", u, m2, self.sites[u].m3)) is not None:
                t1 = self.sites[u]._t1
                m3 = self.m3[t1, u] = load(M3, reply)
                for v, ciphertext in m3.ciphertexts:
                    if v in self.colluders:
                        self.colluders[v].held[u] = self.colluders[v].key.open(ciphertext, tr.share_info(t1, u, v))

    def shares(self, views: Views) -> None:
        for u in self._past("m2", views):
            site = self.sites[u]
            for c in self.colluders.keys() & site._public.keys():
                if (site._t1, c) not in self.m3:
                    self.m3[site._t1, c] = self.colluders[c].m3(site._t1, site._public)
            chosen = [m3 for v in views[u] if (m3 := self.m3.get((site._t1, v)))]
            m4 = M4(bodies=tuple((m3.body, m3.signature) for m3 in chosen),
                    inbound=tuple((m3.body.index, dict(m3.ciphertexts)[u]) for m3 in chosen if m3.body.index != u))
            x = self.vectors[u].copy()
            if (reply := self._ask("m4", u, m4, lambda data, site=site, x=x: site.m5(data, x)[0])) is not None:  # type: ignore[misc]
                self.m5[site.view, u], self.y[u] = load(M5, reply), x

    def survivors(self, views: Views) -> None:
        for u in self._past("m4", views):
            view = self.sites[u].view
            found = [self.colluders[v].m5(view) if v in self.colluders else self.m5.get((view, v)) for v in views[u]]
            m6 = M6(survivors=tuple(m5 for m5 in found if m5))
            if (reply := self._ask("m6", u, m6, self.sites[u].m7)) is not None:
                self.m7[self.sites[u].transcript, u] = load(M7, reply)

    def votes(self, views: Views) -> None:
        for u in self._past("m6", views):
            t3 = self.sites[u].transcript
            found = [self.colluders[v].m7(t3) if v in self.colluders else self.m7.get((t3, v)) for v in views[u]]
            m8 = M8(votes=tuple(m7 for m7 in found if m7))
            if (reply := self._ask("m8", u, m8, self.sites[u].m9)) is not None:
                self.m9[u] = load(M9, reply)

    def _ask(self, message: str, u: int, body: M2 | M4 | M6 | M8, answer: Callable[[bytes], bytes]) -> bytes | None:
        try:
            return answer(self._tamper(message, u, dump(body)))
        except Aborted as e:
            self.refused[message, u] = e.code
            assert self.sites[u]._secrets is None, "an aborted site holds no secrets"
            return None

    def _past(self, message: str, views: Views) -> list[int]:
        """Those sites of `views` that answered the message before."""
        done = {"m2": {u for _, u in self.m3}, "m4": set(self.y), "m6": {u for _, u in self.m7}}[message]
        return [u for u in views if u in done]

    def shares_of(self, dealer: int, item: int) -> dict[int, bytes]:
        """Shares of a dealer's secret (item 0: b; k: its k-th pair secret) that coordinator and colluders hold, by point.
        An honest site's share counts if its bytes are anywhere in its M9."""
        part = slice(SECRET * item, SECRET * (item + 1))
        known = {c + 1: colluder.held[dealer][part] for c, colluder in self.colluders.items() if dealer in colluder.held}
        for v, m9 in self.m9.items():
            released = {share for _, share in m9.shares} | {share for *_, share in m9.pairs}
            if (share := self.secrets[v].held.get(dealer, b"")[part]) in released:  # type: ignore[union-attr]
                known[v + 1] = share
        return known

    def reconstructs(self, low: int, high: int) -> bool:
        """Whether they can work out s_low,high of two honest sites, or b_low where both are one."""
        own = self.secrets[low]
        assert own is not None
        item = 0 if low == high else 1 + [w for w in self.sites[low]._u1 if w > low].index(high)
        shares = list(self.shares_of(low, item).items())[:self.offer.threshold]
        if len(shares) < self.offer.threshold:
            return False
        assert shamir.combine(dict(shares)) == (own.b if low == high else own.pairs[high])
        return True

    def exposed(self) -> list[frozenset[int]]:
        """Sets of honest sites whose sum the liar learns; every such sum is a sum of some of these.

        A masked vector is hidden by its own mask unless b is known, then by any pair mask that stands in no other
        unhidden vector; what remains are the connected parts of the graph of unknown pair masks.
        """
        bare = {u for u in self.y if self.reconstructs(u, u)}
        hidden, links = set[int](), {u: set[int]() for u in bare}
        for u in bare:
            for v in set(self.sites[u]._u2) - {u} - self.colluders.keys():
                if not self.reconstructs(min(u, v), max(u, v)):
                    if v in bare and self.sites[v].view == self.sites[u].view:
                        links[u].add(v)
                    else:
                        hidden.add(u)
        parts = list[frozenset[int]]()
        while bare:
            part, rim = set[int](), {min(bare)}
            while rim:
                part |= rim
                rim = set().union(*(links[u] for u in rim)) - part
            bare -= part
            if not part & hidden:
                parts.append(frozenset(part))
        return parts

    def sum_of(self, part: Collection[int]) -> Ring:
        """The sum of an exposed set, from masked vectors and what can be reconstructed alone."""
        total = np.zeros(self.offer.dim, self.offer.encoding.dtype)
        for u in part:
            site, own, y = self.sites[u], self.secrets[u], self.y[u].copy()
            assert own is not None
            masks = [(prg.derive_key(own.b, tr.self_mask_info(site.view, u)), -1)]
            for v in set(site._u2) - {u} - set(part):
                low, high = sorted((u, v))
                masks.append((prg.derive_key(own.pairs[v], tr.pair_mask_info(site.view, low, high)), -1 if u == low else 1))
            prg.add_masks(y, masks)
            total += y
        return total

    def check_promise(self, n_c: int) -> int:
        """What the liar learns is at most one sum, over all honest members of one survivor set. Returns its size."""
        parts = self.exposed()
        assert len(parts) <= 1
        for part in parts:
            voted = {self.sites[u].transcript: self.sites[u]._u3 for u in self.m9}
            assert len(voted) == 1, "shares were released for two survivor sets"
            (u3,) = voted.values()
            assert part == set(u3) - self.colluders.keys()
            assert len(u3) >= self.offer.survivors and len(part) >= max(2, self.offer.survivors - n_c)
        return len(parts[0]) if parts else 0
