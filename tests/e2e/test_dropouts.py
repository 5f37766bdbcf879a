"""Five sites and a coordinator, real processes over mutual TLS; sites are killed, hung or restarted at every stage.

Each sum that was unmasked is compared, exactly, with what the sites in it had encoded. No stage's deadline can pass:
only the loss of contact ends the wait for a dead site (after some 20 s, so runs go on side by side). What a test needs of
its run is declared in a `Job`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf import load_settings
from fl_server.contracting import make_contract
from privacy.verify import Verdict, verify_bundle
from simulations import demo
from simulations.local import declare_sites
from strategies.adapter import AdapterSpec
from strategies.model import build
from strategies.rules import rule

SITES = tuple(f"site-{x}" for x in "abcde")
STAGES = ("update", "shares", "masked", "vote", "unmask")
IN_SUM = {"update": False, "shares": False, "masked": False, "vote": True, "unmask": True}  # once y has arrived
ENVIRONMENT = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1",
               "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
LIMIT_S = 180.0  # of a whole run; its stages' deadlines are 600 s
AHEAD = 12  # runs that go on at once, six processes each


@dataclass(frozen=True)
class Fall:
    """What befalls a site when a stage's message reaches it for the first time: before its answer (asked), or when the
    answer is made, but not sent (answered)."""

    site: str
    stage: str
    when: str = "asked"
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Job:
    falls: tuple[Fall, ...]
    rounds: int = 2
    retries: int = 0
    restart: bool = False  # whoever is killed, at once
    gather: bool = False  # each attempt begins once all sites are connected
    stage_s: int = 600  # of every stage but training, and of the wait for all sites before a retry


class Probe:
    """The process from which all others are forked (probe.py); they end with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-P", str(Path(__file__).with_name("probe.py"))], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT)

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()


