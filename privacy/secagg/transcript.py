"""What every signature and key derivation is bound to: ctx, T1, T2, T3, and the bytes that are signed.

All hashes are labelled and length-prefixed (`labelled_hash`), so that the encoding is injective. Signed bytes are a
visible stage prefix followed by a hash. Lists are sorted by cohort index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from privacy.canonical import canonical, labelled_hash
from privacy.contract import MAX_SITES, SUITE, Contract, Name, Sha256, Suite, Terms
from privacy.errors import Refused
from privacy.secagg.encoding import Encoding

MAX_COHORT = MAX_SITES
MAX_SEGMENTS = 10_000
Slot = tuple[int, int, int]  # round, attempt, pass


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
    pass_no: int = Field(1, ge=1, le=2, description="of the secure sums of one attempt, by a rule that needs two")
    after: Sha256 | Literal[""] = Field("", description="T3 of the first pass, for the second one")
    shared: Sha256 | Literal[""] = Field("", description="digest of what the coordinator made of the first sum: who is "
                                         "given something else has another ctx, and no mask in common with the others")
    cohort: tuple[Member, ...] = Field(max_length=MAX_COHORT, fail_fast=True)
    threshold: int = Field(description="t: shares, and votes, needed to unmask")
    survivors: int = Field(description="least |U1|, |U2| and |U3|")
    ring: Literal[16, 32]
    bits: int
    ranges: tuple[tuple[Annotated[int, Field(ge=1)], str], ...] = Field(
        max_length=MAX_SEGMENTS, fail_fast=True, description="(count, C as a decimal string): the public bound on each "
        "segment of the vector")
    w_cap: str = "1.0"
    base_model: Sha256
    adapter: Sha256
    contract: Sha256

    @cached_property
    def ctx(self) -> bytes:
        return labelled_hash("consilo secagg ctx", canonical(self.model_dump(mode="json")))

    @property
    def slot(self) -> Slot:
        return self.round, self.attempt, self.pass_no

    @property
    def dim(self) -> int:
        return sum(count for count, _ in self.ranges)

    @cached_property
    def encoding(self) -> Encoding:
        """Raises UsageError `encoding.overflow`."""
        return Encoding(bits=self.bits, ring=self.ring, cohort=len(self.cohort),
                        ranges=tuple((count, float(bound)) for count, bound in self.ranges))


@dataclass(frozen=True)
class Second:
    """What the second pass of an attempt goes on from. sites: of the first sum, in the contract's order; all of them take
    part, or there is no second sum. after: T3 of the first, hex. shared: digest of what is sent in between."""

    sites: tuple[str, ...]
    after: str
    shared: str


def offer(contract: Contract, *, round_no: int, attempt: int, ranges: Sequence[tuple[int, float]], adapter: str,
          second: Second | None = None) -> Offer:
    """The M0 that a contract implies. Coordinator and site both build it; the site compares.

    ranges: (count, C) of each segment of the vector that a site sends.
    """
    s, sites, survivors = contract.secagg, contract.sites, contract.secagg.survivors
    if second:
        sites = tuple(site for site in sites if site.name in second.sites)
        survivors = len(sites)
    cohort = tuple(Member(index=i, name=site.name, certificate=site.signer) for i, site in enumerate(sites))
    return Offer(run=contract.run, round=round_no, attempt=attempt, pass_no=2 if second else 1,
                 after=second.after if second else "", shared=second.shared if second else "", cohort=cohort,
                 threshold=s.threshold, survivors=survivors, ring=s.ring, bits=s.bits,
                 ranges=tuple((count, repr(bound)) for count, bound in ranges), base_model=contract.model.weights,
                 adapter=adapter, contract=contract.digest)


def least_threshold(n: int, n_c: int) -> int:
    """Smallest t for n sites of which n_c may collude with the coordinator."""
    return max(2 * n // 3 + 1, (n + n_c) // 2 + 1)


def least_survivors(t: int, n_c: int) -> int:
    """Fewest sites whose sum may become known, with threshold t and n_c colluding sites."""
    return max(t, n_c + 2)


def check_cohort(n: int, t: int, survivors: int, n_c: int) -> None:
    """Raises Refused `secagg.cohort` (too few or too many sites), `secagg.threshold`, `secagg.survivors`."""
    if n_c < 1 or n < n_c + 2 or n > MAX_COHORT:
        raise Refused("secagg.cohort", f"A cohort of {n} can't hide a site among {n_c} colluding ones.",
                      f"Use {n_c + 2} to {MAX_COHORT} sites.")
    if not least_threshold(n, n_c) <= t <= n:
        raise Refused("secagg.threshold", f"Threshold {t} is not in {least_threshold(n, n_c)}..{n}.",
                      "Set secure_aggregation.threshold in the contract.")
    if not least_survivors(t, n_c) <= survivors <= n:
        raise Refused("secagg.survivors", f"Sums of {survivors} sites are not in {least_survivors(t, n_c)}..{n}.",
                      "Set secure_aggregation.survivors in the contract.")


def t1(ctx: bytes, keys: Sequence[tuple[int, bytes]]) -> bytes:
    return labelled_hash("consilo secagg T1", ctx, *(x for pair in keys for x in pair))


def t2(t1_hash: bytes, bodies: Sequence[tuple[int, bytes]]) -> bytes:
    return labelled_hash("consilo secagg T2", t1_hash, *(x for u, b in bodies for x in (u, labelled_hash("M3", b))))


def t3(t2_hash: bytes, vectors: Sequence[tuple[int, bytes]]) -> bytes:
    return labelled_hash("consilo secagg T3", t2_hash, *(x for pair in vectors for x in pair))


def released_pairs(u2: Sequence[int], u3: Sequence[int]) -> list[tuple[int, int]]:
    """(low, high) with exactly one of them in U3: the pair masks that don't cancel in the survivors' sum."""
    alive = set(u3)
    return [(low, high) for low in u2 for high in u2 if low < high and (low in alive) != (high in alive)]


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


def signed_m7(t3_hash: bytes, u: int) -> bytes:
    return b"consilo secagg M7\n" + labelled_hash("s7", t3_hash, u)


def signed_m9(t3_hash: bytes, u: int, shares: bytes) -> bytes:
    return b"consilo secagg M9\n" + labelled_hash("s9", t3_hash, u, shares)
