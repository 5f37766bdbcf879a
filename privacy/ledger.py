"""The ledger: one append-only, signed file per lineage of data, at the site that owns the data.

Guarantees: `reserve` returns only after the record is on disk (append + fsync) and only if the cumulative epsilon of
every reserve of the lineage, this one included, is within the cap; a reserve is never refunded; one process at a time
holds the file; after a failed append the object grants nothing until it is opened again, and what a crash leaves
behind counts at least every reserve that was granted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from privacy.accountant import NAME, Release, decimal_up, epsilon
from privacy.canonical import canonical, decimal
from privacy.contract import validate
from privacy.errors import CheckFailed, Refused, UsageError
from privacy.files import FileLayer
from privacy.identity import Signer
from privacy.ledger_chain import (
    ZERO,
    Body,
    Chain,
    Close,
    Commit,
    Head,
    LedgerSummary,
    Open,
    Reserve,
    check_extract,
    sign_record,
    split_lines,
)
from privacy.mechanism import ADJACENCIES, UNITS, DpMechanism

__all__ = ["Head", "Ledger", "LedgerSummary", "check_extract"]


class _Line(NamedTuple):
    run: str  # "" for the record that opens the lineage
    data: bytes


class Ledger:
    """An open ledger; it holds the file's lease until `close`. Use it as a context manager, from one thread."""

    def __init__(self, fd: int, chain: Chain, lines: list[_Line], signer: Signer, files: FileLayer) -> None:
        """For `create` and `open` only."""
        self._fd, self._chain, self._lines, self._signer, self._files = fd, chain, lines, signer, files
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
        files = files or FileLayer()
        with _writing():
            fd = files.open_append(path)
        try:
            data = _read(fd)
            if b"\n" in data:
                raise Refused("ledger.exists", f"{path.name} is a ledger already.", "Open it, or choose a new lineage.")
            if data:  # a creation that was interrupted
                with _writing():
                    files.truncate(fd, 0)
            ledger = cls(fd, Chain(signer.certificate), [], signer, files)
            ledger._append(first)
            with _writing():
                _sync_folder(path.parent)
        except BaseException:
            files.close(fd)
            raise
        return ledger

    @classmethod
    def open(cls, path: Path, signer: Signer, files: FileLayer | None = None) -> Ledger:
        """Take the lease, verify every record and signature, cut off a torn last line (it was never synced).

        Raises CheckFailed `ledger.broken`; Refused `file.leased`, `ledger.write_failed`; UsageError `ledger.missing`.
        """
        if not path.exists():
            raise UsageError("ledger.missing", f"There is no ledger {path.name}.", "Check the path, or create it.")
        files = files or FileLayer()
        with _writing():
            fd = files.open_append(path)
        try:
            data = _read(fd)
            lines, end = split_lines(data)
            chain = Chain(signer.certificate)
            kept = [_Line(_run_of(chain.add(line)), line) for line in lines]
            _ = chain.opened
            if end < len(data):
                with _writing():
                    files.truncate(fd, end)
        except BaseException:
            files.close(fd)
            raise
        return cls(fd, chain, kept, signer, files)

    # Charging --------------------------------------------------------------------------------------------------------

    def reserve(self, mechanism: DpMechanism, *, run: str, contract: str, round: int, attempt: int, code: str,
                approver: str) -> int:
        """Charge one round before anything of it is sampled, and return the record's seq: the right to go on.

        Nothing is appended when it is refused. Raises Refused `budget.exhausted`, `ledger.duplicate`,
        `ledger.run_closed`, `ledger.mismatch` (unit, adjacency or delta differ from the lineage's),
        `ledger.write_failed`, `ledger.unusable`; UsageError `dp.unsupported` (trust=none), `dp.too_many_classes`,
        `config.invalid` (a malformed id).
        """
        self._check_usable()
        self._check_mechanism(mechanism)
        self._check_open(run)
        if (run, round, attempt) in self._chain.slots:
            raise Refused("ledger.duplicate", f"Round {round}, attempt {attempt} of this run is reserved already.",
                          "Send the stored reply again, or start a new attempt.")
        total = decimal_up(self._epsilon([Release(mechanism.q, mechanism.sigma, mechanism.steps)]))
        if not self._within_cap(total):
            raise Refused("budget.exhausted", f"The round would bring epsilon to {total}, over the cap {self.cap}.",
                          "End the job; only data that this lineage never used has a budget left.")
        head = self._chain.head
        return self._append(validate(Reserve, {
            "seq": head.seq + 1, "prev": head.hash, "kind": "reserve", "run": run, "contract": contract,
            "round": round, "attempt": attempt, "sampler": mechanism.sampler, "q": decimal(mechanism.q),
            "clip": decimal(mechanism.clip), "sigma": decimal(mechanism.sigma), "planned_steps": mechanism.steps,
            "epsilon": total, "accountant": NAME, "code": code, "approver": approver}))

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
        head = self._chain.head
        self._append(Commit(seq=head.seq + 1, prev=head.hash, run=reserve.run, contract=reserve.contract,
                            round=reserve.round, attempt=reserve.attempt, reserve=reserve_seq,
                            executed_steps=executed_steps))

    def close_run(self, run: str) -> None:
        """End a job: no record of that run follows. Raises Refused `ledger.run_closed`, `ledger.write_failed`."""
        self._check_usable()
        self._check_open(run)
        head = self._chain.head
        self._append(Close(seq=head.seq + 1, prev=head.hash, run=run, head_epsilon=decimal_up(self._epsilon([]))))

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
        """What `epsilon` may still grow by. Epsilons do not add up: ask `planned_fits` about a schedule."""
        return float(max(Decimal(0), Decimal(self._chain.opened.cap) - Decimal(decimal_up(self._epsilon([])))))

    def planned_fits(self, mechanism: DpMechanism, rounds: int, *, cap: float | None = None) -> bool:
        """Would that many more rounds (retries counted) stay within the lineage's cap, and a lower one if given?

        Raises as `reserve` does for a mechanism that the lineage doesn't cover.
        """
        self._check_mechanism(mechanism)
        schedule = Release(mechanism.q, mechanism.sigma, mechanism.steps * rounds)
        total = decimal_up(self._epsilon([schedule]))
        return self._within_cap(total) and (cap is None or float(total) <= cap)

    def summary(self) -> LedgerSummary:
        """Everything verified so far."""
        return self._chain.summary()

    def check_head(self, head: Head) -> None:
        """Raises CheckFailed `ledger.rolled_back` unless this ledger contains a head that others witnessed."""
        if not 0 <= head.seq < len(self._chain.hashes) or self._chain.hashes[head.seq] != head.hash:
            raise CheckFailed("ledger.rolled_back", f"The ledger lacks the witnessed record {head.seq}.",
                              "Bring back the newest copy of the ledger; this one would spend the budget twice.")

    def extract(self, run: str) -> bytes:
        """JSON lines from the first record to the run's closing one (or the head): this run's records and the `open`
        record whole, those of other runs as commitments {"seq", "hash"}."""
        out = []
        for seq, (line, hash_) in enumerate(zip(self._lines, self._chain.hashes, strict=True)):
            out.append(line.data if line.run in ("", run) else canonical({"seq": seq, "hash": hash_}))
        closing = self._chain.closes.get(run)
        return b"\n".join(out[:closing.seq + 1 if closing else None]) + b"\n"

    def close(self) -> None:
        """Give the lease back. The object grants nothing afterwards."""
        if self._fd >= 0:
            self._files.close(self._fd)
        self._fd, self._usable = -1, False

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _append(self, body: Body) -> int:
        """Sign, append, fsync; only then does the record count as written. Unusable if anything goes wrong between."""
        line, hash_ = sign_record(body, self._signer)
        self._usable = False
        with _writing():
            self._files.append(self._fd, line)
        self._chain.take(body, hash_)
        self._lines.append(_Line(_run_of(body), line[:-1]))
        self._usable = True
        return body.seq

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

    def _epsilon(self, more: list[Release]) -> float:
        return epsilon([*(r.release for r in self._chain.reserves.values()), *more], self.delta)

    def _within_cap(self, total: str) -> bool:
        return Decimal(total) <= Decimal(self._chain.opened.cap)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise Refused("ledger.write_failed", f"The ledger can't be written ({e.strerror or type(e).__name__}).",
                      "Free or repair the disk, then start the job again.") from e


def _run_of(body: Body | None) -> str:
    return "" if body is None or isinstance(body, Open) else body.run


def _read(fd: int) -> bytes:
    """All bytes of the leased file: through its descriptor, so that no other file can take its place."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _sync_folder(path: Path) -> None:
    """Make a new file's name durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
