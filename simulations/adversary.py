"""Whole secure-aggregation sessions between the product's own state machines, with a hand on every message.

A hook sees each message on its way and may keep it, replace it or lose it: that is a malicious coordinator (m2, m4, m6,
m8 to one site), a malicious site (m1, m3, m5, m7, m9) or the network. For a party that must compute, pass a subclass of
`SiteSession` or `CoordinatorSession`. Nothing is raised: who aborted, and with which code, is in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from privacy import ca
from privacy.errors import ConsiloError
from privacy.identity import FileSigner, Role, create_request
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.messages import Ring
from privacy.secagg.peers import certificate_check
from privacy.secagg.site import SiteSession
from privacy.trust import TrustStore

Hook = Callable[[str, int, bytes], bytes | None]  # (message, site, bytes) -> what arrives, None: nothing


@dataclass
class MemoryJournal:
    """A site's journal that dies with the process; for simulations only."""

    starts: list[tuple[str, tr.Slot]] = field(default_factory=list)
    spends: list[tuple[str, tr.Slot, str]] = field(default_factory=list)
    sums: list[tuple[str, tr.Slot, str]] = field(default_factory=list)

    def started(self, run: str, slot: tr.Slot) -> None:
        self.starts.append((run, slot))

    def spent(self, run: str, slot: tr.Slot, adapter: str) -> None:
        self.spends.append((run, slot, adapter))

    def unmasked(self, run: str, slot: tr.Slot, transcript: str) -> None:
        self.sums.append((run, slot, transcript))


class Consortium:
    """A CA and n sites of n organisations, with real key files in `folder`."""

    def __init__(self, folder: Path, n: int) -> None:
        ca.init(folder / "ca", "Consortium")
        self.folder, self.signers = folder, list[FileSigner]()
        for i in range(n):
            ca.issue(folder / "ca", create_request(folder / f"site{i}", f"site{i}", f"Hospital {i}"), Role.SITE)
            issued = folder / "ca" / "issued" / f"site{i}"
            self.signers.append(FileSigner(folder / f"site{i}" / "sign.key", issued / "sign.pem"))
        self.check = certificate_check(TrustStore.load(issued / "trust"))

    def offer(self, n: int, t: int, dim: int, **changes: object) -> tr.Offer:
        """M0 for the first n sites; survivors is t unless it is among the changes."""
        cohort = tuple(tr.Member(index=i, name=f"site{i}", certificate=self.signers[i].fingerprint) for i in range(n))
        base = {"run": "ab" * 16, "round": 1, "attempt": 0, "cohort": cohort, "threshold": t, "survivors": t, "ring": 32,
                "bits": 24, "ranges": ((dim, "1.0"),), "base_model": "0" * 64, "adapter": "1" * 64, "contract": "2" * 64}
        return tr.Offer.model_validate(base | changes)

    def site(self, offer: tr.Offer, index: int, kind: type[SiteSession] = SiteSession, *, n_c: int = 1,
             signer: FileSigner | None = None) -> SiteSession:
        return kind(offer, index=index, n_c=n_c, signer=signer or self.signers[index], check_certificate=self.check,
                    journal=MemoryJournal())

    def sites(self, offer: tr.Offer) -> list[SiteSession]:
        return [self.site(offer, i) for i in range(len(offer.cohort))]


@dataclass
class Played:
    """total: the sum over `coordinator.survivors`, or None where the attempt is void (`void` says why).

    refused: code by (message, site): the site aborted on m2, m4, m6, m8, or the coordinator left out its m1, m3, m5, m7,
    m9. sent: every message of a site, by (message, site), as the site made it. masked: each site's y.
    """

    sites: Sequence[SiteSession]
    coordinator: CoordinatorSession
    total: Ring | None = None
    void: str = ""
    refused: dict[tuple[str, int], str] = field(default_factory=dict)
    sent: dict[tuple[str, int], bytes] = field(default_factory=dict)
    masked: dict[int, Ring] = field(default_factory=dict)


def play(consortium: Consortium, offer: tr.Offer, vectors: Sequence[Ring], hook: Hook = lambda message, site, data: data, *,
         sites: Mapping[int, SiteSession] | None = None, coordinator: CoordinatorSession | None = None) -> Played:
    """One attempt. vectors: each site's encoded update; not changed. sites: in place of the honest ones."""
    everyone = [(sites or {}).get(i) or consortium.site(offer, i) for i in range(len(offer.cohort))]
    c = coordinator or CoordinatorSession(offer, consortium.check)
    out = Played(everyone, c)

    def stage(inbound: str, outbound: str, to: Mapping[int, bytes], answer: Callable[[int, bytes], bytes],
              take: Callable[[int, bytes], None]) -> list[int]:
        there = []
        for u, message in to.items():
            if (arrived := hook(inbound, u, message)) is None:
                continue
            try:
                out.sent[outbound, u] = answer(u, arrived)
            except ConsiloError as e:
                out.refused[inbound, u] = e.code
                continue
            if (reply := hook(outbound, u, out.sent[outbound, u])) is None:
                continue
            try:
                take(u, reply)
            except ConsiloError as e:
                out.refused[outbound, u] = e.code
                continue
            there.append(u)
        return there

    def m5(u: int, m4: bytes) -> bytes:
        body, out.masked[u] = everyone[u].m5(m4, vectors[u].copy())
        return body

    try:
        there = stage("m0", "m1", dict.fromkeys(range(len(everyone)), b""), lambda u, m: everyone[u].m1(), c.take_m1)
        there = stage("m2", "m3", dict.fromkeys(there, c.m2()), lambda u, m: everyone[u].m3(m), c.take_m3)
        m4 = c.m4()
        there = stage("m4", "m5", {u: m4[u] for u in there}, m5, lambda u, m: c.take_m5(u, m, out.masked[u]))
        there = stage("m6", "m7", dict.fromkeys(there, c.m6()), lambda u, m: everyone[u].m7(m), c.take_m7)
        stage("m8", "m9", dict.fromkeys(there, c.m8()), lambda u, m: everyone[u].m9(m), c.take_m9)
        out.total = c.unmask()
    except ConsiloError as e:
        out.void = e.code
    return out
