"""The operator's journey on real processes, by commands alone: init, enroll, doctor, approve, run, revoke, renew."""

from __future__ import annotations

import json
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

SITES = ("site-a", "site-b", "site-c", "site-d")
POLICY = "approver: data protection officer\nmax_epsilon: 8.0\nrequired_walls: []\n"
Make = Callable[..., list[str]]


def until(what: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.1)


class World:
    """Folders of the CA, the coordinator, the engineer and four sites; commands run as each of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.running = root, dict[str, subprocess.Popen[bytes]]()
        self.ca, self.hub = root / "ca", root / "hub"

    def tool(self, module: str, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
        """A command with --json; its last line."""
        done = subprocess.run([sys.executable, "-P", "-m", module, *map(str, arguments), "--json"], capture_output=True,
                              text=True, timeout=120, env=ENVIRONMENT, cwd=self.root)
        assert done.returncode == code, (module, arguments, done.stdout[-2000:], done.stderr[-2000:])
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def start(self, name: str, module: str, *arguments: str | Path) -> None:
        with (self.root / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen([sys.executable, "-P", "-m", module, *map(str, arguments)], stdout=log,
                                                  stderr=log, env=ENVIRONMENT, cwd=self.root)

    def certify_on_paper(self, name: str, role: str) -> None:
        self.tool("fl_client.cli", "csr", self.root / name / "keys", "--name", name, "--organisation", f"Org {name}")
        self.tool("privacy.ca_cli", "issue", self.ca, "--request", self.root / name / "keys" / "request.json",
                  "--role", role, *(["--host", "localhost"] if role == "coordinator" else []))
        shutil.copytree(self.ca / "issued" / name, self.root / name / "certificates")

    def publish_roster(self) -> None:
        """What the CA's operator carries to the coordinator after every change."""
        self.tool("privacy.ca_cli", "roster", self.ca, "--out", self.hub / "roster.json")
        shutil.copy(self.hub / "roster.json", self.hub / "store" / "roster.json")
        for crl in self.ca.glob("crl-*.pem"):
            target = self.hub / "certificates" / "trust" / crl.name
            shutil.copy(crl, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)

    def waiting(self) -> list[Path]:
        """Requests in the relay's folder that the CA's operator hasn't answered."""
        return [f for f in (self.hub / "store" / "enrolments").glob("*/request.json")
                if not (f.parent / "answer.json").exists()]

    def answer(self, count: int) -> None:
        """The CA's operator carries so many requests to the CA, and its answers back."""
        for _ in range(count):
            until(self.waiting)
            file = self.waiting()[0]
            issued = Path(self.tool("privacy.ca_cli", "issue", self.ca, "--enrolment", file)["folder"])
            shutil.copy(issued / "answer.json", file.parent / "answer.json")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        stop(made.running)


