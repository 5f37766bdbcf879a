"""What must hold after every step, looked at by one who sees every disk, draw, mask and message.

Each rule has a name (docs/chaos.md). A rule looks at what would be left if the power went now, never at what an object
believes. Nothing here is used by the product.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from fl_client.agent import LEDGER
from fl_client.app import Handler, Reply, StageRefused, Vector
from fl_client.round import SESSION_S
from fl_client.witness import HEAD
from privacy.accountant import epsilon
from privacy.contract import Contract
from privacy.errors import ConsiloError, SiteCode
from privacy.ledger import check_extract
from privacy.ledger_records import REFUSALS
from privacy.secagg import prg
from simulations.chaos_machine import Crash, Machine, System

Slot = tuple[str, int, int]  # run, round, attempt
Sum = tuple[Slot, int]  # and the pass
NOWHERE: Sum = (("", 0, 0), 1)
OFFERS = ("train.update", "train.again")
JOURNAL = "rounds.jsonl"
MOST_LINES = 40  # of a site's journal for each attempt and each life, and so of records of its ledger


@dataclass(frozen=True)
class Violation:
    """rule: its name. where: site or coordinator, and the attempt."""

    rule: str
    where: str
    what: str

    def as_dict(self) -> dict[str, str]:
        return {"rule": self.rule, "where": self.where, "what": self.what}


@dataclass
class SiteView:
    """All that is known of a site from outside of its code. Sets hold what its disk holds durably."""

    name: str
    machine: Machine
    folder: Path
    lines: dict[str, list[bytes]] = field(default_factory=dict)  # of ledger and journal
    reserves: dict[Slot, dict[str, Any]] = field(default_factory=dict)
    commits: set[Slot] = field(default_factory=set)
    records: Counter[str] = field(default_factory=Counter)  # of the ledger, by kind
    events: Counter[tuple[Any, ...]] = field(default_factory=Counter)  # of the journal: kind, slot, pass
    stated: set[str] = field(default_factory=set)
    heads: dict[str, int] = field(default_factory=dict)  # size of the head seen, by log
    draws: dict[Slot, NDArray[np.float32]] = field(default_factory=dict)
    vectors: dict[Sum, set[str]] = field(default_factory=dict)
    lives: int = 0


class Watch:
    """Of one history. `found`: what was violated, in order."""

    def __init__(self, system: System) -> None:
        self.found: list[Violation] = []
        self.sites: dict[str, SiteView] = {}
        self._system, self._secrets, self._keys = system, dict[bytes, Sum](), set[tuple[str, bytes]]()
        self._at: dict[str, Sum] = {}  # what each site works on
        self._asked: dict[str, Sum] = {}  # what the last M0 named
        self._since: dict[str, float] = {}

    def expect(self, holds: bool, rule: str, where: str, what: str) -> None:
        if not holds:
            self.found.append(Violation(rule, where, what))

    def add(self, machine: Machine) -> None:
        self.sites[machine.name] = SiteView(machine.name, machine, machine.root)

    # The site's side -------------------------------------------------------------------------------------------------

    def draw(self, site: str, contract: Contract, update: NDArray[np.float32]) -> NDArray[np.float32]:
        """The trainer has drawn: records were sampled, and noise."""
        view, slot = self.sites[site], self._asked[site][0]
        self._at[site], self._since[site] = self._asked[site], self._system.elapsed
        self._read(view)
        if contract.privacy.trust != "none":
            self.expect(slot in view.reserves, "charge-before-draw", _name(site, slot),
                        "noise was drawn, and no durable record of the ledger has reserved it")
        self.expect(slot not in view.draws, "one-draw", _name(site, slot), "records were sampled twice for one charge")
        view.draws[slot] = update.copy()
        return update

    def wrap(self, site: str, contract: Contract, handlers: Mapping[str, Handler]) -> dict[str, Handler]:
        """The handlers of a new life of a site's agent, each looked at before and after."""
        self.sites[site].lives += 1
        answered: dict[str, tuple[bytes, bytes]] = {}
        return {name: self._watched(site, contract, name, handler, answered) for name, handler in handlers.items()}

    def _watched(self, site: str, contract: Contract, name: str, handler: Handler,
                 answered: dict[str, tuple[bytes, bytes]]) -> Handler:
        def run(body: bytes, arrays: dict[str, Vector]) -> Reply:
            key, view = _digest(body, arrays), self.sites[site]
            if self._system.elapsed - self._since.get(site, 0.0) > SESSION_S:
                _forget_attempt(answered)
            repeated = name in answered and answered[name][0] == key
            if name in OFFERS and not repeated:
                self._asked[site] = _sum(body)
            where = _name(site, self._at.get(site, NOWHERE)[0])
            try:
                reply = handler(body, arrays)
            except Crash:
                raise
            except StageRefused as e:
                self.expect(not repeated, "stored-reply", where, f"{name} was answered, and is refused when it is repeated")
                if e.code is SiteCode.SECAGG or (name in OFFERS and e.code in (SiteCode.BUDGET, SiteCode.FAILED)):
                    _forget_attempt(answered)
                self._step(view, where)
                raise
            except Exception as e:
                process = self._system.process
                injected = isinstance(e, OSError | ConsiloError) and process is not None and process.hurt
                self.expect(injected, "typed-errors", where, f"{name} failed with {type(e).__name__}: {e}")
                if name in OFFERS:
                    _forget_attempt(answered)
                self._step(view, where)
                raise
            made = _digest(*reply)
            if repeated:
                self.expect(answered[name][1] == made, "stored-reply", where, f"{name} was repeated, and answered otherwise")
            elif name in OFFERS:
                _forget_attempt(answered)
                self._at[site] = self._asked[site]
            answered[name] = (key, made)
            self._step(view, where)
            self._left(view, contract, name, reply, where)
            return reply

        return run

    def _left(self, view: SiteView, contract: Contract, name: str, reply: Reply, where: str) -> None:
        """An answer is about to leave: what it needs must be durable."""
        (slot, pass_no), (body, arrays) = self._at.get(view.name, NOWHERE), reply
        said = json.loads(body)
        times = {kind: view.events[kind, *slot, pass_no] for kind in ("started", "spent", "unmasked")}
        if name in OFFERS:
            self.expect(times["started"] == 1, "journal-before-key", where,
                        f"M1 leaves, and the journal holds its attempt {times['started']} times")
        elif name == "train.masked":
            private = contract.privacy.trust != "none"
            self.expect(not private or (slot in view.reserves and slot in view.commits), "charge-before-send", where,
                        "a masked vector leaves, and its charge isn't durable")
            self.expect(times["spent"] == 1, "journal-before-vector", where,
                        f"M5 leaves, and the journal holds it as spent {times['spent']} times")
            vectors = view.vectors.setdefault((slot, pass_no), set())
            vectors.add(hashlib.sha256(arrays["y"].tobytes()).hexdigest())
            self.expect(len(vectors) == 1, "one-vector", where, "two vectors were masked for one sum")
        elif name == "train.unmask" and contract.secagg.enabled:
            self.expect(times["unmasked"] == 1, "journal-before-shares", where,
                        f"M9 leaves, and the journal holds its sum {times['unmasked']} times")
        envelopes = [said.get("statement", ""), *said.get("refusals", ())] if name != "query.witness" else []
        self.expect(view.stated.issuperset(e for e in envelopes if e), "journal-before-statement", where,
                    f"{name} carries a statement that the journal doesn't hold")
        if name == "query.witness" and said["statement"]:
            self.expect(said["size"] in view.heads.values(), "head-before-signature", where,
                        "a signature on a head leaves, and the head isn't durable")

    def masks(self) -> ExitStack:
        """While it is open, every secret that a site turns into a mask is looked at."""
        derive, add = prg.derive_key, prg.add_masks

        def deriving(secret: bytes, info: bytes) -> bytes:
            site = self._site()
            if site:
                now = self._at[site]
                self.expect(self._secrets.setdefault(secret, now) == now, "fresh-secrets", _name(site, now[0]),
                            "a secret of another sum makes a mask again")
            return derive(secret, info)

        def adding(vector: Any, masks: Any, **kw: Any) -> None:
            site = self._site()
            for key, _ in masks if site else ():
                self.expect((site, key) not in self._keys, "mask-once", _name(site, self._at[site][0]),
                            "a keystream masks a second vector")
                self._keys.add((site, key))
            add(vector, masks, **kw)

        stack = ExitStack()
        stack.enter_context(mock.patch.object(prg, "derive_key", deriving))
        stack.enter_context(mock.patch.object(prg, "add_masks", adding))
        return stack

    def _site(self) -> str:
        process = self._system.process
        return process.machine.name if process and process.machine.name in self.sites else ""

    # Disks -----------------------------------------------------------------------------------------------------------

    def _step(self, view: SiteView, where: str) -> None:
        self._read(view)
        most = MOST_LINES * (1 + len(view.draws) + view.lives)
        size = len(view.lines.get(JOURNAL, ()))
        self.expect(size <= most, "bounded-disk", where, f"the journal has {size} lines")
        runs = 1 + len({slot[0] for slot in view.draws}) + view.lives
        self.expect(view.records["refusal"] <= len(REFUSALS) * runs, "bounded-disk", where, "the ledger fills with refusals")

    def _read(self, view: SiteView) -> None:
        for line in self._new(view, LEDGER):
            body = json.loads(line)["body"]
            view.records[body["kind"]] += 1
            if body["kind"] in ("reserve", "commit"):
                slot = (body["run"], body["round"], body["attempt"])
                self.expect(body["kind"] == "commit" or slot not in view.reserves, "one-charge", _name(view.name, slot),
                            "an attempt was reserved twice")
                if body["kind"] == "reserve":
                    view.reserves[slot] = body
                else:
                    view.commits.add(slot)
        for line in self._new(view, JOURNAL):
            event = json.loads(line)
            if event["event"] == "stated":
                view.stated.add(event["envelope"])
            else:
                view.events[event["event"], event["run"], event["round"], event["attempt"], event["pass"]] += 1
        head = view.machine.durable(view.folder / HEAD)
        for log, seen in (json.loads(head) if head else {}).items():
            self.expect(seen["head"]["size"] >= view.heads.get(log, 0), "head-never-falls", view.name,
                        "the witness's head is older than one that it had")
            view.heads[log] = seen["head"]["size"]
        self.expect(bool(head) or not view.heads, "head-never-falls", view.name, "the witness's head is gone")

    def _new(self, view: SiteView, name: str) -> list[bytes]:
        """Durable lines since the last look. What was durable once must stay."""
        data = view.machine.durable(view.folder / name)
        now, known = data[:data.rfind(b"\n") + 1].splitlines(), view.lines.get(name, [])
        self.expect(now[:len(known)] == known, "append-only", view.name, f"{name} lost or changed a durable line")
        view.lines[name] = now
        return now[len(known):]

    def ledgers(self, contracts: Mapping[str, Contract], certificates: Mapping[str, Any]) -> None:
        """What each ledger says covers what was drawn."""
        for view in self.sites.values():
            self._read(view)
            lines = view.lines.get(LEDGER)
            if not lines:
                continue
            ledger = check_extract(b"\n".join(lines) + b"\n", certificates[view.name])
            drawn = [contracts[run].mechanism(view.name, no) for run, no, _ in view.draws if run in contracts]
            private = [m for m in drawn if m.private]
            spent = epsilon([r.release for r in ledger.reserves], ledger.delta)
            least = epsilon([_release(m) for m in private], ledger.delta)
            self.expect(least <= spent <= float(ledger.epsilon) + 1e-4, "epsilon", view.name,
                        f"epsilon of what was drawn is {least}, the ledger's {ledger.epsilon}")
            self.expect(float(ledger.epsilon) <= ledger.cap, "cap", view.name, "more was reserved than the cap")
            self.expect(len(private) <= len(ledger.reserves), "charge-before-draw", view.name, "more draws than reserves")


