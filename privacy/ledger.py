"""The ledger: one append-only, signed file per lineage of data, at the site that owns the data.

Guarantees: a job gets no round that it didn't encumber at its approval, and none that another job holds. `reserve`
returns only after the record is on disk (append + fsync), and only if all that was reserved, this included, and all
that other open jobs hold is within the cap (privacy.ledger_budget says how); a reserve is never refunded. One process
at a time holds the file; after a failed append the object grants nothing until it is opened again, and what a crash
leaves behind counts at least every reserve that was granted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from privacy.accountant import NAME, Release, decimal_up, epsilon
from privacy.canonical import canonical, decimal
from privacy.contract import validate
from privacy.errors import CheckFailed, Refused, UsageError
from privacy.files import FileLayer
from privacy.identity import Signer
from privacy.ledger_budget import exhausted, fitting
from privacy.ledger_chain import Chain, LedgerSummary, check_extract, run_of, split_lines
from privacy.ledger_file import LedgerFile
from privacy.ledger_records import (
    ZERO,
    Body,
    Charge,
    Close,
    Commit,
    Encumber,
    Head,
    Open,
    Record,
    Refusal,
    Register,
    Reserve,
    at_most,
    charge,
    schedule,
    sign_record,
)
from privacy.mechanism import ADJACENCIES, UNITS, DpMechanism

__all__ = ["Head", "Ledger", "LedgerSummary", "check_extract"]
R = TypeVar("R", bound=Record)


class _Line(NamedTuple):
    run: str  # "" for records of the lineage itself
    data: bytes


class Ledger:
    """An open ledger; it holds the file's lease until `close`. Use it as a context manager, from one thread."""

    def __init__(self, file: LedgerFile, chain: Chain, lines: list[_Line], signer: Signer) -> None:
        """For `create` and `open` only."""
        self._file, self._chain, self._lines, self._signer = file, chain, lines, signer
        self._usable = True

    @classmethod
    def create(cls, path: Path, signer: Signer, *, lineage: str, unit: str, adjacency: str, delta: float, cap: float,
               files: FileLayer | None = None) -> Ledger:
        """Start a lineage: a random 32-hex id, and the largest epsilon at `delta` for the life of its data.

        Raises Refused `ledger.exists`, `file.leased`, `ledger.write_failed`; UsageError `dp.parameter`,
        `dp.unsupported`, `config.invalid` (a malformed id).
        """
        if not (0 < delta < 1 and cap > 0 and math.isfinite(cap)):
            raise UsageError("dp.parameter", f"delta = {delta} with cap = {cap} is not a budget.",
                             "Set delta in (0, 1) and a finite cap > 0.")
        if unit not in UNITS or adjacency not in ADJACENCIES:
            raise UsageError("dp.unsupported", f"unit={unit!r} with adjacency={adjacency!r} is not covered.",
                             f"Use unit={' or '.join(UNITS)} and adjacency={' or '.join(ADJACENCIES)}.")
        first = validate(Open, {"seq": 0, "prev": ZERO, "kind": "open", "lineage": lineage, "unit": unit,
                                "adjacency": adjacency, "delta": decimal(delta), "cap": decimal(cap)})
        file = LedgerFile(path, files or FileLayer())
        try:
            data = file.read()
            if b"\n" in data:
                raise Refused("ledger.exists", f"{path.name} is a ledger already.", "Open it, or choose a new lineage.")
            if data:  # a creation that was interrupted
                file.truncate(0)
            ledger = cls(file, Chain(signer.certificate), [], signer)
            ledger._append(first)
            file.sync_name()
        except BaseException:
            file.close()
            raise
        return ledger

    @classmethod
    def open(cls, path: Path, signer: Signer, files: FileLayer | None = None) -> Ledger:
        """Take the lease, verify every record and signature, cut off a torn last line (it was never synced).

        Raises CheckFailed `ledger.broken`, `ledger.schema`; Refused `file.leased`, `ledger.write_failed`; UsageError
        `ledger.missing`.
        """
        if not path.exists():
            raise UsageError("ledger.missing", f"There is no ledger {path.name}.", "Check the path, or create it.")
        file = LedgerFile(path, files or FileLayer())
        try:
            data = file.read()
            lines, end = split_lines(data)
            chain = Chain(signer.certificate)
            kept = [_Line(run_of(chain.add(line)), line) for line in lines]
            _ = chain.opened
            if end < len(data):
                file.truncate(end)
            file.sync()
        except BaseException:
            file.close()
            raise
        return cls(file, chain, kept, signer)

    # Charging --------------------------------------------------------------------------------------------------------

    def encumber(self, run: str, plans: Sequence[Iterable[tuple[DpMechanism, int]]], *, contract: str, approver: str,
                 cap: float | None = None) -> Encumber:
        """Hold a job's whole schedule for it, before its first round. A run that holds the same already goes on.

        plans: every way in which its rounds and retries can be spent (`Contract.plans`). The costliest has to fit the
        cap, and `cap` if that is lower, together with all that was reserved and all that other open jobs hold. Raises
        Refused `budget.exhausted`, `budget.not_encumbered` (the run holds or reserved another schedule), and as
        `reserve` does.
        """
        self._check_usable()
        self._check_open(run)
        for plan in plans:
            for mechanism, _ in plan:
                self._check_mechanism(mechanism)
        wanted, drawn, held = schedule(plans), self._drawn(run), self._chain.encumbrances.get(run)
        if held is not None and (held.contract, held.schedule) != (contract, wanted):
            raise _not_encumbered("This run holds the schedule of another contract.")
        if not wanted.covers(drawn):
            raise _not_encumbered("This run has reserved other rounds than its contract's.")
        total, enforced = (held.epsilon, held.enforced) if held else fitting(self._chain, run, wanted.left(drawn))
        if cap is not None and not at_most(total, cap):
            raise exhausted(total, cap)
        if held is None:
            held = self._next(Encumber, run=run, contract=contract, classes=wanted.classes, plans=wanted.plans,
                              epsilon=total, accountant=NAME, enforced=enforced, approver=approver)
            self._append(held)
        return held

    def reserve(self, mechanism: DpMechanism, *, run: str, contract: str, round: int, attempt: int, code: str,
                approver: str) -> int:
        """Charge one round before anything of it is sampled, and return the record's seq: the right to go on.

        Nothing is appended when it is refused. Raises Refused `budget.not_encumbered` (the run didn't encumber such a
        round, or has used up what it did), `budget.exhausted`, `ledger.duplicate`, `ledger.run_closed`,
        `ledger.mismatch` (unit, adjacency or delta differ from the lineage's), `ledger.write_failed`,
        `ledger.unusable`; UsageError `dp.unsupported` (trust=none), `dp.too_many_classes`, `config.invalid` (a
        malformed id).
        """
        self._check_usable()
        self._check_mechanism(mechanism)
        self._check_open(run)
        if (run, round, attempt) in self._chain.slots:
            raise Refused("ledger.duplicate", f"Round {round}, attempt {attempt} of this run is reserved already.",
                          "Send the stored reply again, or start a new attempt.")
        asked, held = charge(mechanism), self._chain.encumbrances.get(run)
        if held is None or not held.covers(self._drawn(run) + Counter([asked])):
            raise _not_encumbered("The job did not encumber this round, or has used up its rounds and retries.")
        _, enforced = fitting(self._chain, run, [[asked.release]])
        return self._append(self._next(
            Reserve, run=run, contract=contract, round=round, attempt=attempt, **asked.model_dump(), accountant=NAME,
            epsilon=decimal_up(self._epsilon([asked.release])), enforced=enforced, code=code, approver=approver))

    def commit(self, reserve_seq: int, executed_steps: int) -> None:
        """Record that a reserved round was computed. It lowers no epsilon.

        Raises Refused `ledger.no_reserve`, `ledger.run_closed`, `ledger.write_failed`, `ledger.unusable`.
        """
        self._check_usable()
        reserve = self._chain.reserves.get(reserve_seq)
        if reserve is None or reserve_seq in self._chain.commits or not 0 <= executed_steps <= reserve.planned_steps:
            raise Refused("ledger.no_reserve", f"Record {reserve_seq} is no open reserve of {executed_steps} steps.",
                          "Commit each reserve once, with at most its planned steps.")
        self._check_open(reserve.run)
        self._append(self._next(Commit, run=reserve.run, contract=reserve.contract, round=reserve.round,
                                attempt=reserve.attempt, reserve=reserve_seq, executed_steps=executed_steps))

    def close_run(self, run: str) -> None:
        """End a job: what it encumbered and never reserved is free again, and no record of that run follows.

        Raises Refused `ledger.run_closed`, `ledger.write_failed`, `ledger.unusable`.
        """
        self._check_usable()
        self._check_open(run)
        self._append(self._next(Close, run=run, head_epsilon=decimal_up(self._epsilon([])),
                                freed=self._chain.unreserved(run)))

    # Other events ----------------------------------------------------------------------------------------------------

    def refuse(self, code: str, run: str, contract: str, what: str) -> None:
        """Record that the site said no to a "job" or a "round" of it. code: one of REFUSALS; none depends on a record.

        The same refusal is recorded once, so that nobody can fill the disk by asking again. Raises Refused
        `ledger.run_closed`, `ledger.write_failed`, `ledger.unusable`; UsageError `config.invalid` (another code).
        """
        self._check_usable()
        self._check_open(run)
        body = self._next(Refusal, run=run, contract=contract, code=code, what=what)
        if not any((r.run, r.contract, r.code, r.what) == (run, contract, code, what) for r in self._chain.refusals):
            self._append(body)

    def register(self, approver: str) -> None:
        """Record that the operator added data to the lineage; how much is nobody else's business.

        Raises Refused `ledger.write_failed`, `ledger.unusable`.
        """
        self._check_usable()
        self._append(self._next(Register, approver=approver))

    # Reading ---------------------------------------------------------------------------------------------------------

    @property
    def lineage(self) -> str:
        return self._chain.opened.lineage

    @property
    def delta(self) -> float:
        return float(self._chain.opened.delta)

    @property
    def cap(self) -> float:
        return float(self._chain.opened.cap)

    @property
    def head(self) -> Head:
        return self._chain.head

    def epsilon(self) -> float:
        """Cumulative epsilon of all reserves at the lineage's delta, rounded up at 4 decimals."""
        return float(decimal_up(self._epsilon([])))

    def remaining(self) -> float:
        """What `epsilon` may still grow by, held or not. Epsilons do not add up: `encumber` tells what fits."""
        return float(max(Decimal(0), Decimal(self._chain.opened.cap) - Decimal(decimal_up(self._epsilon([])))))

    def summary(self) -> LedgerSummary:
        """Everything verified so far."""
        return self._chain.summary()

    def check_head(self, head: Head) -> None:
        """Raises CheckFailed `ledger.rolled_back` unless this ledger contains a head that others witnessed."""
        if not 0 <= head.seq < len(self._chain.hashes) or self._chain.hashes[head.seq] != head.hash:
            raise CheckFailed("ledger.rolled_back", f"The ledger lacks the witnessed record {head.seq}.",
                              "Bring back the newest copy of the ledger; this one would spend the budget twice.")

    def extract(self, run: str) -> bytes:
        """JSON lines from the first record to the run's closing one (or the head): records of this run and of the
        lineage itself whole, those of other runs as commitments {"seq", "hash"}."""
        out = []
        for seq, (line, hash_) in enumerate(zip(self._lines, self._chain.hashes, strict=True)):
            out.append(line.data if line.run in ("", run) else canonical({"seq": seq, "hash": hash_}))
        closing = self._chain.closes.get(run)
        return b"\n".join(out[:closing.seq + 1 if closing else None]) + b"\n"

    def close(self) -> None:
        """Give the lease back. The object grants nothing afterwards."""
        self._file.close()
        self._usable = False

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _next(self, kind: type[R], **fields: Any) -> R:
        """The body of the next record. Raises UsageError `config.invalid`."""
        head = self._chain.head
        return validate(kind, {"seq": head.seq + 1, "prev": head.hash, **fields})

    def _append(self, body: Body) -> int:
        """Sign, append, fsync; only then does the record count as written. Unusable if anything goes wrong between."""
        line, hash_ = sign_record(body, self._signer)
        self._usable = False
        self._file.append(line)
        self._chain.take(body, hash_)
        self._lines.append(_Line(run_of(body), line[:-1]))
        self._usable = True
        return body.seq

    def _drawn(self, run: str) -> Counter[Charge]:
        return self._chain.drawn.get(run, Counter())

    def _epsilon(self, more: list[Release]) -> float:
        return epsilon([*(r.release for r in self._chain.reserves.values()), *more], self.delta)

    def _check_usable(self) -> None:
        if not self._usable:
            raise Refused("ledger.unusable", "The ledger is closed, or its last write failed.",
                          "Open it again; what it then shows is what was spent.")

    def _check_open(self, run: str) -> None:
        if run in self._chain.closes:
            raise Refused("ledger.run_closed", "This run was closed in the ledger.", "Start a new run.")

    def _check_mechanism(self, mechanism: DpMechanism) -> None:
        if not mechanism.private:
            raise UsageError("dp.unsupported", "A round without privacy can't be charged to a ledger.",
                             "Keep non-private runs away from the ledger; their report says NON-PRIVATE.")
        lineage = self._chain.opened
        for name, ours, theirs in (("unit", lineage.unit, mechanism.unit),
                                   ("adjacency", lineage.adjacency, mechanism.adjacency),
                                   ("delta", self.delta, mechanism.delta)):
            if ours != theirs:
                raise Refused("ledger.mismatch", f"The mechanism has {name} {theirs}, the lineage {ours}.",
                              "Use the lineage's unit, adjacency and delta in the contract.")


def _not_encumbered(why: str) -> Refused:
    return Refused("budget.not_encumbered", why, "End the job; a new contract encumbers what it needs at its approval.")
