"""Machines that fail: their disks, processes and clocks, in place of `os`, `time` and `datetime` in the product's modules.

A disk keeps, beside its files, what a loss of power would leave of them: bytes are durable once their file was synced, the
name of a file once its folder was. So a missing fsync is seen at once, and a crash costs what it would. Folders are
durable once made, removals at once, and what a failed fsync left becomes durable at the next one that succeeds.
Every call that changes a file is a place where its process can die, before it or after it, or the call can fail.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from unittest import mock

from simulations.chaos_plan import DISK, DISK_CALLS, Fault, Plan

OS = ("privacy.files", "privacy.ledger_file", "fl_client.journal", "fl_server.log")
TIME = ("fl_client.round", "fl_server.exchange", "fl_server.log")
NEVER = 10**9
ERRORS = {"full": errno.ENOSPC, "eio": errno.EIO}
DATETIME = ("privacy.contract", "privacy.signing", "privacy.secagg.peers")


class Crash(BaseException):
    """A process ends here, without a chance to do anything more."""


@dataclass(eq=False)
class Process:
    """trouble: what its disk does to it, at the at-th call that changes a file, and `lasts` calls long."""

    name: str
    machine: Machine
    pid: int
    trouble: Fault | None = None
    at: int = 0
    aim: str = ""  # `at` is set once the aimed-th file with this in its name is written
    aimed: int = 0
    lasts: int = 1
    alive: bool = True
    calls: int = 0
    hurt: bool = False  # a call failed
    fds: dict[int, Path] = field(default_factory=dict)

    def end(self) -> None:
        """The system closes what it had open."""
        self.alive = False
        for fd in self.fds:
            with suppress(OSError):
                os.close(fd)
        self.fds.clear()


@dataclass(eq=False)
class Machine:
    """All files below `root`. aims: parts of the names of files around which faults are worth most. ahead: seconds by
    which its clock is."""

    name: str
    root: Path
    aims: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=lambda: DISK)
    ahead: float = 0.0
    crashes: int = 0
    processes: list[Process] = field(default_factory=list)
    synced: dict[Path, bytes] = field(default_factory=dict)
    unnamed: set[Path] = field(default_factory=set)  # made since their folder was synced
    replaced: dict[Path, bytes] = field(default_factory=dict)  # what stood under a name before its folder is synced

    def durable(self, path: Path) -> bytes:
        """What is left of a file at worst if the power goes now; b"" for nothing."""
        return b"" if path in self.unnamed else self.replaced.get(path, self.synced.get(path, b""))

    def kill(self, process: Process) -> None:
        self.crashes += 1
        process.end()

    def forget(self, folder: Path) -> None:
        """It was removed."""
        self.synced = {p: data for p, data in self.synced.items() if not p.is_relative_to(folder)}
        self.replaced = {p: data for p, data in self.replaced.items() if not p.is_relative_to(folder)}

    def power_off(self, chance: random.Random) -> None:
        """All processes end; of what wasn't durable all is left, half, or nothing."""
        self.crashes += 1
        for process in self.processes:
            process.end()
        keep = chance.choice((0.0, 0.5, 1.0))
        for path, old in self.synced.items():
            now = path.read_bytes() if path.is_file() else old
            if now.startswith(old):
                left = old + now[len(old):len(old) + int(keep * (len(now) - len(old)))]
            else:
                left = now if keep == 1 else old
            if left != now:
                path.write_bytes(left)
        if keep == 0:
            for path, old in self.replaced.items():
                path.write_bytes(old)
            for path in self.unnamed:
                path.unlink(missing_ok=True)
        self.synced = {path: path.read_bytes() for path in self.synced if path.is_file()}
        self.unnamed.clear()
        self.replaced.clear()