class Federation:
    """One run: its processes, and what they wrote down."""

    def __init__(self, probe: Probe, job: Job, out: Path, overrides: list[str], spec: AdapterSpec) -> None:
        self.job, self.out, self._probe, self._spec, self._port = job, out, probe, spec, demo.free_port()
        self.limit = time.monotonic() + LIMIT_S
        self._overrides = [*overrides, f"privacy.rounds={job.rounds}", f"privacy.retries={job.retries}",
                           f"server.out={out}", f"server.log={out}/log", f"server.port={self._port}", "server.wait_s=60",
                           f"server.stage_deadline_s={job.stage_s}"]
        self._settings = declare_sites(load_settings(self._overrides))
        demo.empty(out)
        demo.consortium(out, self._settings)
        demo.approve_all(out, self._settings)
        self._pids = {name: self._start(name) for name in ("coordinator", *SITES)}

    def restart_the_killed(self) -> None:
        for fall in self.job.falls:
            assert self.wait(fall.site) == -signal.SIGKILL
            self._pids[fall.site] = self._start(fall.site, again=True)

    def wait(self, name: str) -> int:
        while (code := self._probe.ask(do="wait", pid=self._pids[name], timeout_s=0.5)) is None:
            assert time.monotonic() < self.limit, f"{name} still runs"
        return int(code)

    def signal(self, name: str, number: int) -> None:
        self._probe.ask(do="signal", pid=self._pids[name], signal=number)

    def end(self, code: int) -> None:
        """Wait for the coordinator, then stop the sites: each must end well, or have been killed as planned."""
        assert self.wait("coordinator") == code, self.log("coordinator")
        gone = set() if self.job.restart else {f.site for f in self.job.falls if f.signal == signal.SIGKILL}
        for name in SITES:
            if name not in gone:
                self.signal(name, signal.SIGTERM)
        for name in SITES:
            assert self.wait(name) == (-signal.SIGKILL if name in gone else 0), self.log(name)

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self._say("--json").splitlines()[-1]))

    def status_text(self) -> str:
        return self._say()

    def log(self, name: str) -> str:
        return (self.out / f"{name}.log").read_text()

    def noted(self, name: str) -> list[dict[str, Any]]:
        path = self.out / f"{name}.dump"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def sums(self) -> dict[tuple[int, int], list[int]]:
        """(round, attempt) -> what the coordinator unmasked."""
        return {(n["round"], n["attempt"]): n["words"] for n in self.noted("coordinator")}

    def sum_of(self, sites: list[str], round_no: int, attempt: int = 0) -> list[int]:
        """What these sites encoded, added mod 2^32."""
        vectors = [np.array(n["words"], np.uint32) for name in sites for n in self.noted(name)
                   if n["stage"] == "update" and not n["code"] and (n["round"], n["attempt"]) == (round_no, attempt)]
        assert len(vectors) == len(sites), "each encoded once"
        total: list[int] = np.sum(vectors, axis=0, dtype=np.uint32).tolist()
        return total

    def failed_checks(self) -> set[str]:
        return {step.name for step in self._verdict().steps if not step.ok}

    def without_ledger(self) -> str:
        """Sites that the evidence names as trained, and whose ledger never came."""
        said = next(step.detail for step in self._verdict().steps if step.name == "ledgers")
        return said.partition("WITHOUT A LEDGER, which never came: ")[2]

    def _verdict(self) -> Verdict:
        return verify_bundle(self.out / "evidence", (self.out / "ca.sha256").read_text().strip())

    def _say(self, *more: str) -> str:
        done = subprocess.run([sys.executable, "-P", "-m", "fl_server.cli", "status", str(self.out), *more],
                              capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _start(self, name: str, again: bool = False) -> int:
        command = demo.commands(self.out, self._overrides, self._settings, self._port)[name]
        fall = next((asdict(f) for f in self.job.falls if f.site == name and not again), {})
        job = {"overrides": command[command.index("run") + 1:], "log": f"{self.out}/{name}.log",
               "dump": f"{self.out}/{name}.dump", "spec": [self._spec.shapes, sorted(self._spec.trained)],
               "fall": fall, "gather": self.job.gather}
        role = "coordinator" if name == "coordinator" else "site"
        return int(self._probe.ask(do="start", role=role, job=job))


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path,
        tiny_data: dict[str, Path]) -> Iterator[Callable[[Job], Federation]]:
    """run(job) -> its federation. Those that this session's next tests will ask for are started with it."""
    files = [tiny_data[f"site-{x}"] for x in "abcab"]
    overrides = ["model=local", "model.name=tiny", f"model.path={tiny_model}", "model.max_length=16", "data=files",
                 "data.name=tiny", f"data.evaluation.file={tiny_data['public']}", "privacy.sigma=2.0",
                 "data.sites={" + ",".join(f"{n}:{{file:{f}}}" for n, f in zip(SITES, files, strict=True)) + "}"]
    wanted = [item.callspec.params["job"] for item in request.session.items
              if isinstance(item, pytest.Function) and item.path == request.path]
    wanted, running = list(dict.fromkeys(wanted)), dict[Job, Federation]()
    contract = make_contract(declare_sites(load_settings(overrides)), {name: f"{k:064x}" for k, name in enumerate(SITES)})
    spec = build(tiny_model, contract).spec(rule(contract.rule.name, secure=True).trains)
    probe = Probe()

    def get(job: Job) -> Federation:
        new = wanted[len(running):wanted.index(job) + AHEAD]
        for each in new:
            running[each] = Federation(probe, each, tmp_path_factory.mktemp("federation") / "out", overrides, spec)
        for each in new:
            if each.restart:
                running[each].restart_the_killed()
        return running[job]

    try:
        yield get
    finally:
        probe.close()


Run = Callable[[Job], Federation]


def one(stage: str, when: str = "asked", **more: Any) -> Job:
    """Another site at each stage, so that it is now a lower, now a higher one of its pairs."""
    return Job((Fall(SITES[STAGES.index(stage)], stage, when),), **more)


def two(stage: str, **more: Any) -> Job:
    return Job((Fall("site-b", stage), Fall("site-d", stage)), **more)


def long(job: Job, name: str) -> Any:
    return pytest.param(job, id=name, marks=pytest.mark.long)


@pytest.mark.parametrize("job", [pytest.param(one(stage), id=stage) for stage in STAGES] + [
    long(one(stage, "answered"), f"{stage}-answered") for stage in STAGES])
@pytest.mark.case(19)
def test_one_killed_site_leaves_the_exact_sum_of_the_survivors(run: Run, job: Job) -> None:
    federation, fall = run(job), job.falls[0]
    others = [name for name in SITES if name != fall.site]
    survivors = list(SITES) if IN_SUM[fall.stage] else others
    federation.end(code=0)
    assert federation.sums() == {(1, 0): federation.sum_of(survivors, 1), (2, 0): federation.sum_of(others, 2)}
    status = federation.status()
    assert (status["state"], status["rounds_done"]) == ("done", 2)
    stages = ["vote", "unmask"] if fall.stage == "vote" else [fall.stage]  # a late voter is asked for its shares too
    lost = [f"{fall.site} {stage} site.unreachable" for stage in stages]
    assert [(r["outcome"], r["sites"], r["lost"]) for r in status["rounds"]] == [
        ("done", survivors, lost), ("done", others, [f"{fall.site} update site.unreachable"])]
    assert f"round 1, attempt 0: sum of {', '.join(survivors)}; lost: {', '.join(lost)}\n" in federation.status_text()
    assert federation.failed_checks() == set()
    assert federation.without_ledger() == (fall.site if IN_SUM[fall.stage] else ""), "it signed a round and never came back"
    assert all(federation.log(name).count("link: connected") <= 1 for name in others), "nobody else lost its link"


