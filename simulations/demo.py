"""`fl-simulate demo`: the main job on real processes. Four hospitals and a coordinator, mutual TLS on loopback.

Everything an institution would do by hand is done here by the same code: keys on site, certificates from the
consortium's CA, a contract, each site's policy; then five processes (and four trainers) until the adapter is released.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from conf import load_settings
from conf.settings import Settings, SiteSettings
from fl_client.agent import Papers
from fl_client.approval import approve
from fl_server.contracting import make_contract
from privacy import ca
from privacy.canonical import parse
from privacy.errors import CheckFailed, ConsiloError, Refused
from privacy.files import FileLayer, read_file
from privacy.identity import FileSigner, Role, create_request
from privacy.signing import sign_contract
from privacy.trust import TrustStore
from simulations.fetch import fetch
from simulations.hpo import prepare as prepare_hpo
from simulations.hpo import prepare_chat
from simulations.local import declare_sites
from simulations.mail import prepare as prepare_mail
from simulations.smollm2 import convert

MARK, ENGINEER = ".consilo-demo", "engineer"
POLICY = """# What this hospital agrees to at most. Only the hospital changes it.
approver: data protection officer of {name}
max_epsilon: {epsilon}
max_delta: 1.0e-05
min_sigma: 0.5
min_cohort: 3
colluding: 1
allow_non_private: {non_private}
reveal_update: {reveal}
"""
# data.name -> the package that holds it, and what makes the sites' files of it in the package's cache folder
EMBEDDED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "hpo-lay-phrases": ("hpo", lambda folder: prepare_hpo(folder / "hp.obo", folder)),
    "hpo-instructions": ("hpo", lambda folder: prepare_chat(folder / "hp.obo", folder)),
    "spamassassin-mail": ("email", prepare_mail),
}
# folder of the cache -> what makes a model folder of the package's files there
MODELS: dict[str, Callable[[Path], object]] = {"minilm": lambda folder: None, "smollm2": convert}
Say = Callable[[str], None]


def demo(out: Path, overrides: Sequence[str], say: Say) -> None:
    """Fill `out`. The last lines said: accuracy, epsilon per site, report, the verify command.

    Raises what the coordinator or a site failed with.
    """
    start = time.monotonic()
    settings = load_settings(overrides)
    embedded(settings)
    say(f"[{time.monotonic() - start:5.1f} s] model and data are in the cache")
    empty(out)
    port = free_port()
    overrides = [*overrides, f"server.log={out}/log"]
    settings = declare_sites(load_settings([*overrides, f"server.port={port}", f"server.out={out}"]))
    consortium(out, settings)
    approve_all(out, settings)
    say(f"[{time.monotonic() - start:5.1f} s] certificates issued; contract signed, and approved by "
        f"{len(settings.data.sites)} sites")
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands(out, overrides, settings, port).items():
            log = (out / "sites" / name / "agent.log").open("wb") if name != settings.server.name else None
            processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _wait(processes, settings.server.name, out)
    finally:
        stop(processes)
    _say_result(out, settings, say, time.monotonic() - start)


def embedded(settings: Settings) -> None:
    """Fetch what the configuration takes from the cache; a user's own files are left alone."""
    model = Path(settings.model.path)
    if model.name in MODELS and not (model / "model.safetensors").is_file():
        MODELS[model.name](fetch(model.name))
    if settings.data.name in EMBEDDED:
        package, prepare = EMBEDDED[settings.data.name]
        prepare(fetch(package))


