"""The transparency log: an append-only Merkle tree over statements (RFC 6962), its proofs, checkpoints and witnesses.

An entry is a run and the SHA-256 of an envelope, so a log shows of other runs that something was stated, not what. The
coordinator signs checkpoints (size, root); sites sign the same as witnesses once a consistency proof from the last head
that they saw holds. Two checkpoints that contradict each other, both signed, prove that the coordinator shows two
histories.

Hashes are SHA-256: leaf = H(0x00 || entry), node = H(0x01 || left || right). Verification follows RFC 9162, 2.1.3.2 and
2.1.4.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography import x509
from pydantic import Field

from privacy.contract import Name, Sha256, validate
from privacy.errors import CheckFailed
from privacy.identity import Signer
from privacy.predicates import Count, Strict
from privacy.statements import make, open_envelope

CHECKPOINT, WITNESS = "urn:consilo:checkpoint:1", "urn:consilo:witness:1"
MAX_PROOF = 64  # hashes; a tree of 2^53 leaves needs 53
EMPTY = hashlib.sha256(b"").digest()


@dataclass(frozen=True)
class Entry:
    """run: 32 hex digits. sha256: of an envelope's bytes, 64 hex digits."""

    run: str
    sha256: str

    def line(self) -> str:
        return f"{self.run} {self.sha256}"

    @property
    def leaf(self) -> bytes:
        return hashlib.sha256(b"\0" + self.line().encode()).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


@dataclass
class Frontier:
    """Roots of the perfect subtrees that a tree of `size` leaves is made of, the largest first: enough to go on."""

    size: int = 0
    peaks: list[bytes] = field(default_factory=list)

    def append(self, leaf: bytes) -> None:
        size = self.size
        while size & 1:
            leaf, size = _node(self.peaks.pop(), leaf), size >> 1
        self.peaks.append(leaf)
        self.size += 1

    @property
    def root(self) -> bytes:
        """32 bytes; the hash of nothing for an empty tree."""
        if not self.peaks:
            return EMPTY
        *rest, root = self.peaks
        for peak in reversed(rest):
            root = _node(peak, root)
        return root

    def holds_together(self) -> bool:
        """Whether there is one peak for each bit of the size."""
        return self.size >= 0 and len(self.peaks) == self.size.bit_count() and {len(p) for p in self.peaks} <= {32}


class MerkleTree:
    """A tree that answers with proofs. Subtrees that will never change are computed once."""

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        self._leaves: list[bytes] = list(leaves)
        self._perfect: dict[tuple[int, int], bytes] = {}

    def __len__(self) -> int:
        return len(self._leaves)

    def append(self, leaf: bytes) -> None:
        self._leaves.append(leaf)

    def root(self, size: int) -> bytes:
        """Of the first `size` leaves."""
        return self._hash(0, size) if size else EMPTY

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Audit path of leaf `index` in the tree of `size` leaves; 0 <= index < size <= len(self)."""
        return self._path(index, 0, size)

    def consistency(self, old: int, new: int) -> list[bytes]:
        """Proof that the first `old` leaves are a prefix of the first `new`; 0 <= old <= new <= len(self)."""
        return self._prefix(old, 0, new, True) if 0 < old < new else []

    def _hash(self, begin: int, end: int) -> bytes:
        size = end - begin
        if size == 1:
            return self._leaves[begin]
        if (begin, end) in self._perfect:
            return self._perfect[begin, end]
        split = begin + _split(size)
        found = _node(self._hash(begin, split), self._hash(split, end))
        if size & (size - 1) == 0:
            self._perfect[begin, end] = found
        return found

    def _path(self, index: int, begin: int, end: int) -> list[bytes]:
        if end - begin == 1:
            return []
        split = begin + _split(end - begin)
        if index < split:
            return [*self._path(index, begin, split), self._hash(split, end)]
        return [*self._path(index, split, end), self._hash(begin, split)]

    def _prefix(self, old: int, begin: int, end: int, whole: bool) -> list[bytes]:
        if old == end:
            return [] if whole else [self._hash(begin, end)]
        split = begin + _split(end - begin)
        if old <= split:
            return [*self._prefix(old, begin, split, whole), self._hash(split, end)]
        return [*self._prefix(old, split, end, False), self._hash(begin, split)]


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return int(1 << ((size - 1).bit_length() - 1))


def check_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Whether the path proves that `leaf` stands at `index` of the tree of `size` leaves with that root."""
    if not 0 <= index < size:
        return False
    fn, sn, found = index, size - 1, leaf
    for sibling in path:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            found = _node(sibling, found)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            found = _node(found, sibling)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and found == root


def check_consistency(old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the proof shows that the tree of `old` leaves is a prefix of the tree of `new` leaves."""
    if old == new or old == 0:
        return 0 <= old <= new and not proof and old_root == (new_root if old == new else EMPTY)
    if not 0 < old < new or not proof:
        return False
    path = list(proof) if old & (old - 1) else [old_root, *proof]
    fn, sn = old - 1, new - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    first = second = path[0]
    for part in path[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            first, second = _node(part, first), _node(part, second)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            second = _node(second, part)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and first == old_root and second == new_root


def least_witnesses(n: int, n_c: int = 1) -> int:
    """Of n sites: two heads that contradict each other can't both have so many, unless more than n_c sites lie, or all."""
    return min(n, (n + n_c) // 2 + 1)


class Head(Strict):
    """What a checkpoint says, and what a witness repeats. log: the coordinator whose log it is; it has one."""

    log: Name
    size: Count
    root: Sha256


H = TypeVar("H", bound=Head)


class Witnessed(Head):
    site: Name = Field(description="who saw the log grow to this head from every head that it signed before")


def sign_checkpoint(signer: Signer, head: Head) -> bytes:
    return make(signer, CHECKPOINT, [("root", head.root)], head.model_dump())


def sign_witness(signer: Signer, site: str, head: Head) -> bytes:
    return make(signer, WITNESS, [("root", head.root)], {"site": site, **head.model_dump()})


def open_checkpoint(data: bytes, certificates: Mapping[str, x509.Certificate]) -> Head:
    """Raises CheckFailed `statement.*`, `log.form`; UsageError `config.*`. certificates: of coordinators, by fingerprint."""
    return _open(data, certificates, CHECKPOINT, Head)


def open_witness(data: bytes, certificates: Mapping[str, x509.Certificate]) -> Witnessed:
    """Raises as `open_checkpoint` does. certificates: of sites, by fingerprint."""
    return _open(data, certificates, WITNESS, Witnessed)


def _open(data: bytes, certificates: Mapping[str, x509.Certificate], kind: str, model: type[H]) -> H:
    said = open_envelope(data, certificates)
    if said.predicate_type != kind or said.subject != (("root", said.predicate.get("root")),):
        raise CheckFailed("log.form", "A statement about the log is of another type or subject than its place says.",
                          "Ask for it again.")
    return validate(model, said.predicate)