@pytest.mark.parametrize("job", [
    pytest.param(two("update", rounds=1, retries=1, stage_s=5), id="update-twice"),
    pytest.param(two("unmask", rounds=1), id="unmask"),
    *(long(two(stage, rounds=1), stage) for stage in STAGES[:4])])
@pytest.mark.case(19)
def test_two_killed_sites_void_the_attempt_and_without_retries_the_run(run: Run, job: Job) -> None:
    federation, stage = run(job), job.falls[0].stage
    federation.end(code=5)
    assert federation.sums() == {}, "nothing was unmasked"
    status, lost = federation.status(), [f"{f.site} {stage} site.unreachable" for f in job.falls]
    assert (status["state"], status["rounds_done"]) == ("secagg.too_few", 0)
    assert status["rounds"] == [{"round": 1, "attempt": attempt, "outcome": "void", "reason": "secagg.too_few", "sites": [],
                                 "lost": lost} for attempt in range(job.retries + 1)]
    assert f"round 1, attempt 0: void (secagg.too_few); lost: {', '.join(lost)}\n" in federation.status_text()
    assert federation.failed_checks() == set()
    assert bool(federation.without_ledger()) == IN_SUM[stage]
    assert not (federation.out / "adapter").exists()


@pytest.mark.parametrize("job", [two("masked", rounds=1, retries=1, restart=True)], ids=["masked"])
@pytest.mark.case(20)
def test_a_void_attempt_is_tried_again_with_the_restarted_sites(run: Run, job: Job) -> None:
    federation = run(job)
    federation.end(code=0)
    assert federation.sums() == {(1, 1): federation.sum_of(list(SITES), 1, attempt=1)}
    assert federation.sum_of(["site-a"], 1) != federation.sum_of(["site-a"], 1, attempt=1), "a fresh update"
    first, second = federation.status()["rounds"]
    assert (first["outcome"], first["reason"]) == ("void", "secagg.too_few")
    assert (second["outcome"], second["sites"], second["lost"]) == ("done", list(SITES), [])
    assert federation.failed_checks() == set()


@pytest.mark.parametrize("job", [
    pytest.param(one("masked", "answered", restart=True), id="masked"),
    long(one("update", "answered", restart=True), "update")])
@pytest.mark.case(20)
def test_a_restarted_site_is_lost_from_that_attempt_and_in_the_next_round(run: Run, job: Job) -> None:
    """Its first life had made the answer, and what it hadn't sent is asked for again: there is no second one."""
    federation, fall = run(job), job.falls[0]
    others = [name for name in SITES if name != fall.site]
    federation.end(code=0)
    assert [n["code"] for n in federation.noted(fall.site) if n["stage"] == fall.stage] == ["", "site.stale_round", ""]
    assert federation.sums() == {(1, 0): federation.sum_of(others, 1), (2, 0): federation.sum_of(list(SITES), 2)}
    assert [(r["sites"], r["lost"]) for r in federation.status()["rounds"]] == [
        (others, [f"{fall.site} {fall.stage} site.stale_round"]), (list(SITES), [])]
    assert federation.failed_checks() == set()


@pytest.mark.parametrize("job", [Job((Fall("site-c", "masked", signal=signal.SIGSTOP),), gather=True)], ids=["masked"])
@pytest.mark.case(22)
def test_a_site_that_hung_wakes_up_too_late_for_its_sum_and_in_time_for_the_next(run: Run, job: Job) -> None:
    federation, others = run(job), [name for name in SITES if name != "site-c"]
    journal = federation.out / "journal.jsonl"
    while not (journal.exists() and '"event":"done"' in journal.read_text()):
        assert time.monotonic() < federation.limit, federation.log("coordinator")
        time.sleep(0.1)
    federation.signal("site-c", signal.SIGCONT)
    federation.end(code=0)
    assert [n["code"] for n in federation.noted("site-c") if n["stage"] == "masked"] == ["", ""], "it masked, too late"
    assert federation.sums() == {(1, 0): federation.sum_of(others, 1), (2, 0): federation.sum_of(list(SITES), 2)}
    assert [(r["sites"], r["lost"]) for r in federation.status()["rounds"]] == [
        (others, ["site-c masked site.unreachable"]), (list(SITES), [])]
    assert federation.failed_checks() == set()
