"""The machine dies at every system call of random histories: whatever had been granted is in the ledger afterwards.

The calls that the real file layer makes go through a `Machine`, which splits writes, remembers what was synced, and
stops for good at a chosen point. What was not synced is then kept whole, by half, or not at all. The count of noise draws
is kept apart from the ledger.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from ledger_fixture import CONTRACT, LINEAGE, Crash, SelfSigner, create, mechanism

import privacy.files
import privacy.ledger_file
from fl_client import lineage
from privacy.errors import ConsiloError, Refused
from privacy.files import FileLayer
from privacy.ledger import Head, Ledger, _Line
from privacy.ledger_chain import run_of
from privacy.ledger_records import sign_record

SIGNER = SelfSigner()
EXPECTED = ("budget.exhausted", "budget.not_encumbered", "ledger.run_closed")  # what a history may be told
HISTORIES, LEAST = 12, 1000


class Machine:
    """`os` as the file layer sees it. Every call has a point before and one after it takes effect."""

    def __init__(self, seed: int, stop_at: int = -1) -> None:
        self.calls, self._stop_at, self._rng = 0, stop_at, random.Random(seed)
        self._paths: dict[int, Path] = {}
        self._durable: dict[Path, bytes | None] = {}  # None: not even the name
        self._replaced: dict[Path, bytes | None] = {}  # what stood under a name that was taken since the folder's sync
        self._dead = False

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def _point(self) -> None:
        self.calls += 1
        self._dead |= self.calls == self._stop_at
        if self._dead:
            raise Crash

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        self._point()
        self._durable.setdefault(path, path.read_bytes() if path.is_file() else None)
        fd = os.open(path, flags, mode)
        self._paths[fd] = path
        self._point()
        return fd

    def write(self, fd: int, data: bytes) -> int:
        self._point()
        done = os.write(fd, data[:self._rng.randint(1, len(data))])
        self._point()
        return done

    def fsync(self, fd: int) -> None:
        self._point()
        path = self._paths[fd]
        if path.is_file():
            self._durable[path] = path.read_bytes()
        else:
            self._replaced.clear()  # a folder: its names are durable now
        self._point()

    def replace(self, source: Path, target: Path) -> None:
        self._point()
        self._replaced[target] = target.read_bytes() if target.exists() else None
        os.rename(source, target)  # noqa: PTH104 - Path.replace is the call that ends here
        self._durable[target] = self._durable.pop(source)
        self._point()

    def ftruncate(self, fd: int, size: int) -> None:
        self._point()
        os.ftruncate(fd, size)
        self._point()

    def close(self, fd: int) -> None:
        self._point()
        os.close(fd)
        del self._paths[fd]
        self._point()

    def power_off(self, keep: float) -> None:
        """Every process is gone; of what was not synced, a share is left."""
        for fd in self._paths:
            os.close(fd)
        for path, durable in self._durable.items():
            if not path.is_file():
                continue
            now, old = path.read_bytes(), durable or b""
            if now.startswith(old):
                path.write_bytes(old + now[len(old):len(old) + int(keep * (len(now) - len(old)))])
            elif keep < 1:
                path.write_bytes(old)
            if durable is None and keep == 0:
                path.unlink()
        for path, old_file in self._replaced.items():
            if keep == 0 and old_file is None:
                path.unlink(missing_ok=True)
            elif keep == 0 and old_file is not None:
                path.write_bytes(old_file)


@dataclass
class Site:
    """What the site knows by itself: each noise draw, and the newest head that the ledger acknowledged."""

    draws: list[tuple[str, int, int]] = field(default_factory=list)
    head: Head | None = None
    rounds: int = 0


def reserve_then_draw(ledger: Ledger, site: Site, run: str, round_no: int) -> None:
    seq = ledger.reserve(mechanism(), run=run, contract=CONTRACT, round=round_no, attempt=0, code="0", approver="a")
    site.draws.append((run, round_no, 0))
    ledger.commit(seq, 1)


def draw_then_reserve(ledger: Ledger, site: Site, run: str, round_no: int) -> None:
    """Planted."""
    site.draws.append((run, round_no, 0))
    reserve_then_draw(ledger, Site(), run, round_no)


def commit_then_reserve(ledger: Ledger, site: Site, run: str, round_no: int) -> None:
    """Planted."""
    ledger.commit(ledger.head.seq + 1, 1)
    reserve_then_draw(ledger, site, run, round_no)


class NoSync(FileLayer):
    """Planted: an append that leaves its bytes to the kernel."""

    def append(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[privacy.files.os.write(fd, view):]


class CommitFirst(Ledger):
    """Planted: the commit reaches the disk before its reserve."""

    def _append(self, body):
        line, hash_ = sign_record(body, self._signer)
        self._chain.take(body, hash_)
        self._lines.append(_Line(run_of(body), line[:-1]))
        if body.kind == "reserve":
            self.late = line
        else:
            self._file.append(line)
            if body.kind == "commit":
                self._file.append(self.late)
        return body.seq


def history(seed: int, path: Path, site: Site, step=reserve_then_draw, files=FileLayer, kind=Ledger) -> None:
    """One site's random life: jobs that encumber, train, are refused, closed; and restarts in between."""
    rng = random.Random(seed)
    ledger = create(path, SIGNER, files=files(), kind=kind, cap=0.4)
    runs = [f"{rng.getrandbits(128):032x}" for _ in range(2)]
    for action in ["encumber", *rng.choices(("encumber", "train", "refuse", "register", "close", "restart"),
                                            (3, 8, 2, 1, 1, 2), k=9)]:
        site.head = ledger.head
        run = rng.choice(runs)
        try:
            match action:
                case "encumber":
                    ledger.encumber(run, [[(mechanism(), 4)]], contract=CONTRACT, approver="a")
                case "train":
                    site.rounds += 1
                    step(ledger, site, run, site.rounds)
                case "refuse":
                    ledger.refuse("policy.epsilon", run, CONTRACT, rng.choice(("job", "round")))
                case "register":
                    ledger.register("a")
                case "close":
                    ledger.close_run(run)
                case "restart":
                    ledger.close()
                    ledger = kind.open(path, SIGNER, files())
        except Refused as e:
            assert e.code in EXPECTED, e.code
    ledger.close()


