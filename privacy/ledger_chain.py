"""Ledger records and the one place that verifies them; pure, without a disk. The format is docs/evidence-format.md.

Guarantees: a chain that `Chain` accepted is one unbroken sequence from its `open` record, every visible record is
canonical, hashed and (given a certificate) signed as it stands, no (run, round, attempt) is reserved twice, a commit
belongs to a reserve of its own, a closed run gets no more records, and no reserve exceeds the cap by its own figure.
It can't show that the tail is the newest (a witnessed head does) nor that the figures are right (recompute them).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from privacy.accountant import Release
from privacy.canonical import canonical, digest, parse
from privacy.errors import CheckFailed, ConsiloError
from privacy.identity import Signer, public_key, verify_signature

DOMAIN = b"consilo.ledger/1\n"  # what a record's signature covers, before its hash
ZERO = "0" * 64
MAX_LINE_BYTES = 16 * 1024  # a reserve with the longest strings takes 3 KiB

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Number = Annotated[str, Field(pattern=r"^[0-9]{1,20}(\.[0-9]{1,30})?(e[+-]?[0-9]{1,2})?$")]
Text = Annotated[str, Field(min_length=1, max_length=200)]


class Head(NamedTuple):
    """A record named by its place and hash: what witnesses countersign."""

    seq: int
    hash: str


class Record(BaseModel):
    """Body of a record. Numbers that are not counts are decimal strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
    schema_: Literal["consilo.ledger/1"] = Field(default="consilo.ledger/1", alias="schema")
    seq: Count
    prev: Hash


class Open(Record):
    kind: Literal["open"] = "open"
    lineage: Id
    unit: Text
    adjacency: Text
    delta: Number
    cap: Number


class Reserve(Record):
    kind: Literal["reserve"] = "reserve"
    run: Id
    contract: Hash
    round: Positive
    attempt: Count
    sampler: Text
    q: Number
    clip: Number
    sigma: Number
    planned_steps: Positive
    epsilon: Number
    accountant: Text
    code: Text
    approver: Text

    @property
    def release(self) -> Release:
        """What it is charged as: its planned steps, whatever was executed."""
        return Release(float(self.q), float(self.sigma), self.planned_steps)


class Commit(Record):
    kind: Literal["commit"] = "commit"
    run: Id
    contract: Hash
    round: Positive
    attempt: Count
    reserve: Count
    executed_steps: Count


class Close(Record):
    kind: Literal["close"] = "close"
    run: Id
    head_epsilon: Number


Body = Open | Reserve | Commit | Close
_BODY: TypeAdapter[Body] = TypeAdapter(Annotated[Body, Field(discriminator="kind")])


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
        self.commitments = 0

    @property
    def opened(self) -> Open:
        if self._opened is None:
            raise broken(0, "there is no record")
        return self._opened

    def add(self, line: bytes) -> Body | None:
        """Verify the next line (without its newline) and take it in; None for a commitment.

        Raises CheckFailed `ledger.broken`.
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
            if self._certificate is not None:
                verify_signature(self._certificate, base64.b64decode(document["signature"], validate=True),
                                 DOMAIN + bytes.fromhex(document["hash"]))
            body = _BODY.validate_python(document["body"])
            self.take(body, document["hash"])
            return body
        except CheckFailed:
            raise
        except (ConsiloError, ValidationError, binascii.Error, TypeError, ValueError) as e:
            raise broken(seq, f"the record is malformed or its signature is wrong ({type(e).__name__})") from e

    def take(self, body: Body, hash_: str) -> None:
        """Check a body against the records before it and make it the head. Raises CheckFailed `ledger.broken`."""
        seq = self.head.seq + 1
        if body.seq != seq or body.prev != self.head.hash:
            raise broken(seq, "it does not follow the record before it")
        if isinstance(body, Open) != (seq == 0):
            raise broken(seq, "the first record, and no other, opens a lineage")
        if not isinstance(body, Open) and body.run in self.closes:
            raise broken(seq, "its run was closed before")
        if isinstance(body, Open):
            self._opened = body
        elif isinstance(body, Reserve):
            slot = (body.run, body.round, body.attempt)
            if slot in self.slots:
                raise broken(seq, "its round and attempt were reserved before")
            if Decimal(body.epsilon) > Decimal(self.opened.cap):
                raise broken(seq, "its epsilon exceeds the cap")
            self._chargeable(body)
            self.slots.add(slot)
            self.reserves[seq] = body
        elif isinstance(body, Commit):
            reserve = self.reserves.get(body.reserve)
            if reserve is None or body.reserve in self.commits or body.executed_steps > reserve.planned_steps or (
                    (body.run, body.contract, body.round, body.attempt)
                    != (reserve.run, reserve.contract, reserve.round, reserve.attempt)):
                raise broken(seq, "it commits no reserve of its own")
            self.commits[body.reserve] = body
        else:
            self.closes[body.run] = body
        self._advance(hash_)

    def summary(self) -> LedgerSummary:
        """Raises CheckFailed `ledger.broken` when there is no record at all."""
        o = self.opened
        last = next(reversed(self.reserves.values()), None)
        return LedgerSummary(lineage=o.lineage, unit=o.unit, adjacency=o.adjacency, delta=float(o.delta),
                             cap=float(o.cap), epsilon=last.epsilon if last else "0.0", head=self.head,
                             reserves=tuple(self.reserves.values()), commits=tuple(self.commits.values()),
                             closes=tuple(self.closes.values()), commitments=self.commitments)

    def _commitment(self, document: dict[str, Any]) -> None:
        seq, hash_ = document["seq"], document["hash"]
        if self.head.seq < 0 or type(seq) is not int or seq != self.head.seq + 1:
            raise broken(self.head.seq + 1, "a commitment is out of order")
        if not isinstance(hash_, str) or len(bytes.fromhex(hash_)) != 32 or hash_ != hash_.lower():
            raise broken(seq, "a commitment is not a hash")
        self.commitments += 1
        self._advance(hash_)

    def _chargeable(self, body: Reserve) -> None:
        try:
            _ = body.release
        except ConsiloError as e:
            raise broken(body.seq, "its mechanism has parameters that can't be") from e

    def _advance(self, hash_: str) -> None:
        self.hashes.append(hash_)
        self.head = Head(self.head.seq + 1, hash_)


def sign_record(body: Body, signer: Signer) -> tuple[bytes, str]:
    """The line of a record, newline included, and its hash."""
    value = body.model_dump(mode="json", by_alias=True)
    hash_ = digest(value)
    signature = base64.b64encode(signer.sign(DOMAIN + bytes.fromhex(hash_))).decode()
    return canonical({"body": value, "hash": hash_, "signature": signature}) + b"\n", hash_


def split_lines(data: bytes) -> tuple[list[bytes], int]:
    """Complete lines, and how many bytes they take with their newlines; what follows was never synced."""
    end = data.rfind(b"\n") + 1
    return (data[:end - 1].split(b"\n") if end else []), end


def check_extract(data: bytes, certificate: x509.Certificate | None) -> LedgerSummary:
    """Verify a ledger, or an extract in which lines of other runs are commitments.

    A certificate of None leaves signatures unchecked. Raises CheckFailed `ledger.broken`.
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
