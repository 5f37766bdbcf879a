"""Flower's `Grid` over a network that loses, delays, repeats and garbles messages, in time that passes only here.

A message that was lost stays lost; one that a site hadn't answered when it died is handed to it again once it is back, as
Flower's Fleet does. One that is late reaches its site even if the coordinator has given up on it, or is dead.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fl_client.app import dispatch
from simulations.chaos_machine import Crash, Process, System
from simulations.chaos_plan import MESSAGE, REPLY, Fault, Plan
from simulations.inprocess import InProcessGrid

LATENCY_S = (0.01, 0.05)
LATE_S = (1.0, 4.0, 15.0, 60.0, 4000.0)
BACK_S = (0.5, 2.0, 8.0, 30.0, 90.0)  # how long a site's agent, or the coordinator, stays away


class Timeline:
    """What is going to happen, in order."""

    def __init__(self, system: System) -> None:
        self._system, self._events, self._count = system, list[tuple[float, int, Callable[[], None]]](), 0
        system.advance = self.wait

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self._system.elapsed + seconds, self._count, work))

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let so much time pass, or less if `until` holds after something happened."""
        end = self._system.elapsed + seconds
        while self._events and self._events[0][0] <= end:
            at, _, work = heapq.heappop(self._events)
            self._system.elapsed = max(self._system.elapsed, at)
            work()
            if until():
                return
        self._system.elapsed = max(self._system.elapsed, end)


@dataclass
class Agent:
    """A site's process for one run, or the place where there is none. start: makes the app in `process`; it may raise."""

    site: str
    start: Callable[[Agent], Any]
    process: Process | None = None
    app: Any = None
    expire: Callable[[], None] = lambda: None
    wanted: bool = True  # restarted when it ends
    unanswered: dict[str, Any] = field(default_factory=dict)

    @property
    def there(self) -> bool:
        return self.app is not None and self.process is not None and self.process.alive


