"""Histories of a federation under faults, drawn from a seed; how one that violates a rule is replayed, and made short.

A seed has histories 0, 1, 2, ...; each is a function of (seed, its number), so that one can be replayed alone. They are
played until enough rounds were done. docs/chaos.md says which faults there are and which rules are checked.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.settings import Settings
from simulations.chaos_parts import Consortium
from simulations.chaos_plan import Plan
from simulations.chaos_run import play
from simulations.chaos_watch import Violation
from simulations.chaos_world import VARIANTS, Played, World, playing

MOST_SITES = 5
COHORTS = (3, 4, 4, 4, 5, 5)
HISTORIES = 20  # more than rounds, if nothing is ever done
SHRINK = 60  # replays


@dataclass
class Chaos:
    """What was seen under a seed. replay: of the first violation, the command, and the faults that it takes."""

    seed: int
    rounds: int = 0
    void: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    histories: int = 0
    violations: list[Violation] = field(default_factory=list)
    replay: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "rounds": self.rounds, "void": self.void, "faults": self.faults.total(),
                "violations": len(self.violations), "by_fault": dict(sorted(self.faults.items())),
                "runs": dict(sorted(self.runs.items())), "histories": self.histories,
                "found": [v.as_dict() for v in self.violations], "replay": self.replay}


class Player:
    """Plays histories of one seed. Use it as a context manager: the consortium's files are thrown away at its end."""

    def __init__(self, seed: int, overrides: Sequence[str] = (), *, consortium: Consortium | None = None) -> None:
        self.seed, self._overrides = seed, tuple(overrides)
        self._folder = tempfile.TemporaryDirectory(prefix="consilo-chaos-")
        self._root = Path(self._folder.name)
        self._consortium = consortium or Consortium(self._root / "consortium", MOST_SITES)
        self._settings: dict[tuple[str, ...], Settings] = {}
        self._count = 0

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def play(self, history: int, only: Collection[str] | None = None) -> Played:
        """only: labels of the faults that may strike; None: all."""
        plan = Plan(self.seed, history, only)
        chance = plan.chance("shape")
        variant = chance.choices([v for _, v in VARIANTS], [weight for weight, _ in VARIANTS])[0]
        self._count += 1
        folder = self._root / f"play{self._count}"
        n, fixed = chance.choice(COHORTS), {o.lstrip("+~").partition("=")[0] for o in self._overrides}
        world = World(self._consortium, folder, plan, self._variant(variant), n, fixed)
        with playing(world):
            return play(world)

    def shrink(self, history: int, played: Played, rule: str) -> list[str]:
        """Fewer faults under which the same rule is violated: halves are left out, then quarters, then single ones."""
        faults, size, tries = list(dict.fromkeys(played.faults)), max(1, len(set(played.faults)) // 2), 0
        while tries < SHRINK:
            at = 0
            while at < len(faults) and tries < SHRINK:
                fewer, tries = faults[:at] + faults[at + size:], tries + 1
                again = self.play(history, fewer)
                if any(v.rule == rule for v in again.violations):
                    faults = [f for f in fewer if f in again.faults]
                else:
                    at += size
            if size == 1:
                break
            size = max(1, size // 2)
        return faults

    def _variant(self, variant: tuple[str, ...]) -> Settings:
        if variant not in self._settings:
            self._settings[variant] = self._consortium.settings(*variant, *self._overrides)
        return self._settings[variant]


def chaos(seed: int, rounds: int, overrides: Sequence[str] = (), *, first: int = 0, only: Collection[str] | None = None,
          shrink: bool = True, say: Callable[[str], None] = lambda text: None) -> Chaos:
    """Play histories from number `first` on until `rounds` rounds were done, or a rule was violated.

    Raises UsageError as `load_settings` and `make_contract` do for overrides that can't be.
    """
    out = Chaos(seed)
    with Player(seed, overrides) as player:
        for history in range(first, first + HISTORIES + rounds):
            played = player.play(history, only)
            out.histories += 1
            out.rounds, out.void = out.rounds + played.rounds, out.void + played.void
            out.faults.update(label.rpartition(":")[2] for label in played.faults)
            out.runs.update(played.ends)
            say(f"history {history}: {played.rounds} rounds done, {played.void} attempts void, {len(played.faults)} faults, "
                f"{len(played.violations)} violations")
            if played.violations:
                out.violations = played.violations
                faults = player.shrink(history, played, played.violations[0].rule) if shrink else played.faults
                out.replay = {"command": command(seed, history, overrides, faults), "history": history, "faults": faults}
                break
            if out.rounds >= rounds:
                break
    return out


def command(seed: int, history: int, overrides: Sequence[str], faults: Sequence[str]) -> str:
    """What replays a history with these faults alone."""
    only = f" --only {','.join(faults) or 'none'}"
    return " ".join([f"fl-simulate chaos --seed {seed} --history {history} --rounds 1{only}", *overrides])
