"""What every signature and key derivation is bound to: ctx, T1, T2, T3, and the bytes that are signed.

All hashes are labelled and length-prefixed (`labelled_hash`), so that the encoding is injective. Signed bytes are a
visible stage prefix followed by a hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from privacy.canonical import canonical, labelled_hash
from privacy.contract import SUITE, Contract, Name, Sha256, Suite, Terms
from privacy.errors import Refused

MAX_COHORT = 100


class Member(Terms):
    index: int = Field(ge=0, lt=MAX_COHORT)
    name: Name
    certificate: Sha256


class Offer(Terms):
    """M0: everything that a session is about. Lists are sorted by cohort index."""

    suite: Suite = SUITE
    run: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    round: int = Field(ge=1)
    attempt: int = Field(ge=0)
    cohort: tuple[Member, ...] = Field(max_length=MAX_COHORT)
    threshold: int
    dim: int = Field(ge=1)
    ring: Literal[32] = 32
    bits: int
    range: str = Field(description="C, a decimal string")
    w_cap: str = "1.0"
    base_model: Sha256
    adapter: Sha256
    contract: Sha256

    @property
    def ctx(self) -> bytes:
        return labelled_hash("consilo secagg ctx", canonical(self.model_dump(mode="json")))


def offer(contract: Contract, *, round_no: int, attempt: int, dim: int, adapter: str) -> Offer:
    """The M0 that a contract implies. Coordinator and site both build it; the site compares."""
    s = contract.secagg
    cohort = tuple(Member(index=i, name=site.name, certificate=site.signer) for i, site in enumerate(contract.sites))
    return Offer(run=contract.run, round=round_no, attempt=attempt, cohort=cohort, threshold=s.threshold, dim=dim,
                 bits=s.bits, range=repr(s.range), base_model=contract.model.weights, adapter=adapter,
                 contract=contract.digest)


def least_threshold(n: int, n_c: int) -> int:
    """Smallest t for n sites of which n_c may collude with the coordinator."""
    return max(2 * n // 3 + 1, (n + n_c) // 2 + 1)


def check_cohort(n: int, t: int, n_c: int) -> None:
    """Raises Refused `secagg.cohort` (too few or too many sites) and `secagg.threshold`."""
    if n_c < 1 or n < n_c + 2 or n > MAX_COHORT:
        raise Refused("secagg.cohort", f"A cohort of {n} can't hide a site among {n_c} colluding ones.",
                      f"Use {n_c + 2} to {MAX_COHORT} sites.")
    if not least_threshold(n, n_c) <= t <= n:
        raise Refused("secagg.threshold", f"Threshold {t} is not in {least_threshold(n, n_c)}..{n}.",
                      "Set secure_aggregation.threshold in the contract.")


def t1(ctx: bytes, keys: Sequence[tuple[int, bytes]]) -> bytes:
    return labelled_hash("consilo secagg T1", ctx, *(x for pair in keys for x in pair))


def t2(t1_hash: bytes, bodies: Sequence[tuple[int, bytes]]) -> bytes:
    return labelled_hash("consilo secagg T2", t1_hash, *(x for u, b in bodies for x in (u, labelled_hash("M3", b))))


def t3(t2_hash: bytes, vectors: Sequence[tuple[int, bytes]]) -> bytes:
    return labelled_hash("consilo secagg T3", t2_hash, *(x for pair in vectors for x in pair))


def commit_b(t1_hash: bytes, u: int, b: bytes) -> bytes:
    return labelled_hash("consilo secagg com b", t1_hash, u, b)


def commit_s(t1_hash: bytes, u: int, w: int, s: bytes) -> bytes:
    return labelled_hash("consilo secagg com s", t1_hash, u, w, s)


def share_info(t1_hash: bytes, u: int, v: int) -> bytes:
    return labelled_hash("consilo secagg share", t1_hash, u, v)


def self_mask_info(t2_hash: bytes, u: int) -> bytes:
    return labelled_hash("consilo secagg self mask", t2_hash, u)


def pair_mask_info(t2_hash: bytes, low: int, high: int) -> bytes:
    return labelled_hash("consilo secagg pair mask", t2_hash, low, high)


def signed_m1(ctx: bytes, u: int, public: bytes) -> bytes:
    return b"consilo secagg M1\n" + labelled_hash("s1", ctx, u, public)


def signed_m3(t1_hash: bytes, body: bytes) -> bytes:
    return b"consilo secagg M3\n" + labelled_hash("s3", t1_hash, body)


def signed_m5(t2_hash: bytes, u: int, y_hash: bytes) -> bytes:
    return b"consilo secagg M5\n" + labelled_hash("s5", t2_hash, u, y_hash)


def signed_m9(t3_hash: bytes, u: int, shares: bytes) -> bytes:
    return b"consilo secagg M9\n" + labelled_hash("s9", t3_hash, u, shares)