class ChaosGrid(InProcessGrid):
    """For one coordinator's life. agents: by node. around: called before each delivery, with its place."""

    def __init__(self, name: str, system: System, timeline: Timeline, plan: Plan, agents: dict[int, Agent], owner: Process,
                 counts: Counter[str], *, around: Callable[[str], None], restart: Callable[[Agent, float], None]) -> None:
        super().__init__({})
        self._name, self._system, self._timeline, self._plan, self._agents = name, system, timeline, plan, agents
        self._owner, self._counts, self._around, self._restart = owner, counts, around, restart
        self._arrived: dict[str, Any] = {}
        self.damaged = set[str]()  # messages whose answer was
        self._context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})

    def get_node_ids(self) -> list[int]:
        self._alive()
        return [node for node, agent in self._agents.items() if agent.there]

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        self._alive()
        ids = []
        for message in messages:
            agent = self._agents[message.metadata.dst_node_id]
            stage = message.metadata.message_type.partition(".")[2]
            self._counts["messages"] += 1
            self._counts[f"{agent.site}.{stage}"] += 1
            place = f"{self._name}.{agent.site}.{stage}{self._counts[f'{agent.site}.{stage}']}"
            ids.append(f"{self._name}-{self._counts['messages']}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            fault = self._plan.draw(f"{place}.asked", MESSAGE)
            delay = self._plan.chance("latency", place).uniform(*LATENCY_S)
            kind = fault.kind if fault else ""
            if fault:
                self._plan.strike(fault)
                if kind in ("garbled", "cut"):
                    message = _damaged(message, fault)
            if kind != "lost":
                agent.unanswered[ids[-1]] = message
                late = fault.chance.choice(LATE_S) if fault and kind == "late" else 0.0
                self._deliver(agent, message, place, delay + late, kind if kind in ("killed-asked", "restarted") else "")
            if fault and kind == "twice":
                self._deliver(agent, message, f"{place}.again", delay + fault.chance.choice((0.0, *LATE_S)))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Any]:
        self._alive()
        for asked in message_ids:
            for reply in self._arrived.pop(asked, ()):
                yield reply
                self._alive()

    def wait(self, timeout_s: float) -> bool:
        self._alive()
        self._timeline.wait(timeout_s, lambda: bool(self._arrived) or not self._owner.alive)
        self._alive()
        return True

    def forget(self, message_ids: Iterable[str]) -> None:
        self._alive()
        for asked in message_ids:
            self._arrived.pop(asked, None)
            for agent in self._agents.values():
                agent.unanswered.pop(asked, None)

    def redeliver(self, agent: Agent) -> None:
        """To a site that is back."""
        for asked, message in agent.unanswered.items():
            self._deliver(agent, message, f"{self._name}.{agent.site}.{asked}.redelivered", 0.01)

    def _deliver(self, agent: Agent, message: Any, place: str, delay: float, first: str = "") -> None:
        self._timeline.after(delay, lambda: self._handle_now(agent, message, place, first))

    def _handle_now(self, agent: Agent, message: Any, place: str, first: str) -> None:
        self._around(place)
        if first and agent.there and agent.process:
            agent.process.machine.kill(agent.process)
            agent.app = None
            self._restart(agent, 0.05 if first == "restarted" else self._plan.chance("back", place).choice(BACK_S))
        if not agent.there or agent.process is None:
            return  # it is handed out again when the site is back
        process = agent.process
        try:
            with self._system.running(process):
                agent.expire()
                reply = dispatch(agent.app, message, self._context)
        except Crash:
            agent.app = None
            self._restart(agent, self._plan.chance("back", place).choice(BACK_S))
            return
        self._answer(agent, message, reply, place, process)

    def _answer(self, agent: Agent, message: Any, reply: Any, place: str, process: Process) -> None:
        fault = self._plan.draw(f"{place}.answered", REPLY)
        kind = fault.kind if fault else ""
        if fault:
            self._plan.strike(fault)
        if fault and kind in ("killed-answered", "powered-off"):
            if kind == "powered-off":
                process.machine.power_off(fault.chance)
            else:
                process.machine.kill(process)
            agent.app = None
            self._restart(agent, fault.chance.choice(BACK_S))
            return
        if process.hurt:  # its ledger or journal grants nothing until it is started again
            self._restart(agent, self._plan.chance("back", place).choice(BACK_S))
        if kind == "reply-lost":
            return
        agent.unanswered.pop(message.metadata.message_id, None)
        if fault and kind in ("reply-garbled", "reply-cut"):
            reply = _damaged(reply, fault)
            self.damaged.add(message.metadata.message_id)
        delay = self._plan.chance("latency", place, "back").uniform(*LATENCY_S)
        delay += fault.chance.choice(LATE_S) if fault and kind == "reply-late" else 0.0
        for _ in range(2 if kind == "reply-twice" else 1):
            self._timeline.after(delay, lambda: self._arrived.setdefault(
                message.metadata.message_id, []).append(reply))

    def _alive(self) -> None:
        if not self._owner.alive:
            raise Crash


def _damaged(message: Any, fault: Fault) -> Any:
    """A copy with other bytes: half of the body or of a vector missing, or another character or value in the middle."""
    if message.has_error():
        return message
    body, record = message.content["c"]["body"], message.content.get("arrays", ArrayRecord())
    arrays = {name: np.frombuffer(a.data, a.dtype).copy() for name, a in record.items()}
    in_vector, cut = bool(arrays) and fault.chance.random() < 0.5, fault.kind.endswith("cut")
    if in_vector:
        name = min(arrays)
        if cut:
            arrays[name] = arrays[name][:arrays[name].size // 2]
        else:
            arrays[name].view(np.uint8)[arrays[name].nbytes // 2] ^= 1
    elif cut:
        body = body[:len(body) // 2]
    else:
        body = _other(body)
    content = RecordDict({"c": ConfigRecord({"body": body})})
    if arrays:
        content["arrays"] = ArrayRecord({name: Array(v.dtype.name, v.shape, record[name].stype, v.tobytes())
                                         for name, v in arrays.items()})
    return Message(content=content, metadata=message.metadata)


def _other(body: bytes) -> bytes:
    """Another letter or digit in the middle of the longest string, so that it is JSON still; else no JSON at all."""
    strings = [s for s in _strings(json.loads(body)) if len(s) > 2]
    if not strings:
        return body[:-1]
    longest = max(strings, key=len)
    middle = next(i for i in range(len(longest) // 2, len(longest)) if longest[i].isalnum())
    letter = "A" if longest[middle] != "A" else "B"
    changed = longest[:middle] + letter + longest[middle + 1:]
    return body.replace(json.dumps(longest).encode()[1:-1], json.dumps(changed).encode()[1:-1])


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [s for item in inner for s in _strings(item)]
