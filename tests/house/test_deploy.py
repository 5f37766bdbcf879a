"""Deployment files and guide keep up with the code: their commands, options and settings are parsed by the code itself."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

import fl_client.cli
import fl_server.cli
import privacy.ca_cli
import privacy.cli
from conf import load_settings
from conf.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY, GUIDE = ROOT / "deploy", ROOT / "docs" / "deployment.md"
APPS = {"fl-client": fl_client.cli.app, "fl-server": fl_server.cli.app, "fl-ca": privacy.ca_cli.app,
        "fl-privacy": privacy.cli.app}
MODULES = {"fl_client.cli": "fl-client", "fl_server.cli": "fl-server", "privacy.ca_cli": "fl-ca"}
UNITS = sorted((DEPLOY / "systemd").rglob("*.service"))
SITE_UNITS = [u for u in UNITS if u.name == "consilo-site.service"]
DOCKERFILES = sorted((DEPLOY / "docker").iterdir())
MANIFESTS = [d for f in sorted((DEPLOY / "kubernetes").glob("*.yaml")) for d in yaml.safe_load_all(f.read_text())]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def parse(words: list[str]) -> tuple[str, list[str]]:
    """(command, its overrides), parsed as the tool would but not run. Raises click.ClickException as the tool would."""
    name, command, words = words[0], typer.main.get_command(APPS[words[0]]), words[1:]
    while isinstance(command, click.Group):
        if words[0] not in command.commands:
            raise click.UsageError(f"{name} has no command {words[0]}")
        name, command, words = f"{name} {words[0]}", command.commands[words[0]], words[1:]
    return name, list(command.make_context(name, words).params.get("overrides") or [])


def settings_of(overrides: list[str], side: str) -> Settings:
    """The settings that the code makes of a file's overrides, each of them for this side."""
    assert {o.split(".")[0].split("=")[0] for o in overrides} >= {"model", side}
    return load_settings(overrides)


def environment(name: str) -> dict[str, str]:
    words = shlex.split((DEPLOY / "systemd" / name).read_text(), comments=True)
    return dict(word.split("=", 1) for word in words)


def guide_commands() -> Iterator[list[str]]:
    for block in re.findall(r"^```sh \w+\n(.*?)^```", GUIDE.read_text(), re.M | re.S):
        yield from map(shlex.split, block.replace("\\\n", " ").splitlines())


def containers() -> Iterator[tuple[str, list[str]]]:
    """(tool, arguments) of every container of compose and Kubernetes."""
    for service in COMPOSE.values():
        yield tool_of(service["image"]), service["command"]
    for pod in pods():
        for container in pod["containers"]:
            yield tool_of(container["image"]), container["args"]


def tool_of(image: str) -> str:
    return {"consilo-site": "fl-client", "consilo-coordinator": "fl-server"}[image.split(":")[0]]


def pods() -> list[dict[str, Any]]:
    return [d["spec"]["template"]["spec"] for d in MANIFESTS if d["kind"] in ("Deployment", "StatefulSet", "Job")]


def options(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.M):
        found.setdefault(key, []).append(value)
    return found


def test_guides_commands_exist_with_their_options() -> None:
    commands = [words for words in guide_commands() if words[0].startswith("fl-")]
    assert len(commands) > 15
    for words in commands:
        parse(words)


@pytest.mark.parametrize("line", ["fl-ca init ca", "fl-ca roster ca --to r", "fl-client enrol", "fl-server run --force"])
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(click.ClickException):
        parse(line.split())


def test_files_that_the_guide_names_exist() -> None:
    text = GUIDE.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (GUIDE.parent / link).is_file(), link
    for path in re.findall(r"\bdeploy/[\w./-]+\w", text):
        assert (ROOT / path).is_file(), path
    shipped = {f.relative_to(DEPLOY).as_posix() for f in DEPLOY.rglob("*") if f.is_file()}
    named = set(re.findall(r"deploy/([\w./-]+\w)", text))
    assert shipped == named, "every file has its place in the guide"


def test_examples_are_settings_that_the_code_accepts() -> None:
    site = settings_of(environment("site.env")["CONSILO_SITE"].split(), "site").site
    hub = settings_of(environment("coordinator.env")["CONSILO_COORDINATOR"].split(), "server")
    assert site.name in hub.data.sites
    assert site.url.endswith(f":{hub.server.port}")
    assert site.control_url == f"https://coordinator.example:{hub.server.control_port}"
    assert (site.contract, site.signature) == (hub.server.contract, hub.server.signature)
    assert hub.secure_aggregation.enabled


def test_containers_commands_and_settings_exist() -> None:
    found = [(tool, *parse([tool, *arguments])) for tool, arguments in containers()]
    assert sorted(name for _, name, _ in found) == 2 * ["fl-client run"] + 2 * ["fl-server control"] + 2 * ["fl-server run"]
    for tool, name, overrides in found:
        if name.endswith(" run"):
            made = settings_of(overrides, "site" if tool == "fl-client" else "server")
            assert tool == "fl-client" or made.server.host == "0.0.0.0"  # noqa: S104 - in a container


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.relative_to(DEPLOY / "systemd").as_posix())
def test_units_commands_exist_and_restart_only_what_can_get_better(unit: Path) -> None:
    found = options(unit)
    (line,) = found["ExecStart"]
    words = line.removeprefix("/opt/consilo/bin/").split()
    parse(words)
    for variable in re.findall(r"\$(\w+)", line):
        assert variable in environment("site.env") | environment("coordinator.env")
    assert found["Restart"] == ["on-failure"]
    assert {"2", "3"} <= set(found["RestartPreventExitStatus"][0].split())


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.relative_to(DEPLOY / "systemd").as_posix())
def test_systemd_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze isn't installed here")
    copy = tmp_path / unit.name  # the same, but for a program that exists here
    copy.write_text(re.sub(r"/opt/consilo/bin/fl-\w+", sys.executable, unit.read_text()))
    mode = "--user" if unit.parent.name == "user" else "--system"
    done = subprocess.run([analyze, "verify", mode, "--man=no", copy], capture_output=True, text=True, timeout=60,
                          check=False, env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)})
    if "Failed to initialize manager" in done.stderr:
        pytest.skip("systemd-analyze can't work here")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.relative_to(DEPLOY / "systemd").as_posix())