class System:
    """`os`, `time` and `shutil` of whoever runs now: `running` says which process that is. Outside of one, files are real
    and calls never fail. Time passes only where somebody waits.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.machines, self.elapsed = plan, list[Machine](), 0.0
        self._began, self._stack, self._pids, self._lives = datetime.now(UTC), list[Process](), 1000, dict[str, int]()
        self.advance: Callable[[float], None] = self._pass

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def start(self, machine: Machine, name: str) -> Process:
        """A new process of that name, with what will befall it."""
        self._pids += 1
        life = self._lives[name] = self._lives.get(name, 0) + 1
        process = Process(name, machine, self._pids, self.plan.draw(f"{name}.life{life}.disk", machine.rates))
        if process.trouble:
            chance = process.trouble.chance
            process.at, process.lasts = chance.randint(1, DISK_CALLS), chance.choice((1, 3, 40))
            if machine.aims and chance.random() < 0.6:
                process.at, process.aim, process.aimed = NEVER, chance.choice(machine.aims), chance.randint(1, 6)
        machine.processes = [p for p in machine.processes if p.alive] + [process]
        return process

    @contextmanager
    def running(self, process: Process) -> Iterator[None]:
        self._stack.append(process)
        try:
            yield
        finally:
            self._stack.pop()

    @property
    def process(self) -> Process | None:
        return self._stack[-1] if self._stack else None

    # os ------------------------------------------------------------------------------------------------------------

    def getpid(self) -> int:
        return self.process.pid if self.process else os.getpid()

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        machine = self._machine(Path(path))
        if machine is None or flags & os.O_DIRECTORY:
            fd = os.open(path, flags, mode)
            return self._opened(fd, Path(path))
        self._call()
        new = not path.exists()
        if not new:
            machine.synced.setdefault(path, path.read_bytes())
        fd = os.open(path, flags, mode)
        if new:
            machine.unnamed.add(path)
            machine.synced[path] = b""
        self._opened(fd, path)
        self._point()
        return fd

    def write(self, fd: int, data: bytes) -> int:
        path = self._path(fd)
        if path is None:
            return os.write(fd, data)
        self._aim(path)
        self._call(lambda: os.write(fd, data[:len(data) // 2]))
        half = -(-len(data) // 2)  # a write may be short
        done = os.write(fd, data[:half])
        self._point()
        return done

    def fsync(self, fd: int) -> None:
        path = self._path(fd)
        if path is None:
            return os.fsync(fd)
        self._call()
        machine = self._machine(path)
        if machine is None:
            return None
        if path.is_dir():
            machine.unnamed = {p for p in machine.unnamed if p.parent != path}
            machine.replaced = {p: old for p, old in machine.replaced.items() if p.parent != path}
        else:
            machine.synced[path] = path.read_bytes()
        return self._point()

    def link(self, source: Path, target: Path) -> None:
        """A second name; the first one is gone soon."""
        machine = self._machine(target)
        if machine is not None:
            self._call()
        os.link(source, target)
        if machine is not None:
            machine.unnamed.add(target)
            machine.synced[target] = machine.synced.get(source, b"")
            self._point()

    def _aim(self, path: Path) -> None:
        process = self.process
        if process and process.trouble and process.aim and process.aim in path.name:
            process.aimed -= 1
            if process.aimed == 0:
                process.at = process.calls + process.trouble.chance.randint(1, 12)

    def ftruncate(self, fd: int, size: int) -> None:
        if self._path(fd) is not None:
            self._call()
        os.ftruncate(fd, size)
        self._point()

    def close(self, fd: int) -> None:
        self._alive()
        if self.process:
            self.process.fds.pop(fd, None)
        os.close(fd)

    def replace(self, source: Path, target: Path) -> Path:
        """As `Path.replace`."""
        machine = self._machine(target)
        if machine is None:
            os.replace(source, target)  # noqa: PTH105 - Path.replace is what ends here
            return target
        self._call()
        if target.exists():
            machine.replaced.setdefault(target, machine.synced.get(target, target.read_bytes()))
        else:
            machine.unnamed.add(target)
        machine.unnamed.discard(source)
        os.replace(source, target)  # noqa: PTH105
        machine.synced[target] = machine.synced.pop(source, b"")
        self._point()
        return target

    def rmtree(self, path: Path, ignore_errors: bool = False) -> None:
        """As `shutil.rmtree`; half done if the process dies."""
        self._point()
        for file in [f for f in sorted(path.glob("*")) if f.is_file()][:1]:
            file.unlink()
        self._point()
        shutil.rmtree(path, ignore_errors=ignore_errors)
        for machine in self.machines:
            machine.forget(path)
        self._point()

    # time ----------------------------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self.elapsed

    def sleep(self, seconds: float) -> None:
        self._alive()
        self.advance(seconds)

    def now(self, tz: tzinfo | None = None) -> datetime:
        """By the clock of the machine that runs."""
        ahead = self.process.machine.ahead if self.process else 0.0
        return (self._began + timedelta(seconds=self.elapsed + ahead)).astimezone(tz)

    # Inside --------------------------------------------------------------------------------------------------------

    def _pass(self, seconds: float) -> None:
        self.elapsed += seconds

    def _machine(self, path: Path) -> Machine | None:
        return next((m for m in self.machines if path.is_relative_to(m.root)), None) if self.process else None

    def _path(self, fd: int) -> Path | None:
        self._alive()  # its descriptors may be another's by now
        return self.process.fds.get(fd) if self.process else None

    def _opened(self, fd: int, path: Path) -> int:
        if self.process:
            self.process.fds[fd] = path
        return fd

    def _alive(self) -> None:
        if self.process and not self.process.alive:
            raise Crash

    def _call(self, half: Callable[[], object] = lambda: None) -> None:
        """Before a call takes effect: it may fail, and `half` of it have happened."""
        self._point()
        process = self.process
        fault = process.trouble if process else None
        if process and fault and fault.kind in ERRORS and process.at <= process.calls < process.at + process.lasts:
            if not process.hurt:
                self.plan.strike(fault)
            process.hurt = True
            half()
            raise OSError(ERRORS[fault.kind], os.strerror(ERRORS[fault.kind]))

    def _point(self) -> None:
        """A process may die here."""
        self._alive()
        process = self.process
        if process is None:
            return
        process.calls += 1
        fault = process.trouble
        if fault and fault.kind in ("kill", "power") and process.calls == process.at:
            self.plan.strike(fault)
            if fault.kind == "kill":
                process.machine.kill(process)
            else:
                process.machine.power_off(fault.chance)
            raise Crash


@contextmanager
def installed(system: System) -> Iterator[None]:
    """The product's modules run on these machines."""
    clock = type("datetime", (datetime,), {"now": classmethod(lambda cls, tz=None: system.now(tz))})
    with ExitStack() as stack:
        for name in OS:
            stack.enter_context(mock.patch(f"{name}.os", system))
        for name in TIME:
            stack.enter_context(mock.patch(f"{name}.time", system))
        for name in DATETIME:
            stack.enter_context(mock.patch(f"{name}.datetime", clock))
        stack.enter_context(mock.patch("fl_server.run.shutil", system))
        stack.enter_context(mock.patch.object(Path, "replace", lambda source, target: system.replace(source, target)))
        yield