def empty(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
        raise Refused("demo.folder", "The output folder holds something that no demo wrote.", "Give another --out.")
    shutil.rmtree(out, ignore_errors=True)
    (out / "sites").mkdir(parents=True)
    (out / MARK).touch()


def consortium(out: Path, settings: Settings) -> None:
    """CA, identities, roster, contract, policies: what comes before the first process."""
    (out / "ca.sha256").write_text(ca.init(out / "ca", "Demo consortium", days=30) + "\n")
    coordinator = settings.server.name
    roles = dict.fromkeys(settings.data.sites, Role.SITE) | {coordinator: Role.COORDINATOR, ENGINEER: Role.ENGINEER}
    for name, role in roles.items():
        own = out / "sites" / name if role is Role.SITE else out / name
        request = create_request(own / "keys", name, f"Organisation of {name}")
        issued = ca.issue(out / "ca", request, role, days=30, hosts=["localhost"] if role is Role.COORDINATOR else [])
        shutil.copytree(issued.folder, own / "certificates")
        if role is Role.SITE:
            p = settings.privacy
            (own / "policy.yaml").write_text(POLICY.format(
                name=name, epsilon=p.epsilon or 8.0, non_private=str(p.epsilon is None).lower(),
                reveal=str(not settings.secure_aggregation.enabled).lower()))
    FileLayer().write_atomic(out / "roster.json", ca.roster(out / "ca"))
    roster = ca.verify_roster(read_file(out / "roster.json"), TrustStore.load(out / "ca"))
    contract = make_contract(settings, {e.name: e.sign_fingerprint for e in roster})
    FileLayer().write_atomic(out / "contract.json", contract.to_bytes())
    engineer = FileSigner(out / ENGINEER / "keys" / "sign.key", out / ENGINEER / "certificates" / "sign.pem")
    FileLayer().write_atomic(out / "contract.signature.json", sign_contract(contract, engineer))


def approve_all(out: Path, settings: Settings) -> None:
    """What each hospital does with `fl-client approve`."""
    for name in settings.data.sites:
        own = out / "sites" / name
        papers = Papers.load(SiteSettings(name=name, keys=f"{own}/keys", certificates=f"{own}/certificates",
                                          contract=f"{out}/contract.json", signature=f"{out}/contract.signature.json",
                                          policy=f"{own}/policy.yaml", state=f"{own}/state"))
        approve(papers.contract, name, papers.policy, papers.signer, own / "state", approver=papers.policy.approver,
                signature=read_file(out / "contract.signature.json"))


def commands(out: Path, overrides: Sequence[str], settings: Settings, port: int) -> dict[str, list[str]]:
    """One command line per process; `-P` keeps the current folder off the import path."""
    python, coordinator = [sys.executable, "-P", "-m"], out / settings.server.name
    lines = {settings.server.name: [
        *python, "fl_server.cli", "run", *overrides, f"server.port={port}", f"server.out={out}",
        f"server.keys={coordinator}/keys", f"server.certificates={coordinator}/certificates",
        f"server.roster={out}/roster.json", f"server.contract={out}/contract.json",
        f"server.signature={out}/contract.signature.json"]}
    for name, site in settings.data.sites.items():
        own = out / "sites" / name
        lines[name] = [
            *python, "fl_client.cli", "run", *overrides, f"site.name={name}", f"site.url=https://localhost:{port}",
            f"site.data={site.file}", f"site.text={settings.data.text}", f"site.label={settings.data.label}",
            f"site.person={settings.data.person or 'null'}", f"site.keys={own}/keys",
            f"site.certificates={own}/certificates",
            f"site.contract={out}/contract.json", f"site.signature={out}/contract.signature.json",
            f"site.policy={own}/policy.yaml", f"site.state={own}/state",
            "site.threads=1"]
    return lines


def _wait(processes: dict[str, subprocess.Popen[bytes]], coordinator: str, out: Path) -> None:
    """Until the coordinator ends. A site that ends before it fails the demo with the reason from its log."""
    while processes[coordinator].poll() is None:
        for name, process in processes.items():
            if name != coordinator and process.poll() is not None:
                lines = (out / "sites" / name / "agent.log").read_text(errors="replace").splitlines()
                raise CheckFailed("demo.site_ended", f"{name} ended: {lines[-1] if lines else 'no output'}",
                                  f"See {out}/sites/{name}/agent.log.")
        time.sleep(0.1)
    if code := processes[coordinator].returncode:
        error = ConsiloError("demo.coordinator_ended", f"The coordinator ended with exit code {code}.",
                             "Its last line above says why.")
        error.exit_code = code
        raise error


def stop(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    for process in processes.values():
        if process.poll() is None:
            process.terminate()
    for process in processes.values():
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _say_result(out: Path, settings: Settings, say: Say, seconds: float) -> None:
    metrics = parse(read_file(out / "metrics.json"))
    root = (out / "ca.sha256").read_text().strip()
    spent = ", ".join(f"{name} {e:.4f}" for name, e in sorted(metrics["epsilon"].items()))
    say(f"done in {seconds:.1f} s: {metrics['rounds']} rounds, {metrics['void']} void attempts")
    for name in (key.removesuffix("_before") for key in metrics if key.endswith("_before")):
        say(f"{name} {metrics[f'{name}_before']:.4f} -> {metrics[f'{name}_after']:.4f} on {metrics['units']} public "
            "records that no site trains on")
    say(f"epsilon spent of {settings.privacy.epsilon}: {spent}" if spent else "NON-PRIVATE: no noise, no epsilon")
    say(f"report: {out}/report.html")
    say(f"verify: {Path(sys.executable).parent}/fl-privacy verify {out}/evidence --ca {root}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
