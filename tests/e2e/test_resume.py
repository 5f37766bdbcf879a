"""Case 23: the coordinator is killed at every write, and another goes on: no round is applied twice, none is lost.

The sites live on, as agents do. A kill is an exception at the n-th durable write below the run's folder or the log's, before
it or after it; from then on the dead one can neither write nor ask.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conf import load_settings
from fl_server.exchange import Exchange
from fl_server.recovery import OPTIMIZER, STATE
from fl_server.run import INTERRUPTED
from privacy.errors import CheckFailed, Refused, RoundVoid
from privacy.files import FileLayer
from privacy.verify import verify_bundle
from simulations.local import Federation, federation

Make = Callable[..., list[str]]


class Killed(BaseException):
    """kill -9."""


class Mortal:
    """Counts durable writes below a folder; dies at the n-th, before it or after it."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, n: int, after: bool) -> None:
        self.count, self.dead, self._folder, self._n, self._after = 0, False, str(folder), n, after
        for name in ("append", "write_atomic"):
            patch.setattr(FileLayer, name, self._mortal(getattr(FileLayer, name)))
        ask = Exchange.ask

        def asking(exchange: Exchange, *args: Any, **kw: Any) -> Any:
            if self.dead:
                raise Killed
            return ask(exchange, *args, **kw)

        patch.setattr(Exchange, "ask", asking)
        self._open, open_append = set[int](), FileLayer.open_append

        def opening(layer: FileLayer, path: Path) -> int:
            fd = open_append(layer, path)
            if str(path).startswith(self._folder):
                self._open.add(fd)
            return fd

        patch.setattr(FileLayer, "open_append", opening)

    def bury(self) -> None:
        """The system closes what a killed process had open."""
        for fd in self._open:
            with suppress(OSError):
                if str(Path(f"/proc/self/fd/{fd}").readlink()).startswith(self._folder):
                    os.close(fd)

    def _mortal(self, write: Callable[..., None]) -> Callable[..., None]:
        def wrapped(layer: FileLayer, where: Path | int, *args: Any, **kw: Any) -> None:
            path = str(Path(f"/proc/self/fd/{where}").readlink()) if isinstance(where, int) else str(where)
            if not path.startswith(self._folder) or "/." in path:  # write_atomic's own append
                return write(layer, where, *args, **kw)
            if self.dead:
                raise Killed
            self.count += 1
            self.dead = self.count == self._n
            if self.dead and not self._after:
                raise Killed
            write(layer, where, *args, **kw)
            if self.dead:
                raise Killed
            return None

        return wrapped


@contextmanager
def place(overrides: Make, folder: Path, *more: str) -> Iterator[tuple[Federation, Path]]:
    out = folder / "out"
    with federation(load_settings(overrides(f"server.out={out}", "privacy.rounds=2", "privacy.retries=2", *more)),
                    state=folder / "sites") as there:
        yield there, out


def kill(there: Federation, out: Path, n: int, *, after: bool) -> bool:
    """Whether the coordinator got as far as its n-th write."""
    with pytest.MonkeyPatch.context() as patch:
        mortal = Mortal(patch, out, n, after)
        try:
            there.coordinate().run()
        except Killed:
            mortal.bury()
            return True
    assert not mortal.dead
    return False


def check(there: Federation, out: Path, voids: int) -> None:
    events = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    done = [e for e in events if e["event"] == "done"]
    assert [e["round"] for e in done] == [1, 2], "each round counts once"
    assert events[-1] == {"event": "end", "outcome": "done"}
    assert sum(e["event"] == "void" for e in events) == voids
    verdict = verify_bundle(out / "evidence", there.root)
    assert verdict.verdict == "PASS", verdict.as_dict()


@pytest.mark.parametrize(("first", "step"), [(5, 13), *(pytest.param(n, 6, marks=pytest.mark.long) for n in range(1, 7))])
def test_case_23_killed_at_every_write_the_run_goes_on(overrides: Make, tmp_path: Path, first: int, step: int) -> None:
    """A kill at some write, before it and after it; every run ends with each round done once."""
    n, killed = first, True
    while killed:
        for after in (False, True):
            with place(overrides, tmp_path / f"{n}-{after}") as (there, out):
                killed = kill(there, out, n, after=after)
                if killed:
                    _finish(there, out)
        n += step
    assert n > 40, "the kills didn't reach far"


def _finish(there: Federation, out: Path) -> None:
    try:
        result = there.coordinate().run()
    except Refused as e:  # all was written but the journal's last line
        assert e.code == "bundle.sealed" and verify_bundle(out / "evidence", there.root).verdict == "PASS"
        return
    check(there, out, result.void)


def test_killed_again_and_again(overrides: Make, tmp_path: Path) -> None:
    with place(overrides, tmp_path, "privacy.retries=6") as (there, out):
        for n in (14, 9, 17, 8, 12):
            if not kill(there, out, n, after=False):
                break
        else:
            _finish(there, out)
        assert verify_bundle(out / "evidence", there.root).verdict == "PASS"


def test_an_interrupted_attempt_costs_a_retry(overrides: Make, tmp_path: Path) -> None:
    """What the sites had charged for it stays spent, so it counts against the contract's retries."""
    with place(overrides, tmp_path, "privacy.retries=0") as (there, out):
        n = 1
        while not _under_way(out) and kill(there, out, n, after=True):
            n += 1
        with pytest.raises(RoundVoid, match=INTERRUPTED.replace(".", r"\.")):
            there.coordinate().run()
        events = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
        assert [e["event"] for e in events][-2:] == ["void", "end"]
        assert verify_bundle(out / "evidence", there.root).verdict == "PASS"


def _under_way(out: Path) -> bool:
    journal = out / "journal.jsonl"
    return journal.exists() and '"event":"round"' in journal.read_text().splitlines()[-1]


def test_the_next_coordinator_starts_from_the_same_adapter_and_momentum(overrides: Make, tmp_path: Path) -> None:
    with place(overrides, tmp_path) as (there, out):
        n = 20
        while not (out / "rounds" / "0001" / STATE).exists():
            assert kill(there, out, n, after=True)
        run = there.coordinate()
        at = run._begin()
        kept = load_file(out / "rounds" / "0001" / STATE)
        assert at.done == 1 and any(value.any() for value in at.state.values())
        assert all(np.array_equal(value, kept[f"{OPTIMIZER}{name}"]) for name, value in at.state.items())
        assert all(np.array_equal(value, kept[f"adapter/{name}"]) for name, value in at.adapter.items())


@pytest.mark.parametrize("damage", ["missing", "changed", "other shape"])
def test_a_damaged_state_is_refused(overrides: Make, tmp_path: Path, damage: str) -> None:
    with place(overrides, tmp_path) as (there, out):
        path = out / "rounds" / "0001" / STATE
        n = 20
        while not path.exists():
            n += 1
            kill(there, out, n, after=True)
        if damage == "missing":
            path.unlink()
        else:
            tensors = load_file(path)
            name = next(iter(tensors))
            tensors[name] = tensors[name] + 1 if damage == "changed" else tensors[name].ravel()[:-1]
            save_file(tensors, path)
        with pytest.raises(CheckFailed, match=r"run\.state"):
            there.coordinate().run()
