"""What goes wrong, when: a function of a seed and of the name of the place where it could, and of nothing else.

Guarantee: whether a fault strikes at a place doesn't depend on whether others did, so that a failing history can be
replayed with some of its faults left out (`only`). Places are counted, so that leaving one out can shift later ones.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Chance of each fault at each place where it can strike, times the weather of the history.
MESSAGE: Mapping[str, float] = MappingProxyType({
    "lost": 0.008, "late": 0.012, "twice": 0.016, "garbled": 0.006, "cut": 0.004, "killed-asked": 0.003,
    "restarted": 0.002})
REPLY: Mapping[str, float] = MappingProxyType({
    "reply-lost": 0.008, "reply-late": 0.012, "reply-twice": 0.004, "reply-garbled": 0.006, "reply-cut": 0.003,
    "killed-answered": 0.004, "powered-off": 0.003})
DISK: Mapping[str, float] = MappingProxyType({"kill": 0.07, "power": 0.07, "full": 0.04, "eio": 0.04})  # of an agent
COORDINATOR_DISK: Mapping[str, float] = MappingProxyType({"kill": 0.25, "power": 0.2, "full": 0.05, "eio": 0.05})
AROUND: Mapping[str, float] = MappingProxyType({  # before any message of a run
    "clock-back": 0.002, "clock-ahead": 0.002, "pause": 0.001, "second-agent": 0.003, "second-run": 0.0015})
DISK_CALLS = 500  # of a process, in which its disk's fault strikes
WEATHER = (0.1, 0.2, 0.4, 0.6, 1.0, 1.6)


@dataclass(frozen=True)
class Fault:
    """kind strikes at a place. chance draws its details."""

    place: str
    kind: str
    chance: random.Random = field(compare=False)

    @property
    def label(self) -> str:
        return f"{self.place}:{self.kind}"


@dataclass
class Plan:
    """Of one history. only: labels of the faults that may strike; None: all. struck: labels, in order."""

    seed: int
    history: int
    only: Collection[str] | None = None
    struck: list[str] = field(default_factory=list)

    def chance(self, *name: str) -> random.Random:
        """For what isn't a fault: the shape of the history. A seeded stream for every name."""
        return random.Random("/".join((str(self.seed), str(self.history), *name)))  # noqa: S311

    @property
    def weather(self) -> float:
        return self.chance("weather").choice(WEATHER)

    def draw(self, place: str, rates: Mapping[str, float]) -> Fault | None:
        """The fault that is due at a place, if any; `strike` counts it."""
        chance = self.chance("fault", place)
        point = chance.random()
        for kind, rate in rates.items():
            point -= rate * self.weather
            if point < 0:
                fault = Fault(f"{self.history}.{place}", kind, chance)
                return fault if self.only is None or fault.label in self.only else None
        return None

    def strike(self, fault: Fault) -> None:
        self.struck.append(fault.label)

    def counts(self) -> dict[str, int]:
        """Faults that struck, by kind."""
        return dict(sorted(Counter(label.rpartition(":")[2] for label in self.struck).items()))