def _release(m: Any) -> Any:
    from privacy.accountant import Release

    return Release(m.q, m.sigma, m.steps, m.group)


def _forget_attempt(answered: dict[str, tuple[bytes, bytes]]) -> None:
    for name in [name for name in answered if name.startswith("train.")]:
        del answered[name]


def _sum(body: bytes) -> Sum:
    try:
        offer = json.loads(body)
        return (str(offer["run"]), int(offer["round"]), int(offer["attempt"])), int(offer["pass_no"])
    except (ValueError, KeyError, TypeError):
        return NOWHERE


def _digest(body: bytes, arrays: Mapping[str, Vector]) -> bytes:
    parts = [body, *(p for name in sorted(arrays) for p in (name.encode(), arrays[name].tobytes()))]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _name(site: str, slot: Slot) -> str:
    return f"{site}, round {slot[1]}, attempt {slot[2]}"


def payload(envelope: str | bytes) -> dict[str, Any]:
    """What a statement says, unverified."""
    predicate: dict[str, Any] = json.loads(b64decode(json.loads(envelope)["payload"]))["predicate"]
    return predicate


@contextmanager
def quiet(names: tuple[str, ...]) -> Iterator[None]:
    """Expected refusals by the hundred aren't news."""
    import logging

    levels: list[Callable[[], None]] = []
    for name in names:
        logger = logging.getLogger(name)
        levels.append(lambda logger=logger, level=logger.level: logger.setLevel(level))  # type: ignore[misc]
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for back in levels:
            back()
