"""Progress of a run for people: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Call it with the events of a `Run`. Plain lines: start, measured rounds, void attempts, silent sites."""

    def __init__(self, *, plain: bool) -> None:
        self._console = Console(stderr=plain)
        self._start = time.monotonic()
        self._bar = None if plain or not sys.stdout.isatty() else Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self._console, transient=True)
        self._task: Any = None

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "start":
            self.say(f"start: {_said(event)} on the public split")
        elif kind == "round":
            if self._bar:
                self._task = self._bar.add_task("rounds", total=event["rounds"]) if self._task is None else self._task
                self._bar.update(self._task, completed=event["round"],
                                 description=f"rounds, {_said(event)}")
            elif event["measured"]:
                self.say(f"round {event['round']} of {event['rounds']}: {_said(event)}")
        elif kind == "void":
            self.say(f"round {event['round']} void: {event['reason']} {' '.join(event['sites'])}")
        elif kind == "silent":
            self.say(f"no closing statement of {event['site']}: {event['reason']}")

    def say(self, text: str) -> None:
        self._console.print(f"[{time.monotonic() - self._start:5.1f} s] {text}", highlight=False, markup=False)


def _said(event: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in event["metrics"].items())