def test_units_are_hardened(unit: Path) -> None:
    found = {key: values[-1] for key, values in options(unit).items()}
    assert found["NoNewPrivileges"] == "yes"
    assert found["UMask"] == "0077"
    assert found["LimitCORE"] == "0"
    assert {"MemoryMax", "TasksMax", "RestrictAddressFamilies", "SystemCallFilter"} <= set(found)
    if unit.parent.name != "user":  # a user's own systemd can't take these away
        assert found["User"] == "consilo"
        assert found["ProtectSystem"] == "strict"
        assert found["ReadWritePaths"] == "/var/lib/consilo"
        assert (found["PrivateTmp"], found["ProtectHome"], found["CapabilityBoundingSet"]) == ("yes", "yes", "")


@pytest.mark.parametrize("unit", SITE_UNITS, ids=lambda u: u.parent.name)
def test_site_units_leave_the_trainer_what_its_walls_need(unit: Path) -> None:
    found = options(unit)
    assert set(found["RestrictNamespaces"][0].split()) == {"user", "net"}
    allowed = set(" ".join(found["SystemCallFilter"]).split())
    assert {"seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"} <= allowed
    assert not {"MemoryDenyWriteExecute", "ProcSubset", "PrivateNetwork", "ProtectClock"} & set(found)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.suffix)
def test_dockerfiles_are_plain(file: Path) -> None:
    text = file.read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {name for name, _ in steps} <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "STOPSIGNAL",
                                           "ENTRYPOINT", "CMD", "EXPOSE", "HEALTHCHECK"}, "no ADD: it fetches"
    images = [value for name, value in steps if name == "FROM"]
    assert len(images) == 2 and all(i.split()[0] == "${PYTHON_IMAGE}" for i in images)
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+[\w.-]*-slim-\w+$", text, re.M), "a version, never latest"
    assert not re.search(r"latest|curl|wget|sudo|(?i:secret|password|token|private)", text)
    assert [value for name, value in steps if name == "USER"] == ["10001:10001"]
    installs = re.findall(r"pip install (.*?) (?:&&|$)", text, re.M)
    assert all("--no-deps" in line for line in installs), "what isn't in the lock isn't installed"
    assert ["--require-hashes" in line for line in installs] == [True, True, False]
    copied = [word for name, value in steps if name == "COPY" and "--from" not in value for word in value.split()[:-1]]
    copied = [word.replace("${TORCH_LOCK}", "torch-cpu.lock") for word in copied]
    assert all((ROOT / word).exists() for word in copied)
    assert {"conf", "fl_client", "fl_server", "privacy", "simulations", "strategies", "requirements.lock",
            "torch-cpu.lock"} <= set(copied)
    assert any(name == "HEALTHCHECK" for name, _ in steps) == (file.suffix == ".coordinator")


def test_compose_containers_have_no_rights() -> None:
    for service in COMPOSE.values():
        assert service["user"] == "10001:10001" and service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert COMPOSE["control"]["profiles"] != COMPOSE["coordinator"]["profiles"], "one server a store"


def test_pods_have_no_rights() -> None:
    assert len(pods()) == 3
    for pod in pods():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch", "else key.permissions at the second start"
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                                    "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["limits"]["memory"]
            assert {m["mountPath"] for m in container["volumeMounts"]} == {"/var/lib/consilo", "/tmp"}  # noqa: S108
            probes = [v for k, v in container.items() if k.endswith("Probe")]
            assert all(p["tcpSocket"]["port"] in {c["name"] for c in container["ports"]} for p in probes), "grpc: no TLS"


def test_services_and_policies_select_what_exists() -> None:
    kinds = {kind: [d for d in MANIFESTS if d["kind"] == kind] for kind in ("Service", "NetworkPolicy")}
    templates = [d["spec"]["template"] for d in MANIFESTS if "template" in d["spec"]]
    for service in kinds["Service"]:
        selector = service["spec"]["selector"].items()
        chosen = [t for t in templates if selector <= t["metadata"]["labels"].items()]
        assert chosen, service["metadata"]["name"]
        for port in service["spec"].get("ports", ()):
            assert port["port"] == 443
            open_ports = [{p["name"] for c in t["spec"]["containers"] for p in c["ports"]} for t in chosen]
            assert all(port["targetPort"] in names for names in open_ports)
    for policy in kinds["NetworkPolicy"]:
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        labels = policy["spec"]["podSelector"]["matchLabels"].items()
        assert any(labels <= t["metadata"]["labels"].items() for t in templates)
    out = [p for policy in kinds["NetworkPolicy"] for rule in policy["spec"]["egress"] for p in rule["ports"]]
    assert out == [{"port": 443, "protocol": "TCP"}], "a site reaches 443 and nothing else; the coordinator nothing"
