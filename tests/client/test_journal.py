"""The site's journal: what was begun before a crash is never begun again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fl_client.journal import SiteJournal
from privacy.errors import Aborted, CheckFailed, ConsiloError, Refused
from privacy.files import FileLayer

RUN, OTHER = "a" * 32, "b" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rounds.jsonl"


def reopened(path: Path) -> SiteJournal:
    return SiteJournal(path)


def write(path: Path, *slots: tuple[int, int]) -> None:
    journal = SiteJournal(path)
    for slot in slots:
        journal.started(RUN, (*slot, 1))
    journal.close()


def test_fresh_journal_is_private_and_empty(path: Path) -> None:
    journal = SiteJournal(path)
    assert journal.last(RUN) == (0, 0, 0)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("replay", [(2, 1), (2, 0), (1, 9), (1, 0)])
@pytest.mark.parametrize("crash", [False, True])
def test_replayed_attempt_is_refused_before_and_after_a_crash(path: Path, replay: tuple[int, int], crash: bool) -> None:
    journal = SiteJournal(path)
    for slot in ((1, 0), (2, 0), (2, 1)):
        journal.started(RUN, (*slot, 1))
    if crash:
        journal.close()
        journal = reopened(path)
    before = path.read_bytes()
    with pytest.raises(Aborted) as caught:
        journal.started(RUN, (*replay, 1))
    assert caught.value.code == "secagg.stale"
    assert path.read_bytes() == before
    journal.started(RUN, (2, 2, 1))
    journal.started(RUN, (3, 0, 1))
    assert journal.last(RUN) == (3, 0, 1)


def test_runs_are_apart(path: Path) -> None:
    write(path, (5, 1))
    journal = reopened(path)
    journal.started(OTHER, (1, 0, 1))
    assert (journal.last(RUN), journal.last(OTHER)) == ((5, 1, 1), (1, 0, 1))


def test_spent_adapters_and_released_sums_are_remembered(path: Path) -> None:
    journal = SiteJournal(path)
    journal.started(RUN, (1, 0, 1))
    journal.spent(RUN, (1, 0, 1), "ab" * 32)
    assert journal.spent_from("ab" * 32)
    journal.unmasked(RUN, (1, 0, 1), "cd" * 32)
    journal.close()
    assert b'"transcript":"cdcd' in path.read_bytes()
    again = reopened(path)
    assert (again.last(RUN), again.attempts(RUN)) == ((1, 0, 1), 1)
    assert (again.spent_from("ab" * 32), again.spent_from("cd" * 32)) == (True, False)


def test_every_cut_of_the_last_line_is_mended(path: Path) -> None:
    """A crash may leave any prefix of a line; what was promised before it stays."""
    write(path, (1, 0), (2, 0))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        journal = reopened(path)
        assert journal.last(RUN) == (1, 0, 1), cut
        assert path.read_bytes() == whole[:first]
        journal.started(RUN, (2, 0, 1))
        journal.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"garbage\n", b"[]\n", b'{"run":"x"}\n', b'{"run":"x","round":"one","attempt":0}\n',
                                  b"\x00\n", b"\xff\n", b"null\n"])
def test_line_that_the_agent_did_not_write_is_refused(path: Path, line: bytes) -> None:
    write(path, (1, 0))
    broken = line + path.read_bytes()
    path.write_bytes(broken)
    with pytest.raises(CheckFailed) as caught:
        reopened(path)
    assert caught.value.code == "journal.broken"
    assert path.read_bytes() == broken
    path.write_bytes(b"")
    reopened(path).close()


def test_order_in_the_file_does_not_lower_the_newest(path: Path) -> None:
    write(path, (1, 0), (2, 0))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(reversed(lines)))
    assert reopened(path).last(RUN) == (2, 0, 1)


def test_second_agent_is_refused(path: Path) -> None:
    journal = SiteJournal(path)
    with pytest.raises(Refused) as caught:
        SiteJournal(path)
    assert caught.value.code == "file.leased"
    journal.close()
    reopened(path).close()


class FullDisk(FileLayer):
    """Writes half a line, then fails."""

    def append(self, fd: int, data: bytes) -> None:
        os.write(fd, data[:len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_stops_the_attempt_and_leaves_no_half_line_behind(path: Path) -> None:
    write(path, (1, 0))
    before = path.read_bytes()
    journal = SiteJournal(path, FullDisk())
    with pytest.raises((ConsiloError, OSError)):
        journal.started(RUN, (2, 0, 1))
    assert journal.last(RUN) == (1, 0, 1)
    with pytest.raises((ConsiloError, OSError)):
        journal.started(RUN, (2, 0, 1))
    journal.close()
    assert reopened(path).last(RUN) == (1, 0, 1)
    assert path.read_bytes() == before


class Recorded(FileLayer):
    """Counts what is durable."""

    def __init__(self) -> None:
        self.durable: list[bytes] = []

    def append(self, fd: int, data: bytes) -> None:
        super().append(fd, data)
        self.durable.append(data)


def test_every_event_is_durable_when_its_call_returns(path: Path) -> None:
    layer = Recorded()
    journal = SiteJournal(path, layer)
    journal.started(RUN, (1, 0, 1))
    assert len(layer.durable) == 1
    journal.spent(RUN, (1, 0, 1), "ab" * 32)
    assert len(layer.durable) == 2
    journal.unmasked(RUN, (1, 0, 1), "cd" * 32)
    assert len(layer.durable) == 3
    assert path.read_bytes() == b"".join(layer.durable)
