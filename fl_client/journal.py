"""What a site must remember across a crash: attempts begun, updates spent, sums released, statements signed.

Appended and fsynced.

(run, round, attempt, pass) only ever grows: what was begun is never begun again, so nothing is masked twice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from privacy.canonical import canonical, parse
from privacy.errors import Aborted, CheckFailed, Refused, UsageError
from privacy.files import FileLayer, read_file
from privacy.secagg.transcript import Slot


class SiteJournal:
    """`SpentJournal` on a file; unusable once a write has failed.

    Raises Refused `file.leased`, `journal.write_failed`, `journal.unusable`; CheckFailed `journal.broken`.
    """

    def __init__(self, path: Path, files: FileLayer | None = None) -> None:
        self._files = files or FileLayer()
        self._fd = self._files.open_append(path)
        self._files.sync_folder(path.parent)
        self._begun: dict[str, set[Slot]] = {}
        self._spent: set[str] = set()
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines():
            try:
                event = parse(line)
                self._remember(event)
            except (UsageError, KeyError, TypeError, ValueError) as e:
                self.close()
                raise _broken(path) from e
        if whole < len(data):  # torn by a crash before fsync returned
            self._files.truncate(self._fd, whole)

    def last(self, run: str) -> Slot:
        """The newest pass begun in a run; (0, 0, 0) if none."""
        return max(self._begun.get(run, {(0, 0, 0)}))

    def attempts(self, run: str) -> int:
        """Number of attempts begun in a run."""
        return len({slot[:2] for slot in self._begun.get(run, ())})

    def spent_from(self, adapter: str) -> bool:
        """Whether an update trained from the adapter with this digest has left, in any run."""
        return adapter in self._spent

    def started(self, run: str, slot: Slot) -> None:
        """Durable before M1. Raises Aborted `secagg.stale` unless the pass is newer than all before."""
        if slot <= self.last(run):
            raise Aborted("secagg.stale", "This attempt was begun before.", "Start a new attempt.")
        self._append(_event("started", run, slot))

    def spent(self, run: str, slot: Slot, adapter: str) -> None:
        """Durable before M5: the update trained from this adapter counts as released."""
        self._append(_event("spent", run, slot) | {"adapter": adapter})

    def unmasked(self, run: str, slot: Slot, transcript: str) -> None:
        """Durable before M9: the sum with this T3 may become known."""
        self._append(_event("unmasked", run, slot) | {"transcript": transcript})

    def stated(self, kind: str, envelope: str) -> None:
        """Durable before it leaves: what this site signed, for its own evidence."""
        self._append({"event": "stated", "kind": kind, "envelope": envelope})

    def require_usable(self) -> None:
        """Raises Refused `journal.unusable`: what isn't written down can't be sent, so nothing should be spent on it."""
        if self._fd < 0:
            raise Refused("journal.unusable", "The site's journal is closed, or its last write failed.",
                          "Repair the disk, then start the agent again.")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _append(self, event: dict[str, str | int]) -> None:
        self.require_usable()
        try:
            self._files.append(self._fd, canonical(event) + b"\n")
            self._remember(event)
        except OSError as e:
            self.close()
            raise Refused("journal.write_failed", f"The site's journal can't be written ({e.strerror}).",
                          "Free or repair the disk, then start the agent again.") from e

    def _remember(self, event: dict[str, Any]) -> None:
        if event["event"] == "stated":
            return
        run = str(event["run"])
        self._begun.setdefault(run, set()).add((int(event["round"]), int(event["attempt"]), int(event.get("pass", 1))))
        if event["event"] == "spent":
            self._spent.add(str(event["adapter"]))


def _event(name: str, run: str, slot: Slot) -> dict[str, str | int]:
    return {"event": name, "run": run, "round": slot[0], "attempt": slot[1], "pass": slot[2]}


def read_statements(path: Path) -> list[tuple[str, bytes]]:
    """(kind, envelope) of what the site signed, in order, each once. Raises UsageError `file.missing`; CheckFailed
    `journal.broken`."""
    data, out = read_file(path), dict[tuple[str, bytes], None]()
    for line in data[:data.rfind(b"\n") + 1].splitlines():
        try:
            event = parse(line)
            if event["event"] == "stated":
                out[str(event["kind"]), str(event["envelope"]).encode()] = None
        except (UsageError, KeyError, TypeError, ValueError) as e:
            raise _broken(path) from e
    return list(out)


def _broken(path: Path) -> CheckFailed:
    return CheckFailed("journal.broken", f"{path.name} holds a line that the agent didn't write.",
                       "Restore the file; without it an update could be masked twice.")
