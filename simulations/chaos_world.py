"""One history: runs of one consortium, one after another and within each other, while everything fails.

All of it is a function of the seed but what must be random (keys, secrets, masks, rounding, the ids of runs): bytes differ
between two replays, what happens doesn't.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conf.settings import Settings
from fl_server.exchange import Exchange
from privacy.contract import Contract
from privacy.errors import ConsiloError, Refused, RoundVoid
from simulations.chaos_book import Book
from simulations.chaos_grid import BACK_S, Agent, ChaosGrid, Timeline
from simulations.chaos_machine import Crash, Machine, Process, System, installed
from simulations.chaos_parts import COORDINATOR, Consortium, Job, changed, cheap_coordinator, drawn_update
from simulations.chaos_plan import AROUND, COORDINATOR_DISK, Fault, Plan
from simulations.chaos_watch import Violation, Watch, quiet

LIVES = 25  # of a run's coordinator
SET_AGAIN_S = (5.0, 30.0, 300.0)  # until somebody sets the clock
STARTS = 40  # of a site's agent in a run
REFUSED_CODES = ("budget.exhausted", "budget.not_encumbered")
CLOCK_CODES = ("contract.expired", "identity.expired")
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
        self._contracts: dict[str, Contract] = {}
        self._runs = 0
        self._chance = plan.chance("history")
        self._cap = self._chance.choice((0.45, 6.0, 6.0, 6.0))

    def play(self) -> Played:
        try:
            for _ in range(self._chance.randint(1, 3)):
                Playing(self, self.job()).play()
            self.watch.ledgers(self._contracts, {n: s.certificate for n, s in self.consortium.signers.items()})
        except Found:
            pass
        self.played.violations = self.watch.found
        return self.played

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
        self._contracts[job.contract.run] = job.contract
        return job

    def check(self) -> None:
        if self.watch.found:
            raise Found

    def note(self, text: str) -> None:
        self.played.trace.append(f"{self.system.elapsed:.2f} {text}")

    def away(self, place: str) -> float:
        return float(self.plan.chance("back", place).choice(BACK_S))


class Playing:
    """One run from its approval to its evidence."""

    def __init__(self, world: World, job: Job, inner: bool = False) -> None:
        self.world, self.job, self._inner = world, job, inner
        machine = world.machines[COORDINATOR]
        out, log = Path(job.settings.server.out), Path(job.settings.server.log)
        self.book = Book(world.watch, machine, job.contract, out, log)
        self._agents = {i + 1: Agent(s.name, self._start) for i, s in enumerate(job.contract.sites)}
        self._nodes = {agent.site: node for node, agent in self._agents.items()}
        self._counts, self._starts = Counter[str](), Counter[str]()
        self._grid: ChaosGrid | None = None
        self._interludes = 0

    def play(self) -> None:
        world = self.world
        for agent in self._agents.values():
            self._approve(agent.site)
            self._back(agent, 0.01)
        world.timeline.wait(1.0)
        end = "lives"
        for life in range(1, LIVES + 1):
            end = self._live(life)
            world.note(f"{self.job.name}: {end}")
            self.book.look()
            world.check()
            if end not in ("crash", "disk", "clock"):
                break
            world.timeline.wait(world.away(f"{self.job.name}.coordinator{life}"))
        self._stop()
        world.played.rounds += len(self.book.done)
        world.played.void += self.book.void
        world.played.ends[end] += 1
        if self.book.sealed:
            wrong = self.book.verify(world.consortium.root)
            world.watch.expect(not wrong, "evidence", self.job.name, "; ".join(wrong))
        world.check()

    # The coordinator ---------------------------------------------------------------------------------------------------

    def _live(self, life: int) -> str:
        """One life of the coordinator; how it ended."""
        world = self.world
        process = world.system.start(world.machines[COORDINATOR], f"{self.job.name}.coordinator")
        grid = WatchedGrid(f"{self.job.name}", world.system, world.timeline, world.plan, self._agents, process, self._counts,
                           around=self._around, restart=self._back)
        grid.book = self.book
        grid.world = world
        self._grid = grid
        self.book.began()
        try:
            with world.system.running(process), cheap_coordinator(self.book.saved):
                self.job.coordinator(world.consortium, Exchange(grid, self._nodes), self._progress).run()
            return "done"
        except Crash:
            return "crash"
        except RoundVoid:
            return "crash" if not process.alive else "void"
        except OSError as e:
            world.watch.expect(process.hurt, "typed-errors", COORDINATOR, f"{type(e).__name__}: {e}")
            return "disk"
        except ConsiloError as e:
            if not process.alive:
                return "crash"
            if e.code in CLOCK_CODES and process.machine.ahead:
                process.machine.ahead = 0.0  # whoever runs it sets the clock
                return "clock"
            ended = e.code in ("bundle.sealed", "run.ended")
            world.watch.expect(ended or process.hurt, "recovers", COORDINATOR, f"life {life} ends with {e.code}: {e.cause}")
            return "ended" if ended else "disk"
        except Exception as e:  # noqa: BLE001 - that it is raised is what is looked for
            world.watch.expect(False, "typed-errors", COORDINATOR, f"{type(e).__name__}: {e}")
            return "bug"
        finally:
            process.end()

    def _progress(self, event: dict[str, Any]) -> None:
        self.world.note(f"{self.job.name}: {event}")
        self.book.look()
        self.world.check()

    # The sites ---------------------------------------------------------------------------------------------------------

    def _approve(self, site: str) -> None:
        """Until the disk has it."""
        machine = self.world.machines[site]
        for _ in range(STARTS):
            process = self.world.system.start(machine, f"{self.job.name}.{site}.approval")
            with suppress(Crash, OSError), self.world.system.running(process):
                machine.ahead = 0.0  # or the contract, or a certificate, isn't valid
                self.job.approve(self.world.consortium, site, machine.root)
                process.end()
                return
            process.end()

    def _back(self, agent: Agent, seconds: float) -> None:
        self.world.timeline.after(seconds, lambda: self._try(agent))

    def _try(self, agent: Agent) -> None:
        """Start a site's agent anew, as its operator does; again later if something stands in its way."""
        world, site = self.world, agent.site
        if not agent.wanted or (agent.there and agent.process and not agent.process.hurt):
            return
        if agent.process:
            agent.process.end()
        agent.app = None
        self._starts[site] += 1
        if self._starts[site] > STARTS:
            return
        agent.process = process = world.system.start(world.machines[site], f"{self.job.name}.{site}")
        place = f"{self.job.name}.{site}.start{self._starts[site]}"
        again = True
        try:
            with world.system.running(process):
                agent.app = agent.start(agent)
            again = False
        except Crash:
            pass
        except OSError as e:
            world.watch.expect(process.hurt, "typed-errors", site, f"at its start {type(e).__name__}: {e}")
        except ConsiloError as e:
            again, clock = e.code not in REFUSED_CODES, e.code in CLOCK_CODES and process.machine.ahead != 0.0
            if clock:
                process.machine.ahead = 0.0
            world.watch.expect(process.hurt or clock or e.code in (*REFUSED_CODES, "file.leased"), "recovers", site,
                               f"its agent can't start: {e.code}: {e.cause}")
        except Exception as e:  # noqa: BLE001 - that it is raised is what is looked for
            world.watch.expect(False, "typed-errors", site, f"at its start {type(e).__name__}: {e}")
        if again:
            process.end()
            self._back(agent, world.away(place))
        elif agent.app is not None and self._grid is not None:
            self._grid.redeliver(agent)

    def _start(self, agent: Agent) -> Any:
        world, site, contract = self.world, agent.site, self.job.contract
        dim = self.book.spec.dim

        def draw(round_no: int) -> Any:
            chance = world.plan.chance("update", self.job.name, site, str(round_no), str(len(world.watch.sites[site].draws)))
            return world.watch.draw(site, contract, drawn_update(chance, dim))

        app, made = self.job.agent(world.consortium, site, world.machines[site].root, draw,
                                   lambda handlers: world.watch.wrap(site, contract, handlers))
        agent.expire = made.expire
        return app

    def _stop(self) -> None:
        for agent in self._agents.values():
            agent.wanted = False
            if agent.process:
                agent.process.end()
            agent.app = None

    # Around the messages -----------------------------------------------------------------------------------------------

    def _around(self, place: str) -> None:
        world = self.world
        world.check()
        fault = world.plan.draw(f"{place}.around", AROUND)
        if fault is None or (fault.kind == "second-run" and (self._inner or self._interludes >= 1)):
            return
        world.plan.strike(fault)
        if fault.kind.startswith("clock"):
            machine = fault.chance.choice(list(world.machines.values()))
            sign = -1 if fault.kind == "clock-back" else 1
            machine.ahead += sign * fault.chance.choice((60.0, 3600.0, 86400.0, 100 * 86400.0))
            world.timeline.after(fault.chance.choice(SET_AGAIN_S), lambda: setattr(machine, "ahead", 0.0))
        elif fault.kind == "pause":
            world.system.elapsed += fault.chance.choice((30.0, 600.0, 7200.0))
        elif fault.kind == "second-agent":
            self._second_agent(fault)
        else:
            self._second_run(fault)

    def _second_agent(self, fault: Fault) -> None:
        """For another job, or the same one again, while one holds the site's files."""
        world = self.world
        there = [agent for agent in self._agents.values() if agent.there]
        if not there:
            return
        agent = fault.chance.choice(there)
        process = Process("second", world.machines[agent.site], 1)
        try:
            with world.system.running(process):
                self.job.agent(world.consortium, agent.site, world.machines[agent.site].root,
                               lambda no: np.zeros(0, np.float32), lambda handlers: handlers)
            world.watch.expect(False, "one-agent", agent.site, "a second agent holds the site's files as well")
        except (Refused, OSError, Crash) as e:
            code = getattr(e, "code", "")
            world.watch.expect(code in ("file.leased", *CLOCK_CODES), "one-agent", agent.site, f"a second agent met {e!r}")
        finally:
            process.end()

    def _second_run(self, fault: Fault) -> None:
        """The sites' agents turn to another job, and come back; its coordinator runs beside this one."""
        world = self.world
        self._interludes += 1
        for agent in self._agents.values():
            agent.wanted = False
            if agent.process:
                agent.process.end()
            agent.app = None
        Playing(world, world.job(), inner=True).play()
        for agent in self._agents.values():
            agent.wanted = True
            self._back(agent, fault.chance.choice(BACK_S[:3]))


