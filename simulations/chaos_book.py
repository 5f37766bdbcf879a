"""What must hold of a run at the coordinator, looked at after its every step: rounds, sums, adapters, log and evidence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.bundle import statement_name
from privacy.contract import Contract
from privacy.secagg.encoding import Encoding
from privacy.transparency import least_witnesses
from privacy.verify import verify_bundle
from simulations.chaos_machine import Machine
from simulations.chaos_parts import spec_of
from simulations.chaos_watch import Watch, payload
from strategies.adapter import Tensors, adapter_digest, initial
from strategies.base import Round, after_training, setup
from strategies.federate import federate
from strategies.merge import effective
from strategies.rules import rule

FLOAT32 = 1e-5  # rounding of a few sums of values below some tens
AMPLIFIED = 100.0  # errors of the first sum, by the second one and the factorisation
KEPT = 8  # folders of rounds that are left: the newest, and one that each crash forgot


class Book:
    """Of one run. out: its folder. Looks at what is durable."""

    def __init__(self, watch: Watch, machine: Machine, contract: Contract, out: Path, log: Path) -> None:
        self._watch, self._machine, self._contract, self._out, self._log = watch, machine, contract, out, log
        self.spec = spec_of(contract)
        start = initial(self.spec, contract.lora.seed)
        self._adapters: dict[str, Tensors] = {adapter_digest(start): start}
        self._rule = rule(contract.rule.name, secure=contract.secagg.enabled)
        self._setup, self._names = setup(self._rule, contract, self.spec), [s.name for s in contract.sites]
        self._state: dict[str, Mapping[str, NDArray[np.float32]]] = {adapter_digest(start): {}}
        self._head, self._read = adapter_digest(start), 0
        self._offered: dict[tuple[int, int, int], bytes] = {}
        self._statements: list[str] = []
        self._logged: list[bytes] = []
        self.done: list[int] = []
        self.void = 0
        self._accepted = 0
        self._newest, self._cosigned = 0, dict[int, set[str]]()  # size of the last head, and who signed which

    def saved(self, adapter: Tensors) -> None:
        self._adapters[adapter_digest(adapter)] = adapter

    def pushed(self, stage: str, body: bytes) -> None:
        """A message of the coordinator sets out."""
        if stage in ("update", "again"):
            offer = json.loads(body)
            slot, digest = (offer["round"], offer["attempt"], offer["pass_no"]), hashlib.sha256(body).digest()
            where = f"round {slot[0]}, attempt {slot[1]}"
            self.look()
            self._watch.expect(self._offered.setdefault(slot, digest) == digest, "one-offer", where,
                               "an attempt is offered in two ways")
            self._watch.expect(offer["adapter"] == self._head, "adapter-chain", where,
                               "the round starts from another adapter than the last one left")
            self._watch.expect(offer["round"] == len(self.done) + 1, "round-once", where,
                               f"{len(self.done)} rounds are done")
        elif stage == "witness":
            head = payload_of_checkpoint(json.loads(body)["checkpoint"])
            durable, self._newest = self._machine.durable(self._log / "entries.txt"), head
            self._watch.expect(head <= durable.count(b"\n"), "log-before-head", "coordinator",
                               "a signed head covers an entry that isn't durable")

    def look(self) -> None:
        """All that was stated since the last look."""
        there = sorted(p.name for p in (self._out / "evidence" / "statements").glob("[0-9]*.json"))
        self._watch.expect(there[:len(self._statements)] == self._statements, "append-only", "coordinator",
                           "a statement is gone from the evidence")
        for name in there[len(self._statements):]:
            kind = (statement_name(f"statements/{name}") or (0, "", ""))[1]
            self._accepted += kind == "acceptance"
            if kind == "round":
                self._round(payload((self._out / "evidence" / "statements" / name).read_bytes()))
        self._statements = there
        data = self._machine.durable(self._log / "entries.txt")
        lines = data[:data.rfind(b"\n") + 1].splitlines()
        self._watch.expect(lines[:len(self._logged)] == self._logged, "append-only", "coordinator", "the log lost an entry")
        self._logged = lines
        left = len(list((self._out / "rounds").glob("*")))
        self._watch.expect(left <= KEPT + self._machine.crashes, "bounded-disk", "coordinator", f"{left} rounds are kept")

    def _round(self, said: Mapping[str, Any]) -> None:
        where = f"round {said['round']}, attempt {said['attempt']}"
        expect = self._watch.expect
        expect(said["round"] == len(self.done) + 1, "round-once", where, f"{len(self.done)} rounds are done")
        expect(said["adapter_in"] == self._head, "adapter-chain", where, "it starts from another adapter than the last left")
        if said["outcome"] != "done":
            self.void += 1
            return
        self.done.append(said["round"])
        expect(len(said["sites"]) >= self._contract.secagg.survivors, "enough-sites", where,
               f"the sum is over {len(said['sites'])} sites")
        new, old = said["adapter_out"], said["adapter_in"]
        self._head = new
        known = new in self._adapters and old in self._state
        if known:
            self._applied(said, old, new, where)
        expect(known, "adapter-chain", where, "nobody made the adapter that it names")

    def _applied(self, said: Mapping[str, Any], old: str, new: str, where: str) -> None:
        """The new adapter is the old one and one step along the mean of what the named sites drew."""
        slot = (self._contract.run, said["round"], said["attempt"])
        drawn = {name: self._watch.sites[name].draws.get(slot) for name in said["sites"]}
        missing = [name for name, update in drawn.items() if update is None]
        self._watch.expect(not missing, "exact-sum", where, f"{missing} drew nothing for it")
        if missing:
            return
        weights = [self._contract.site(name).weight for name in drawn]
        begun = Round(self._setup, said["round"], self._adapters[old])
        ranks = dict(zip(self._names, self._setup.ranks, strict=True))
        news = [after_training(self._rule, begun, ranks[name], u) for name, u in drawn.items() if u is not None]
        due = federate(self._rule, self._setup, said["round"], self._adapters[old], news, weights,
                       terms=self._contract.rule, state=self._state[old])
        self._state[new] = due.state
        made, expected = (effective(tensors) for tensors in (self._adapters[new], due.adapter))
        off = max(float(np.abs(made[name] - value).max()) for name, value in expected.items())
        self._watch.expect(off <= self._bound(weights), "exact-sum", where,
                           f"the adapter isn't what the updates of {len(drawn)} sites make: {off:.3g} off, "
                           f"{self._bound(weights):.3g} allowed")

    def _bound(self, weights: list[float]) -> float:
        """What encoding may do to a coordinate of the mean, now and by the momentum of rounds before."""
        s, terms, passes = self._contract.secagg, self._contract.rule, self._rule.passes(self._setup)
        encoding = Encoding(bits=s.bits, ring=s.ring, cohort=len(self._contract.sites), ranges=((1, s.range),))
        step = terms.server_lr / (1 - terms.momentum) * (AMPLIFIED if passes == 2 else 1.0)
        return encoding.error_bound(weights)[0] * step + FLOAT32

    def verify(self, root: str) -> list[str]:
        """Steps of the verification of sealed evidence that fail, and must not."""
        verdict = verify_bundle(self._out / "evidence", root)
        excused = set[str]()
        if self._accepted < len(self._contract.sites) and not self._offered:
            excused |= {"contract", "ledgers"}  # somebody didn't accept, so nobody was asked to train
        if len(self._cosigned.get(self._newest, ())) < least_witnesses(len(self._contract.sites)):
            excused |= {"witnesses"}  # too few signed the last head, or their answers didn't come back
        return [f"{step.name}: {step.detail}" for step in verdict.steps if not step.ok and step.name not in excused]

    def began(self) -> None:
        """Another life of the coordinator, which has no signatures on heads yet."""
        self._cosigned.clear()

    def cosigned(self, site: str, size: int) -> None:
        """A signature on a head came back unharmed, while it was waited for."""
        self._cosigned.setdefault(size, set()).add(site)

    @property
    def sealed(self) -> bool:
        return (self._out / "evidence" / "manifest.json").exists()


def payload_of_checkpoint(envelope: str) -> int:
    return int(payload(envelope)["size"])
