"""The coordinator's memory on disk: one JSON line for every event of a run, appended and fsynced before it takes effect.

Vectors are never written here: of a round it holds digests, outcome and the folder of the new adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from privacy.canonical import canonical, parse
from privacy.errors import CheckFailed, UsageError
from privacy.files import FileLayer, read_file

EVENTS = frozenset({"run", "round", "done", "void", "end"})


class RunJournal:
    """Appends events. Raises Refused `file.leased` while another coordinator runs in the same folder."""

    def __init__(self, path: Path, files: FileLayer | None = None) -> None:
        self._files = files or FileLayer()
        self._fd = self._files.open_append(path)
        self._open = True
        self._files.sync_folder(path.parent)
        data = path.read_bytes()
        if (whole := data.rfind(b"\n") + 1) < len(data):  # torn by a crash before fsync returned
            self._files.truncate(self._fd, whole)

    def write(self, event: str, **fields: str | int | list[str]) -> None:
        self._files.append(self._fd, canonical({"event": event, **fields}) + b"\n")

    def close(self) -> None:
        if self._open:
            self._files.close(self._fd)
        self._open = False


def read_events(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a torn last one was never promised. Raises CheckFailed `journal.broken`, UsageError."""
    data, out = read_file(path), []
    for line in data[:data.rfind(b"\n") + 1].splitlines():
        try:
            event = parse(line)
        except UsageError:
            event = None
        if not isinstance(event, dict) or str(event.get("event")) not in EVENTS:
            raise _broken(path)
        out.append(event)
    return out


def _broken(path: Path) -> CheckFailed:
    return CheckFailed("journal.broken", f"{path.name} holds a line that the coordinator didn't write.",
                       "Restore the file from a copy.")


def status(path: Path) -> dict[str, Any]:
    """What `fl-server status` says: the run, each attempt with the sites in its sum or why it is void, which sites were
    lost (`site stage code`), and whether it has ended. Raises as `read_events`; UsageError `journal.empty`."""
    try:
        return _status(read_events(path))
    except KeyError as e:
        raise _broken(path) from e


def _status(events: list[dict[str, Any]]) -> dict[str, Any]:
    if not events or events[0]["event"] != "run":
        raise UsageError("journal.empty", "No run has been started in this folder.", "Give the folder of a run.")
    done = [e for e in events if e["event"] == "done"]
    rounds = [{"round": e["round"], "attempt": e["attempt"], "outcome": e["event"], "reason": e.get("reason", ""),
               "sites": e.get("sites", []), "lost": e["lost"]} for e in events if e["event"] in ("done", "void")]
    ended = next((e["outcome"] for e in events if e["event"] == "end"), "")
    return {"run": events[0]["run"], "contract": events[0]["contract"], "rounds_planned": events[0]["rounds"],
            "rounds_done": len(done), "rounds": rounds, "adapter": done[-1]["adapter"] if done else events[0]["adapter"],
            "state": ended or "running or interrupted"}
