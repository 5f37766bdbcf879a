"""Real processes over mutual TLS on loopback: the demo itself on tiny files, and a site that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conf import load_settings
from privacy.verify import verify_bundle
from simulations import demo
from simulations.local import declare_sites

Make = Callable[..., list[str]]
ENVIRONMENT = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}


def tool(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-m", module, *arguments], capture_output=True, text=True,
                          timeout=240, env=ENVIRONMENT)


def children() -> set[int]:
    import psutil

    return {p.pid for p in psutil.Process().children(recursive=True)}


def _secret_part(key: bytes) -> bytes:
    """Bytes that only the private value holds: of a PEM inside one line, of P-256 or Ed25519; of a raw key all."""
    if not key.startswith(b"-----BEGIN"):
        return key
    body = b"".join(key.splitlines()[1:-1])
    return body[66:88] if len(body) > 64 else body[24:60]


def test_demo_on_real_processes(overrides: Make, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    before = children()
    done = tool("simulations.cli", "demo", *[o for o in overrides() if not o.startswith("server.out")], "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    assert children() == before
    assert len((done.stdout + done.stderr).splitlines()) <= 25
    accuracy, epsilon, report, verify = done.stdout.splitlines()[-4:]
    assert accuracy.startswith("accuracy 0.")
    assert epsilon.startswith("epsilon spent of 8.0: site-a ")
    assert report == f"report: {out}/report.html"
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/head.safetensors",
                 "adapter/README.md", "metrics.json", "evidence/manifest.json", "report.html", "report.json"):
        assert (out / name).is_file(), name
    root = (out / "ca.sha256").read_text().strip()
    assert verify.endswith(f"fl-privacy verify {out}/evidence --ca {root}")
    passed = tool("privacy.cli", "verify", str(out / "evidence"), "--ca", root, "--json")
    assert passed.returncode == 0
    own = out / "sites" / "site-a"
    exported = tool("fl_client.cli", "evidence", "export", "--out", str(tmp_path / "own"), "site.name=site-a",
                    f"site.keys={own}/keys", f"site.certificates={own}/certificates", f"site.state={own}/state")
    assert exported.returncode == 0, exported.stderr
    assert verify_bundle(tmp_path / "own", root).verdict == "PASS"
    assert json.loads(passed.stdout.splitlines()[-1])["verdict"] == "PASS"
    for ca in (["--ca", "0" * 64], []):
        assert tool("privacy.cli", "verify", str(out / "evidence"), *ca).returncode == 1
    status = json.loads(tool("fl_server.cli", "status", str(out), "--json").stdout.splitlines()[-1])
    assert (status["state"], status["rounds_done"]) == ("done", 2)
    assert [(r["outcome"], len(r["sites"]), r["lost"]) for r in status["rounds"]] == [("done", 3, [])] * 2
    everything = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    for key in out.rglob("*.key"):
        assert key.stat().st_mode & 0o077 == 0, key
        secret = _secret_part(key.read_bytes())
        assert [f for f, data in everything.items() if secret in data] == [key], "a private key is nowhere else"


def test_a_killed_site_voids_its_rounds_and_the_run_ends_with_code_5(overrides: Make, tmp_path: Path) -> None:
    out, port = tmp_path / "out", demo.free_port()
    more = overrides("privacy.rounds=50", "privacy.retries=1", f"server.out={out}", "server.deadline_s=6",
                     "server.stage_deadline_s=6", f"server.port={port}")
    settings = declare_sites(load_settings(more))
    demo.empty(out)
    demo.consortium(out, settings)
    demo.approve_all(out, settings)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in demo.commands(out, more, settings, port).items():
            with (tmp_path / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        journal, end = out / "journal.jsonl", time.monotonic() + 120
        while not (journal.exists() and '"event":"done"' in journal.read_text()):
            assert time.monotonic() < end and processes["coordinator"].poll() is None
            time.sleep(0.1)
        processes["site-b"].kill()
        assert processes["coordinator"].wait(120) == 5
        start = time.monotonic()
        for name in ("site-a", "site-c"):
            processes[name].terminate()
            assert processes[name].wait(15) == 0, (tmp_path / f"{name}.log").read_text()
        assert time.monotonic() - start < 15
    finally:
        demo.stop(processes)
    status = json.loads(tool("fl_server.cli", "status", str(out), "--json").stdout.splitlines()[-1])
    assert status["rounds_done"] >= 1
    void = [r for r in status["rounds"] if r["outcome"] == "void"]
    assert void and {lost.split()[0] for r in void for lost in r["lost"]} == {"site-b"}
    root = (out / "ca.sha256").read_text().strip()
    verdict = verify_bundle(out / "evidence", root)
    assert verdict.verdict == "PASS", verdict.as_dict()
    said = {step.name: step.detail for step in verdict.steps}
    assert "WITHOUT A LEDGER, which never came: site-b" in said["ledgers"] and "only 2 sites signed" in said["witnesses"]


@pytest.mark.parametrize(("change", "code"), [
    ("site.policy=/nonexistent.yaml", 2), ("site.contract=/nonexistent.json", 2), ("site.nmae=x", 2)])
def test_a_site_that_cannot_start_says_why_in_one_line(overrides: Make, change: str, code: int) -> None:
    done = tool("fl_client.cli", "run", *overrides(change))
    assert done.returncode == code
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Mend: " in done.stderr


@pytest.mark.parametrize("module", ["fl_server.cli", "fl_client.cli", "privacy.cli", "privacy.ca_cli", "simulations.cli"])
def test_help_imports_no_torch(module: str) -> None:
    check = ("import sys, runpy; sys.argv = ['x', '--help']\n"
             f"try: runpy.run_module('{module}', run_name='__main__')\n"
             "except SystemExit: pass\n"
             "print(sorted({'torch', 'flwr', 'hydra', 'transformers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