class WatchedGrid(ChaosGrid):
    """Shows the book what sets out."""

    book: Book
    world: World

    def push_messages(self, messages: Any) -> list[str]:
        all_messages = list(messages)
        self._alive()
        seen = set[tuple[str, bytes]]()
        for message in all_messages:
            stage, body = message.metadata.message_type.partition(".")[2], message.content["c"]["body"]
            if (stage, body) not in seen:
                self.book.pushed(stage, body)
            seen.add((stage, body))
        self.world.check()
        return super().push_messages(all_messages)

    def pull_messages(self, message_ids: Any) -> Iterator[Any]:
        for reply in super().pull_messages(message_ids):
            asked, site = reply.metadata.reply_to_message_id, self._agents[reply.metadata.src_node_id].site
            if reply.metadata.message_type == "query.witness" and not reply.has_error() and asked not in self.damaged:
                said = json.loads(reply.content["c"]["body"])
                if said["statement"]:
                    self.book.cosigned(site, said["size"])
            yield reply


@contextmanager
def playing(world: World) -> Iterator[World]:
    """The product's modules run in this world."""
    with ExitStack() as stack:
        stack.enter_context(quiet(("consilo.app", "consilo.round", "consilo.audit", "consilo")))
        stack.enter_context(installed(world.system))
        stack.enter_context(world.watch.masks())
        yield world
