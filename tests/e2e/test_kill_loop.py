"""kill -9 of random processes of real runs at random times: each run goes on to its end, or ends void, and says so."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_dropouts import ENVIRONMENT, Probe

from conf import load_settings
from fl_server.assemble import begun
from fl_server.contracting import make_contract
from fl_server.journal import status
from privacy.verify import verify_bundle
from simulations import demo
from simulations.local import declare_sites
from strategies.model import build
from strategies.rules import rule

SITES = tuple(f"site-{x}" for x in "abcde")
ROUNDS, RETRIES = 12, 60
LIMIT_S = 900.0  # of one run, however often something is killed in it


class Place:
    """One run whose processes are killed and started again, the coordinator with `resume`."""

    def __init__(self, probe: Probe, out: Path, model: Path, data: dict[str, Path], *more: str, trains: str = "",
                 prepare: Callable[[Place], None] = lambda place: None) -> None:
        """trains: the site that really does. prepare: between the approvals and the first process."""
        self.probe, self.out, self.trains, self.port = probe, out, trains, demo.free_port()
        files = [data[f"site-{x}"] for x in "abcab"]
        self.overrides = [
            "model=local", "model.name=tiny", f"model.path={model}", "model.max_length=16", "data=files", "data.name=tiny",
            f"data.evaluation.file={data['public']}", "privacy.sigma=12.0", f"privacy.rounds={ROUNDS}",
            f"privacy.retries={RETRIES}", f"server.out={out}", f"server.log={out}/log", f"server.port={self.port}",
            "server.wait_s=120", "server.stage_deadline_s=6", "server.deadline_s=6", "server.evaluate_every=100",
            "data.sites={" + ",".join(f"{n}:{{file:{f}}}" for n, f in zip(SITES, files, strict=True)) + "}", *more]
        self.settings = declare_sites(load_settings(self.overrides))
        self.rounds = self.settings.privacy.rounds
        contract = make_contract(self.settings, {name: f"{k:064x}" for k, name in enumerate(SITES)})
        self.spec = build(model, contract).spec(rule(contract.rule.name, secure=True).trains)
        demo.empty(out)
        demo.consortium(out, self.settings)
        demo.approve_all(out, self.settings)
        self.urls: dict[str, str] = {}
        prepare(self)
        self.pids = {name: self.start(name) for name in ("coordinator", *SITES)}

    def start(self, name: str) -> int:
        command = demo.commands(self.out, self.overrides, self.settings, self.port)[name]
        if name in self.urls:
            command = [f"site.url={self.urls[name]}" if part.startswith("site.url=") else part for part in command]
        job = {"overrides": command[command.index("run") + 1:], "log": f"{self.out}/{name}.log",
               "dump": f"{self.out}/{name}.dump", "spec": [self.spec.shapes, sorted(self.spec.trained)], "fall": {},
               "gather": False, "gate": f"{self.out}/gate", "trains": name == self.trains,
               "command": "resume" if begun(self.out) else "run"}
        return int(self.probe.ask(do="start", role="coordinator" if name == "coordinator" else "site", job=job))

    def allow(self, rounds: int, *, gather: bool = False) -> None:
        """No later round than this begins yet. gather: each waits until all sites are connected."""
        new = self.out / "gate.new"
        new.write_text(json.dumps({"rounds": rounds, "gather": gather}))
        new.replace(self.out / "gate")

    def ended(self, name: str, timeout_s: float = 0.0) -> int | None:
        code: int | None = self.probe.ask(do="wait", pid=self.pids[name], timeout_s=timeout_s)
        return code

    def kill(self, name: str) -> int | None:
        """The exit code, had it ended before."""
        if (code := self.ended(name)) is not None:
            return code
        self.probe.ask(do="signal", pid=self.pids[name], signal=signal.SIGKILL)
        code = self.ended(name, 20.0)
        return None if code == -signal.SIGKILL else code

    def close(self) -> None:
        for name in SITES:
            self.probe.ask(do="signal", pid=self.pids[name], signal=signal.SIGKILL)
            self.ended(name, 20.0)

    def drawn(self, name: str) -> int:
        path = self.out / f"{name}.dump"
        return path.read_text().count('"stage": "drawn"') if path.exists() else 0

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.out / "journal.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [e for e in found if e["event"] == kind]

    def until(self, rounds: int) -> None:
        end = time.monotonic() + LIMIT_S
        while len(self.events("done")) < rounds:
            assert time.monotonic() < end and self.ended("coordinator") is None, "no more rounds"
            time.sleep(0.1)

    def check(self, code: int) -> None:
        """What holds however it ended: the evidence, the chain of adapters, and no draw without a charge."""
        said = status(self.out / "journal.jsonl")
        assert code in (0, 5) and said["state"] == ("done" if code == 0 else said["state"]) != "running or interrupted"
        done = [(r["round"], r["attempt"]) for r in said["rounds"] if r["outcome"] == "done"]
        assert [r for r, _ in done] == list(range(1, len(done) + 1)), "each round once, in order"
        slots = [(r["round"], r["attempt"]) for r in said["rounds"]]
        assert len(set(slots)) == len(slots) and (len(done) == self.rounds if code == 0 else len(done) < self.rounds)
        verdict = verify_bundle(self.out / "evidence", (self.out / "ca.sha256").read_text().strip())
        assert verdict.verdict == "PASS", verdict.as_dict()
        for name in SITES:
            lines = (self.out / "sites" / name / "state" / "ledger.jsonl").read_text().splitlines()
            reserves = [json.loads(line)["body"] for line in lines if '"kind":"reserve"' in line]
            assert len(reserves) >= self.drawn(name), f"{name} drew noise that it didn't charge"
            at = [(b["round"], b["attempt"]) for b in reserves]
            assert len(set(at)) == len(at), "an attempt is charged once"


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.case(23, 24)
def test_fifty_kills_of_random_processes(tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path],
                                         record_property: Any) -> None:
    rng, kills, runs, probe = random.Random(20), 0, 0, Probe()
    assert ENVIRONMENT["OMP_NUM_THREADS"] == "1"
    try:
        while kills < 50:
            place, runs = Place(probe, tmp_path / f"run{runs}", tiny_model, tiny_data), runs + 1
            end = time.monotonic() + LIMIT_S
            while (code := place.ended("coordinator", rng.uniform(0.05, 3.0))) is None:
                assert time.monotonic() < end, "the run neither goes on nor ends"
                victim = rng.choice(("coordinator", "coordinator", *SITES))
                code = place.kill(victim)
                if victim == "coordinator" and code is not None:
                    break
                assert code is None, f"{victim} had ended with {code}: {(place.out / f'{victim}.log').read_text()[-500:]}"
                kills += 1
                time.sleep(rng.choice((0.0, 0.0, 1.0)))
                place.pids[victim] = place.start(victim)
                if rng.random() < 0.5:  # let it get somewhere
                    time.sleep(rng.uniform(0, 8))
            place.close()
            place.check(code)
    finally:
        probe.close()
    record_property("runs", runs)
    print(f"{kills} kills in {runs} runs")
