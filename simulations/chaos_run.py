"""One history, and each of its runs from its approval to its evidence, while everything fails."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fl_server.exchange import Exchange
from privacy.errors import ConsiloError, Refused, RoundVoid
from simulations.chaos_book import Book
from simulations.chaos_grid import BACK_S, Agent, ChaosGrid
from simulations.chaos_machine import Crash, Process
from simulations.chaos_parts import COORDINATOR, Job, cheap_coordinator, drawn_update
from simulations.chaos_plan import AROUND, Fault
from simulations.chaos_world import Found, Played, World

LIVES = 25  # of a run's coordinator
STARTS = 40  # of a site's agent in a run
SET_AGAIN_S = (5.0, 30.0, 300.0)  # until somebody sets the clock
REFUSED_CODES = ("budget.exhausted", "budget.not_encumbered")
CLOCK_CODES = ("contract.expired", "identity.expired")


def play(world: World) -> Played:
    try:
        for _ in range(world.chance.randint(1, 3)):
            Playing(world, world.job()).play()
        world.watch.ledgers(world.contracts, {n: s.certificate for n, s in world.consortium.signers.items()})
    except Found:
        pass
    world.played.violations = world.watch.found
    return world.played


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
