"""One history: runs of one consortium, one after another and within each other, while everything fails.

All of it is a function of the seed but what must be random (keys, secrets, masks, rounding, the ids of runs): bytes differ
between two replays, what happens doesn't.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.settings import Settings
from privacy.contract import Contract
from simulations.chaos_grid import BACK_S, Timeline
from simulations.chaos_machine import Machine, System, installed
from simulations.chaos_parts import COORDINATOR, Consortium, Job, changed
from simulations.chaos_plan import COORDINATOR_DISK, Plan
from simulations.chaos_watch import Violation, Watch, quiet

SITE_AIMS = ("ledger.jsonl", "rounds.jsonl", "witness.json", "lineage.key")
COORDINATOR_AIMS = ("-round-coordinator", "-round-coordinator", "journal.jsonl", "state.safetensors", "entries.txt",
                    "-closing-", "manifest.json", "heads.json")
VARIANTS: Sequence[tuple[float, tuple[str, ...]]] = (
    (0.56, ()), (0.16, ("rule=exact",)), (0.06, ("rule=rolora",)),
    (0.10, ("secure_aggregation.ring=16", "secure_aggregation.bits=12")),
    (0.04, ("privacy=none",)), (0.08, ("secure_aggregation=plain",)))


class Found(BaseException):
    """A rule was violated: the history ends."""


@dataclass
class Played:
    """Of one history. rounds: done. void: attempts. ends: runs by how they ended."""

    rounds: int = 0
    void: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)


class World:
    """Machines and files of a history below `folder`. overrides: the user's."""

    def __init__(self, consortium: Consortium, folder: Path, plan: Plan, settings: Settings, n: int,
                 fixed: set[str]) -> None:
        self.consortium, self.plan, self.played = consortium, plan, Played(faults=plan.struck)
        self._folder, self._settings, self._names, self._fixed = folder, settings, consortium.sites[:n], fixed
        self.system = System(plan)
        self.timeline = Timeline(self.system)
        self.watch = Watch(self.system)
        self.machines = {name: Machine(name, folder / name, SITE_AIMS) for name in self._names}
        self.machines[COORDINATOR] = Machine(COORDINATOR, folder / COORDINATOR, COORDINATOR_AIMS, COORDINATOR_DISK)
        for name, machine in self.machines.items():
            machine.root.mkdir(parents=True)
            self.system.machines.append(machine)
            if name != COORDINATOR:
                self.watch.add(machine)
        self.contracts: dict[str, Contract] = {}
        self._runs = 0
        self.chance = plan.chance("history")
        self._cap = self.chance.choice((0.45, 6.0, 6.0, 6.0))

    def job(self) -> Job:
        self._runs += 1
        name, chance = f"run{self._runs}", self.plan.chance("run", str(self._runs))
        weights = chance.choice(([1.0] * 8, [1.0] * 8, [1.0, 0.5, 0.75, 0.3, 1.0, 0.6]))
        sites = {n: s.model_copy(update={"weight": w})
                 for (n, s), w in zip(self._settings.data.sites.items(), weights, strict=False) if n in self._names}
        shape: dict[str, Any] = {"rounds": chance.randint(1, 6), "retries": chance.randint(2, 6)}
        if self._settings.privacy.epsilon is not None:
            shape["epsilon"] = min(self._settings.privacy.epsilon, self._cap)
        out = self.machines[COORDINATOR].root / name
        settings = changed(self._settings, data={"sites": sites},
                           privacy={k: v for k, v in shape.items() if f"privacy.{k}" not in self._fixed},
                           server={"out": str(out), "log": str(self.machines[COORDINATOR].root / "log")})
        settings = settings.model_copy(update={"seed": self._runs})  # without noise an adapter is trained from once
        job = Job.make(name, self.consortium, settings, cap=self._cap)
        self.contracts[job.contract.run] = job.contract
        return job

    def check(self) -> None:
        if self.watch.found:
            raise Found

    def note(self, text: str) -> None:
        self.played.trace.append(f"{self.system.elapsed:.2f} {text}")

    def away(self, place: str) -> float:
        return float(self.plan.chance("back", place).choice(BACK_S))


@contextmanager
def playing(world: World) -> Iterator[World]:
    """The product's modules run in this world."""
    with ExitStack() as stack:
        stack.enter_context(quiet(("consilo.app", "consilo.round", "consilo.audit", "consilo")))
        stack.enter_context(installed(world.system))
        stack.enter_context(world.watch.masks())
        yield world