def test_operators_journey(world: World, overrides: Make, tiny_data: dict[str, Path]) -> None:
    root = world.tool("privacy.ca_cli", "init", world.ca, "--organisation", "Consortium")["ca"]
    world.certify_on_paper("hub", "coordinator")
    world.certify_on_paper("eng", "engineer")
    (world.hub / "store").mkdir()
    world.publish_roster()
    enrol_port = free_port()
    hub = ["--keys", world.hub / "keys", "--certificates", world.hub / "certificates"]
    world.start("relay", "fl_server.cli", "control", world.hub / "store", *hub, "--port", str(free_port()),
                "--enrol-port", str(enrol_port), "--host", "localhost")
    until(lambda: b"control plane on" in (world.root / "relay.log").read_bytes())

    for name in SITES:  # each by a token that its CA handed over
        (world.root / name).mkdir()
        world.tool("privacy.ca_cli", "token", world.ca, "--name", name, "--organisation", f"Org {name}",
                   "--out", world.root / name / "token.txt")
        world.start(f"enroll-{name}", "fl_client.cli", "enroll", "--token-file", world.root / name / "token.txt",
                    "--ca-fingerprint", root, "--url", f"https://localhost:{enrol_port}", "--name", name,
                    "--organisation", f"Org {name}", "--folder", world.root / name / "keys", "--wait", "100")
    world.answer(len(SITES))
    for name in SITES:
        assert world.running.pop(f"enroll-{name}").wait(60) == 0, (world.root / f"enroll-{name}.log").read_text()
    relay = world.running.pop("relay")
    relay.terminate()
    assert relay.wait(15) == 0
    world.publish_roster()

    port, control_port = free_port(), free_port()
    files = {name: tiny_data[name if name != "site-d" else "site-a"] for name in SITES}
    sites = ",".join(f"{name}:{{n_decl:70}}" for name in SITES)
    common = overrides(f"data.sites={{{sites}}}", "privacy.rounds=60", "privacy.retries=3", f"server.port={port}",
                       f"server.keys={world.hub}/keys", f"server.certificates={world.hub}/certificates",
                       f"server.roster={world.hub}/roster.json", f"server.contract={world.root}/contract.json",
                       f"server.signature={world.root}/signature.json", f"server.store={world.hub}/store",
                       f"server.control_port={control_port}", "server.stage_deadline_s=30", "server.name=hub")
    world.tool("fl_server.cli", "contract", "create", "--out", world.root / "contract.json", *common)
    world.tool("fl_server.cli", "contract", "sign", world.root / "contract.json", "--keys", world.root / "eng" / "keys",
               "--certificates", world.root / "eng" / "certificates", "--out", world.root / "signature.json")

    own = {}
    for name in SITES:
        folder = world.root / name
        (folder / "policy.yaml").write_text(POLICY)
        own[name] = [*overrides(f"site.state={folder}/state"), f"site.name={name}", f"site.url=https://localhost:{port}",
                     f"site.data={files[name]}", f"site.keys={folder}/keys", f"site.certificates={folder}/keys",
                     f"site.contract={world.root}/contract.json", f"site.signature={world.root}/signature.json",
                     f"site.policy={folder}/policy.yaml", "site.threads=1",
                     f"site.control_url=https://localhost:{control_port}"]
    before = world.tool("fl_client.cli", "doctor", *own["site-a"], code=1)
    found = {c["name"]: c["code"] for c in before["checks"]}
    assert (found["contract"], found["route"]) == ("contract.not_approved", "link.unreachable")
    for name in SITES:
        assert world.tool("fl_client.cli", "approve", *own[name], "--approver", "A. Lee", "--yes")["approved"]
    world.start("hub", "fl_server.cli", "run", *common, "--json")
    for name in SITES:
        world.start(name, "fl_client.cli", "run", *own[name])

    journal = Path(next(o for o in common if o.startswith("server.out=")).split("=", 1)[1]) / "journal.jsonl"

    def rounds() -> list[dict[str, Any]]:
        lines = journal.read_text().splitlines() if journal.exists() else []
        assert world.running["hub"].poll() is None or lines, (world.root / "hub.log").read_text()
        return [e for e in map(json.loads, lines) if e["event"] == "done"]

    until(lambda: len(rounds()) >= 2)
    assert rounds()[0]["sites"] == list(SITES)
    world.tool("privacy.ca_cli", "revoke", world.ca, "--name", "site-d")
    world.publish_roster()
    last = len(rounds())
    until(lambda: len(rounds()) >= min(last + 4, 60))
    out = rounds()[-1]
    assert out["sites"] == ["site-a", "site-b", "site-c"], "the others go on"
    assert any(lost.startswith("site-d ") for lost in out["lost"])
    assert {lost.split()[2] for lost in out["lost"]} <= {"identity.revoked", "site.unreachable", "site.session_aborted"}

    stop({name: world.running.pop(name) for name in (*SITES, "hub")})
    url = f"https://localhost:{enrol_port}"
    world.start("relay", "fl_server.cli", "control", world.hub / "store", *hub, "--port", str(free_port()),
                "--enrol-port", str(enrol_port), "--host", "localhost")
    until(lambda: b"control plane on" in (world.root / "relay.log").read_bytes())
    keys = world.root / "site-a" / "keys"
    old = (keys / "tls.pem").read_bytes(), (keys / "tls.key").read_bytes(), (keys / "sign.key").read_bytes()
    world.start("renew", "fl_client.cli", "renew", "--url", url, "--folder", keys, "--wait", "60")
    world.answer(1)
    assert world.running.pop("renew").wait(60) == 0, (world.root / "renew.log").read_text()
    new = (keys / "tls.pem").read_bytes(), (keys / "tls.key").read_bytes(), (keys / "sign.key").read_bytes()
    assert [a == b for a, b in zip(old, new, strict=True)] == [False, False, True], "the ledger's key stays"
    world.start("renew", "fl_client.cli", "renew", "--url", url, "--folder", world.root / "site-d" / "keys", "--wait", "60")
    until(lambda: world.waiting() or world.running["renew"].poll() is not None)
    if world.waiting():
        refused = world.tool("privacy.ca_cli", "issue", world.ca, "--enrolment", world.waiting()[0], code=3)
        assert refused["error"]["code"] in ("ca.not_current", "identity.revoked"), refused
    else:  # its own list says so already
        assert world.running["renew"].returncode == 3
        assert "revoked" in (world.root / "renew.log").read_text()
