"""Plays whole sessions between real state machines: certificates, journal, and a hook on every message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privacy import ca
from privacy.identity import FileSigner, Role, TrustStore, create_request
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.peers import certificate_check
from privacy.secagg.site import SiteSession

Hook = Callable[[str, int, bytes], bytes]


@dataclass
class Journal:
    """In-memory stand-in for the site's journal file."""

    starts: list[tuple[str, int, int]] = field(default_factory=list)
    updates: list[bytes] = field(default_factory=list)

    def started(self, run: str, round_no: int, attempt: int) -> None:
        self.starts.append((run, round_no, attempt))

    def spent(self, run: str, round_no: int, attempt: int, update: bytes) -> None:
        self.updates.append(update)


class Consortium:
    """A CA and n sites with real key files."""

    def __init__(self, folder: Path, n: int) -> None:
        ca.init(folder / "ca", "Test consortium")
        self.signers = []
        for i in range(n):
            request = create_request(folder / f"site{i}", f"site{i}", f"Hospital {i}")
            ca.issue(folder / "ca", request, Role.SITE)
            issued = folder / "ca" / "issued" / f"site{i}"
            self.signers.append(FileSigner(folder / f"site{i}" / "sign.key", issued / "sign.pem"))
        self.check = certificate_check(TrustStore.load(issued / "trust"))

    def offer(self, n: int, t: int, dim: int, **changes: object) -> tr.Offer:
        cohort = tuple(tr.Member(index=i, name=f"site{i}", certificate=self.signers[i].fingerprint) for i in range(n))
        base = {"run": "ab" * 16, "round": 1, "attempt": 0, "cohort": cohort, "threshold": t, "dim": dim, "bits": 24,
                "range": "1.0", "base_model": "0" * 64, "adapter": "1" * 64, "contract": "2" * 64}
        return tr.Offer(**(base | changes))

    def sites(self, offer: tr.Offer, **kw: object) -> list[SiteSession]:
        return [SiteSession(offer, index=i, n_c=1, signer=self.signers[i], check_certificate=self.check,
                            journal=Journal()) for i in range(len(offer.cohort))]


def play(consortium: Consortium, offer: tr.Offer, vectors: list[NDArray[np.uint32]],
         hook: Hook = lambda stage, who, data: data) -> tuple[NDArray[np.uint32], list[NDArray[np.uint32]]]:
    """One whole session; `hook` may replace any message on its way. Returns (sum, masked vectors)."""
    sites, c = consortium.sites(offer), CoordinatorSession(offer, consortium.check)
    n = len(sites)
    for u, site in enumerate(sites):
        c.take_m1(u, hook("m1", u, site.m1()))
    m2 = c.m2()
    for u, site in enumerate(sites):
        c.take_m3(u, hook("m3", u, site.m3(hook("m2", u, m2))))
    m4, masked = c.m4(), []
    for u, site in enumerate(sites):
        body, y = site.m5(hook("m4", u, m4[u]), vectors[u].copy())
        masked.append(y)
        c.take_m5(u, hook("m5", u, body), y)
    m6 = c.m6()
    for u, site in enumerate(sites):
        c.take_m9(u, hook("m9", u, site.m9(hook("m6", u, m6))))
    assert all(site.transcript == c.transcript for site in sites)
    assert n == len(masked)
    return c.unmask(), masked
