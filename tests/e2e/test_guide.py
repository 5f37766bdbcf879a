"""The deployment guide and the operator's journey in one: every command of docs/deployment.md (but root's) is run as it
stands there, in order, by real processes on loopback: init, enroll, doctor, approve, run, revoke, verify, renew.

Replaced are hosts, ports, folders, the base model and the records. What people carry between machines is copied here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_processes import ENVIRONMENT

from simulations.demo import free_port, stop

ROOT = Path(__file__).parents[2]
SITES = ("hospital-a", "hospital-b", "hospital-c", "hospital-d")
GUIDE: list[tuple[str, str]] = re.findall(r"^```sh (\w+)\n(.*?)^```", (ROOT / "docs" / "deployment.md").read_text(),
                                          re.M | re.S)


def until(what: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.1)


class Machines:
    """A folder for each machine, in the place of its /var/lib/consilo, /etc/consilo and /srv/consilo."""

    def __init__(self, root: Path) -> None:
        self.root, self.running, self.used = root, dict[str, subprocess.Popen[bytes]](), set[str]()
        self.fingerprint = ""
        self.ports = {port: str(free_port()) for port in ("8443", "8444", "8445")}
        self.environment = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for name in ("ca", "coordinator", "engineer", *SITES):
            (root / name).mkdir()

    def script(self, machine: str, words: str, host: str) -> str:
        """The guide's block for that machine which holds these words, for `host`."""
        (block,) = [text for tag, text in GUIDE if tag == machine and words in text]
        self.used.add(block)
        return self.local(block, host)

    def local(self, text: str, host: str) -> str:
        folder = self.root / host
        text = text.replace("coordinator.example", "localhost").replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        for port, free in self.ports.items():
            text = re.sub(rf"(?<!\d){port}(?!\d)", free, text)
        for path, here in {"/var/lib/consilo": "", "/etc/consilo": "/etc", "/srv/consilo": "/srv"}.items():
            text = text.replace(path, f"{folder}{here}")
        if host in SITES:
            text = text.replace("hospital-a", host).replace("Hospital A", f"Hospital {host[-1].upper()}")
        return text

    def run(self, machine: str, words: str, host: str = "", *, code: int = 0, answer: str = "") -> str:
        host = host or machine
        done = subprocess.run(["bash", "-c", self.script(machine, words, host)], cwd=self.root / host, input=answer,
                              env={**self.environment, "ROOT": self.fingerprint}, capture_output=True, text=True,
                              timeout=180)
        assert done.returncode == code, (machine, words, done.stdout[-3000:], done.stderr[-3000:])
        return done.stdout

    def start(self, name: str, machine: str, words: str, host: str = "", before: str = "", last: bool = False) -> None:
        """In the background. before: what the guide's shell had read before. last: only the block's last command."""
        host = host or machine
        lines = self.script(machine, words, host).replace("\\\n", " ").strip().splitlines()
        script = "\n".join([before, *([] if last else lines[:-1]), f"exec {lines[-1]}"])
        with (self.root / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(["bash", "-ec", script], cwd=self.root / host, stdout=log, stderr=log,
                                                  env={**self.environment, "ROOT": self.fingerprint})

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()

    def carry_roster(self) -> None:
        """Step 2's sentence: roster twice, and the lists, beside and then renamed."""
        hub = self.root / "coordinator"
        shutil.copy(self.root / "ca" / "roster.json", hub / "roster.json")
        if (hub / "store").exists():
            shutil.copy(hub / "roster.json", hub / "store" / "roster.json")
        for crl in (self.root / "ca" / "ca").glob("crl-*.pem"):
            target = hub / "certificates" / "trust" / crl.name
            shutil.copy(crl, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)

    def waiting(self) -> list[Path]:
        return [f for f in (self.root / "coordinator" / "store" / "enrolments").glob("*/request.json")
                if not (f.parent / "answer.json").exists()]

    def answer(self) -> None:
        """The CA's operator carries one request to the CA, and its answer back."""
        until(self.waiting)
        file = self.waiting()[0]
        shutil.copy(file, self.root / "ca" / "request.json")
        before = set((self.root / "ca" / "ca" / "issued").glob("*/answer.json"))
        times = {p: p.stat().st_mtime_ns for p in before}
        self.run("ca", "--enrolment request.json")
        made = [p for p in (self.root / "ca" / "ca" / "issued").glob("*/answer.json")
                if times.get(p) != p.stat().st_mtime_ns]
        assert len(made) == 1
        shutil.copy(made[0], file.parent / "answer.json")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path)
    try:
        yield made
    finally:
        stop(made.running)


def furnish(machines: Machines, tiny_model: Path, tiny_data: dict[str, Path]) -> None:
    """Base model, public split, records, and the example files; a tiny model needs its own length and records."""
    for host in ("coordinator", *SITES):
        (machines.root / host / "srv").mkdir()
        (machines.root / host / "etc").mkdir()
        (machines.root / host / "srv" / "model").symlink_to(tiny_model)
    shutil.copy(tiny_data["public"], machines.root / "coordinator" / "srv" / "public.csv")
    for i, host in enumerate(SITES):
        shutil.copy(tiny_data[f"site-{'abca'[i]}"], machines.root / host / "srv" / "data.csv")
        shutil.copy(ROOT / "docs" / "policy-example.yaml", machines.root / host / "etc" / "policy.yaml")
    tiny = "model.name=tiny model.max_length=16"
    for host, name in {"coordinator": "coordinator", **dict.fromkeys(SITES, "site")}.items():
        text = machines.local((ROOT / "deploy" / "systemd" / f"{name}.env").read_text(), host)
        text = text.replace("model.name=minilm", tiny).replace("n_decl:700", "n_decl:70").replace("rounds=20", "rounds=16")
        (machines.root / host / "etc" / f"{name}.env").write_text(text.replace("threads=4", "threads=1"))