def check(path: Path, site: Site, seed: int) -> None:
    """What the ledger says after the crash, perhaps after a second crash while it is opened."""
    if not path.exists() or b"\n" not in path.read_bytes():
        assert not site.draws and site.head is None
        create(path, SIGNER).close()  # an interrupted creation is taken up again
        return
    with Ledger.open(path, SIGNER) as ledger:
        reserves = ledger.summary().reserves
        assert {(r.run, r.round, r.attempt) for r in reserves} >= set(site.draws), "a draw is missing"
        assert len(site.draws) <= len(reserves) <= len(site.draws) + 1, "draws and reserves"
        if site.head:
            ledger.check_head(site.head)
        ledger.register("after the crash")


def crashes(monkeypatch, tmp_path: Path, seeds: range, points: int | None = None, **planted) -> int:
    """Kill every history at every point (or at `points` of them), and check; returns how many points there were."""
    killed = 0
    for seed in seeds:
        whole = Machine(seed)
        run_on(monkeypatch, whole, seed, tmp_path / f"{seed}.jsonl", Site(), planted)
        stops = list(range(1, whole.calls + 1))
        for stop in stops if points is None else random.Random(seed).sample(stops, min(points, len(stops))):
            path, site, machine = tmp_path / f"{seed}-{stop}" / f"{LINEAGE}.jsonl", Site(), Machine(seed, stop)
            path.parent.mkdir()
            with pytest.raises(Crash):
                run_on(monkeypatch, machine, seed, path, site, planted)
            rng = random.Random(seed * 10_000 + stop)
            machine.power_off(rng.choice((0.0, 0.5, 1.0)))
            if path.exists() and b"\n" in path.read_bytes():  # and once more while it recovers
                again = Machine(seed, rng.randint(1, 8))
                with on(monkeypatch, again), suppress(Crash):
                    Ledger.open(path, SIGNER).close()
                again.power_off(rng.choice((0.0, 0.5, 1.0)))
            check(path, site, seed)
            killed += 1
    return killed


