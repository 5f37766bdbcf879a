"""The one place that verifies a ledger's records; pure, without a disk. The format is docs/evidence-format.md.

Guarantees: a chain that `Chain` accepted is one unbroken sequence from its `open` record, every visible record is
canonical, hashed and (given a certificate) signed as it stands, no (run, round, attempt) is reserved twice, every
reserve draws on what its run encumbered before, a commit belongs to a reserve of its own, a closed run gets no more
records, and neither reserve nor encumbrance exceeds the cap by its own figure. It can't
show that the tail is the newest (a witnessed head does) nor that the figures are right (recompute them).
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from privacy.canonical import canonical, digest, parse
from privacy.errors import CheckFailed, ConsiloError
from privacy.identity import public_key, verify_signature
from privacy.ledger_records import (
    V1,
    V2,
    ZERO,
    Body,
    Charge,
    Close,
    Commit,
    Encumber,
    Head,
    Open,
    Refusal,
    Register,
    Reserve,
    at_most,
    domain,
    read_body,
)

MAX_LINE_BYTES = 16 * 1024  # an encumbrance with 16 classes and the longest strings takes 10 KiB


@dataclass(frozen=True, kw_only=True)
class LedgerSummary:
    """A verified ledger or extract. `commitments` counts records of other runs, known by their hash alone; `epsilon`
    is what the last visible reserve states ("0.0" before the first)."""

    lineage: str
    unit: str
    adjacency: str
    delta: float
    cap: float
    epsilon: str
    head: Head
    reserves: tuple[Reserve, ...]
    commits: tuple[Commit, ...]
    closes: tuple[Close, ...]
    encumbrances: tuple[Encumber, ...]
    refusals: tuple[Refusal, ...]
    registrations: tuple[Register, ...]
    commitments: int


class Chain:
    """The records of one lineage, in order. `certificate` None leaves signatures unchecked."""

    def __init__(self, certificate: x509.Certificate | None, *, commitments: bool = False) -> None:
        if certificate is not None and not isinstance(public_key(certificate), Ed25519PublicKey):
            raise broken(0, "the certificate is not an Ed25519 one")
        self._certificate, self._allow_commitments = certificate, commitments
        self._opened: Open | None = None
        self.head = Head(-1, ZERO)
        self.hashes: list[str] = []
        self.reserves: dict[int, Reserve] = {}
        self.slots: set[tuple[str, int, int]] = set()
        self.commits: dict[int, Commit] = {}
        self.closes: dict[str, Close] = {}
        self.encumbrances: dict[str, Encumber] = {}
        self.drawn: dict[str, Counter[Charge]] = {}  # rounds that a run reserved, by mechanism
        self.refusals: list[Refusal] = []
        self.registrations: list[Register] = []
        self.commitments = 0
        self._schema = V1

    @property
    def opened(self) -> Open:
        if self._opened is None:
            raise broken(0, "there is no record")
        return self._opened

    def add(self, line: bytes) -> Body | None:
        """Verify the next line (without its newline) and take it in; None for a commitment.

        Raises CheckFailed `ledger.broken`, `ledger.schema`.
        """
        seq = self.head.seq + 1
        if len(line) > MAX_LINE_BYTES:
            raise broken(seq, "the line is too long")
        try:
            document = parse(line)
            if canonical(document) != line or not isinstance(document, dict):
                raise broken(seq, "the line is not in canonical form")
            if self._allow_commitments and document.keys() == {"seq", "hash"}:
                self._commitment(document)
                return None
            if document.keys() != {"body", "hash", "signature"}:
                raise broken(seq, "the line has other fields than a record")
            if digest(document["body"]) != document["hash"]:
                raise broken(seq, "the hash is not that of the body")
            body = read_body(document["body"])
            if self._certificate is not None:
                verify_signature(self._certificate, base64.b64decode(document["signature"], validate=True),
                                 domain(body.schema_) + bytes.fromhex(document["hash"]))
            self.take(body, document["hash"])
            return body
        except CheckFailed:
            raise
        except (ConsiloError, ValidationError, binascii.Error, KeyError, TypeError, ValueError) as e:
            raise broken(seq, f"the record is malformed or its signature is wrong ({type(e).__name__})") from e

    def take(self, body: Body, hash_: str) -> None:
        """Check a body against the records before it and make it the head. Raises CheckFailed `ledger.broken`."""
        seq = self.head.seq + 1
        if body.seq != seq or body.prev != self.head.hash:
            raise broken(seq, "it does not follow the record before it")
        if isinstance(body, Open) != (seq == 0):
            raise broken(seq, "the first record, and no other, opens a lineage")
        if body.schema_ == V1 and self._schema == V2:
            raise broken(seq, "its schema is older than that of the record before it")
        if run_of(body) in self.closes:
            raise broken(seq, "its run was closed before")
        match body:
            case Open():
                self._opened = body
            case Register():
                self.registrations.append(body)
            case Encumber():
                self._encumber(body)
            case Reserve():
                self._reserve(body)
            case Commit():
                self._commit(body)
            case Refusal():
                self.refusals.append(body)
            case Close():
                if body.freed != self.unreserved(body.run):
                    raise broken(seq, "it frees another number of rounds than its run still held")
                self.closes[body.run] = body
        self._schema = body.schema_
        self._advance(hash_)

    def unreserved(self, run: str) -> int:
        """Rounds and retries that a run encumbered and never reserved."""
        held = self.encumbrances.get(run)
        return held.rounds - self.drawn.get(run, Counter()).total() if held else 0

    def is_shared(self, run: str) -> bool:
        """Whether another run ever encumbered or reserved anything that is visible here."""
        return not self.encumbrances.keys() | self.drawn.keys() <= {run}

    def summary(self) -> LedgerSummary:
        """Raises CheckFailed `ledger.broken` when there is no record at all."""
        o = self.opened
        last = next(reversed(self.reserves.values()), None)
        return LedgerSummary(lineage=o.lineage, unit=o.unit, adjacency=o.adjacency, delta=float(o.delta),
                             cap=float(o.cap), epsilon=last.epsilon if last else "0.0", head=self.head,
                             reserves=tuple(self.reserves.values()), commits=tuple(self.commits.values()),
                             closes=tuple(self.closes.values()), encumbrances=tuple(self.encumbrances.values()),
                             refusals=tuple(self.refusals), registrations=tuple(self.registrations),
                             commitments=self.commitments)

    def _encumber(self, body: Encumber) -> None:
        if body.run in self.encumbrances:
            raise broken(body.seq, "its run encumbered before")
        if {(len(plan), sum(plan)) for plan in body.plans} != {(len(body.classes), body.rounds)} or not body.rounds:
            raise broken(body.seq, "its plans don't hold the same number of rounds of its classes")
        if not body.covers(self.drawn.get(body.run, {})):
            raise broken(body.seq, "its run reserved other rounds before than it encumbers")
        self._charged(body, body.classes)
        self.encumbrances[body.run] = body

    def _reserve(self, body: Reserve) -> None:
        slot = (body.run, body.round, body.attempt)
        if slot in self.slots:
            raise broken(body.seq, "its round and attempt were reserved before")
        drawn, held = self.drawn.get(body.run, Counter()) + Counter([body.charge]), self.encumbrances.get(body.run)
        if body.schema_ != V1 and (held is None or not held.covers(drawn)):
            raise broken(body.seq, "its run did not encumber it")
        self._charged(body, (body,))
        self.slots.add(slot)
        self.drawn[body.run] = drawn
        self.reserves[body.seq] = body

    def _charged(self, body: Encumber | Reserve, charges: tuple[Charge, ...]) -> None:
        """The figures of a record can be, and are within the cap; with a second job, the filter admitted it."""
        if not at_most(body.epsilon, self.opened.cap):
            raise broken(body.seq, "its epsilon exceeds the cap")
        if body.schema_ != V1 and self.is_shared(body.run) and body.enforced != "pld+filter":
            raise broken(body.seq, "the lineage has a second job, and no filter admitted it")
        try:
            _ = [charge.release for charge in charges]
        except ConsiloError as e:
            raise broken(body.seq, "its mechanism has parameters that can't be") from e

    def _commit(self, body: Commit) -> None:
        reserve = self.reserves.get(body.reserve)
        if reserve is None or body.reserve in self.commits or body.executed_steps > reserve.planned_steps or (
                (body.run, body.contract, body.round, body.attempt)
                != (reserve.run, reserve.contract, reserve.round, reserve.attempt)):
            raise broken(body.seq, "it commits no reserve of its own")
        self.commits[body.reserve] = body

    def _commitment(self, document: dict[str, Any]) -> None:
        seq, hash_ = document["seq"], document["hash"]
        if self.head.seq < 0 or type(seq) is not int or seq != self.head.seq + 1:
            raise broken(self.head.seq + 1, "a commitment is out of order")
        if not isinstance(hash_, str) or len(bytes.fromhex(hash_)) != 32 or hash_ != hash_.lower():
            raise broken(seq, "a commitment is not a hash")
        self.commitments += 1
        self._advance(hash_)

    def _advance(self, hash_: str) -> None:
        self.hashes.append(hash_)
        self.head = Head(self.head.seq + 1, hash_)


def run_of(body: Body | None) -> str:
    """The run that a record belongs to; "" for those of the lineage itself."""
    return "" if body is None or isinstance(body, Open | Register) else body.run


def split_lines(data: bytes) -> tuple[list[bytes], int]:
    """Complete lines, and how many bytes they take with their newlines; what follows was never synced."""
    end = data.rfind(b"\n") + 1
    return (data[:end - 1].split(b"\n") if end else []), end


def check_extract(data: bytes, certificate: x509.Certificate | None) -> LedgerSummary:
    """Verify a ledger, or an extract in which lines of other runs are commitments.

    A certificate of None leaves signatures unchecked. Raises CheckFailed `ledger.broken`, `ledger.schema`.
    """
    lines, end = split_lines(data)
    if end != len(data):
        raise broken(len(lines), "the last line is torn")
    chain = Chain(certificate, commitments=True)
    for line in lines:
        chain.add(line)
    return chain.summary()


def broken(seq: int, why: str) -> CheckFailed:
    return CheckFailed("ledger.broken", f"Record {seq} of the ledger is refused: {why}.",
                       "Stop this lineage, keep the file as evidence, and restore the last witnessed copy.")