@pytest.mark.timeout(600)
def test_the_guide_runs_and_a_revoked_site_is_out(machines: Machines, tiny_model: Path, tiny_data: dict[str, Path]) -> None:
    at, ca = machines.root, machines.root / "ca"
    hub = at / "coordinator"
    furnish(machines, tiny_model, tiny_data)

    machines.run("coordinator", "fl-client csr")
    machines.run("engineer", "fl-client csr")
    shutil.copy(hub / "keys" / "request.json", ca / "hub.request.json")
    shutil.copy(at / "engineer" / "engineer" / "request.json", ca / "eng.request.json")
    machines.fingerprint = re.findall(r"\b[0-9a-f]{64}\b", machines.run("ca", "fl-ca init"))[0]
    shutil.copytree(ca / "ca" / "issued" / "hub", hub / "certificates")
    shutil.copytree(ca / "ca" / "issued" / "eng", at / "engineer" / "engineer-certificates")
    machines.carry_roster()
    machines.start("control", "coordinator", "fl-server control")
    until(lambda: "control plane on" in machines.log("control"))

    for host in SITES:
        machines.run("ca", "fl-ca token", "ca") if host == "hospital-a" else _token(machines, host)
        shutil.move(ca / "token.txt", at / host / "token.txt")
        machines.start(f"enroll-{host}", "site", "fl-client enroll", host)
    for _ in SITES:
        machines.answer()
    for host in SITES:
        assert machines.running.pop(f"enroll-{host}").wait(90) == 0, machines.log(f"enroll-{host}")
    machines.carry_roster()

    machines.run("coordinator", "contract create")
    shutil.copy(hub / "contract.json", at / "engineer")
    machines.run("engineer", "contract sign")
    for host in ("coordinator", *SITES):
        for name in ("contract.json", "signature.json"):
            shutil.copy(at / "engineer" / name, at / host / name)

    for host in SITES:
        said = machines.run("site", "fl-client doctor", host, answer="y\n")
        failed = {line.split()[1] for line in said.splitlines() if line.startswith("FAIL")}
        assert {"contract", "route"} <= failed <= {"contract", "route", "sandbox"}, said
        assert "Approved, and recorded" in said

    stop({"control": machines.running.pop("control")})
    machines.start("run", "coordinator", "fl-server run", before=". etc/coordinator.env")
    for host in SITES:
        machines.start(host, "site", "fl-client run", host, before=". etc/site.env")
    journal = hub / "run-1" / "journal.jsonl"

    def rounds() -> list[dict[str, Any]]:
        lines = journal.read_text().splitlines() if journal.exists() else []
        assert machines.running["run"].poll() is None or lines, machines.log("run")
        return [e for e in map(json.loads, lines) if e["event"] == "done"]

    until(lambda: len(rounds()) >= 2)
    assert rounds()[0]["sites"] == list(SITES)
    machines.run("ca", "fl-ca revoke")
    machines.carry_roster()
    assert machines.running["run"].wait(180) == 0, machines.log("run")
    out = rounds()[-1]
    assert (len(rounds()), out["sites"]) == (16, list(SITES[:3])), "the others go on"
    assert {lost.split()[0] for lost in out["lost"]} == {"hospital-d"}
    assert {lost.split()[2] for lost in out["lost"]} <= {"identity.revoked", "site.unreachable", "site.session_aborted"}
    stop({host: machines.running.pop(host) for host in SITES})
    assert machines.run("coordinator", "fl-privacy verify").splitlines()[-1] == "PASS"

    machines.start("control", "coordinator", "fl-server control", last=True)
    until(lambda: "control plane on" in machines.log("control"))
    keys = at / "hospital-a" / "keys"
    names = ("tls.pem", "tls.key", "sign.key")
    old = [(keys / name).read_bytes() for name in names]
    machines.start("renew", "site", "fl-client renew", "hospital-a")
    machines.answer()
    assert machines.running.pop("renew").wait(60) == 0, machines.log("renew")
    assert [(keys / name).read_bytes() == data for name, data in zip(names, old, strict=True)] == [False, False, True], (
        "the ledger's key stays")
    machines.start("renew", "site", "fl-client renew", "hospital-d")
    until(lambda: machines.waiting() or machines.running["renew"].poll() is not None)
    if machines.waiting():
        shutil.copy(machines.waiting()[0], ca / "request.json")
        refused = subprocess.run(["bash", "-ec", "fl-ca issue ca --enrolment request.json"], cwd=ca, capture_output=True,
                                 env=machines.environment, text=True)
        assert refused.returncode == 3 and re.search(r"ca\.not_current|identity\.revoked", refused.stderr), refused
    else:  # its own list says so already
        assert machines.running["renew"].returncode == 3 and "revoked" in machines.log("renew")
    assert machines.used == {text for tag, text in GUIDE if tag != "root"}, "a block of the guide wasn't run"


def _token(machines: Machines, host: str) -> None:
    """Step 3 is repeated for each site."""
    script = machines.local(machines.script("ca", "fl-ca token", "ca"), host).replace(str(machines.root / host), ".")
    subprocess.run(["bash", "-ec", script], cwd=machines.root / "ca", env=machines.environment, check=True,
                   capture_output=True)