@contextmanager
def on(monkeypatch, machine: Machine) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(privacy.files, "os", machine)
        patch.setattr(privacy.ledger_file, "os", machine)
        patch.setattr(Path, "replace", lambda source, target: machine.replace(source, target))
        yield


def run_on(monkeypatch, machine: Machine, seed: int, path: Path, site: Site, planted) -> None:
    with on(monkeypatch, machine):
        history(seed, path, site, **planted)


def test_case_24_killed_at_every_system_call_never_undercounts(monkeypatch, tmp_path):
    assert crashes(monkeypatch, tmp_path, range(HISTORIES)) >= LEAST


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_case_24_killed_at_every_system_call_of_many_histories(monkeypatch, tmp_path):
    assert crashes(monkeypatch, tmp_path, range(1000, 1200)) >= 15_000


def registered(path: Path, machine: Machine, monkeypatch, register) -> None:
    """A lineage of two records; the operator adds a third, and the machine may stop."""
    stored = path.with_suffix(".tags")
    lineage.check(stored, lineage.tags(bytes(32), [b"1", b"2"]), new=True)
    with on(monkeypatch, machine):
        ledger = Ledger.open(path, SIGNER)
        register(ledger, stored, lineage.tags(bytes(32), [b"3"]), "a")
        ledger.close()


def check_registration(monkeypatch, tmp_path: Path, register) -> int:
    """Tags are the old or the new ones, whole, and new ones never stand without their event."""
    whole = Machine(0)
    for stop in (-1, *range(1, 1000)):
        path, machine = tmp_path / str(stop) / f"{LINEAGE}.jsonl", Machine(0, stop) if stop > 0 else whole
        if stop > whole.calls:
            return whole.calls
        path.parent.mkdir()
        create(path, SIGNER).close()
        with suppress(Crash):
            registered(path, machine, monkeypatch, register)
        machine.power_off(random.Random(stop).choice((0.0, 0.5, 1.0)))
        tags = path.with_suffix(".tags").read_bytes()
        with Ledger.open(path, SIGNER) as ledger:
            events = len(ledger.summary().registrations)
        assert len(tags) in (16, 24) and len(tags) <= 16 + 8 * events, "tags without their event"
    return 0


def store_then_record(ledger: Ledger, path: Path, found: lineage.Tags, approver: str) -> None:
    """Planted."""
    lineage._store(path, np.union1d(lineage._load(path), found))
    ledger.register(approver)


def test_killed_while_data_are_registered(monkeypatch, tmp_path):
    assert check_registration(monkeypatch, tmp_path, lineage.register) > 15


def test_planted_registration_that_stores_first_is_caught(monkeypatch, tmp_path):
    with pytest.raises(AssertionError, match="tags without their event"):
        check_registration(monkeypatch, tmp_path, store_then_record)


PLANTED = {
    "noise is drawn before the reserve": ({"step": draw_then_reserve}, "a draw is missing"),
    "the site commits before it reserves": ({"step": commit_then_reserve}, "no_reserve"),
    "an append is not synced": ({"files": NoSync}, "a draw is missing"),
    "a commit reaches the disk before its reserve": ({"kind": CommitFirst}, "broken")}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(monkeypatch, tmp_path, bug):
    planted, seen = PLANTED[bug]
    with pytest.raises((AssertionError, ConsiloError), match=seen):
        crashes(monkeypatch, tmp_path, range(3), 40, **planted)
