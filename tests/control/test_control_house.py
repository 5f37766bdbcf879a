"""Stubs are those of the proto; the base install needs no grpc; the documents say what the code does; the process ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from control_kit import World

from fl_server.control import CONTROL, ENROL
from fl_server.control_admission import OPEN, ROLES
from fl_server.control_enrol import MAX_WAITING
from fl_server.control_guard import PER_PEER
from privacy import control
from privacy.control.reasons import REASONS

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "control-plane.md"


def test_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    proto = "privacy/control/consilo_control.proto"
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *out, proto], cwd=ROOT, check=True, timeout=60)
    made = sorted((tmp_path / "privacy" / "control").iterdir())
    assert len(made) == 3
    for stub in made:
        assert stub.read_bytes() == (ROOT / "privacy" / "control" / stub.name).read_bytes(), "run make proto"


def test_verifier_and_ca_need_no_grpc() -> None:
    script = ("import sys\n"
              "class Missing:\n"
              "    def find_spec(self, name, path=None, target=None):\n"
              "        if name.split('.')[0] in ('grpc', 'google', 'flwr', 'torch', 'grpc_health', 'grpc_reflection'):\n"
              "            raise ModuleNotFoundError(name)\n"
              "sys.meta_path.insert(0, Missing())\n"
              "import privacy.cli, privacy.ca_cli, privacy.verify, privacy.enrol, privacy.control.reasons\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_document_has_every_method_with_its_roles() -> None:
    rows = dict(re.findall(r"^\| `([\w./]+)` \| ([^|]*) \|", DOCUMENT.read_text(), re.M))
    want = {method.removeprefix("/consilo.control.v1.").removeprefix("/"): ", ".join(roles)
            for method, roles in ROLES.items()}
    want |= {method.removeprefix("/consilo.control.v1."): "anyone" for method in OPEN if "consilo" in method}
    assert {name: said.strip() for name, said in rows.items()} == want


def test_document_has_the_limits() -> None:
    text = DOCUMENT.read_text()
    for limit in (f"{CONTROL.calls} calls, {ENROL.calls} on the enrolment port", f"{PER_PEER} of one peer",
                  f"{control.UNARY_S:.0f} s; transfers {control.STREAM_S:.0f} s", f"{CONTROL.connections} connections",
                  f"{control.MAX_APPROVAL_BYTES // 1024} KiB", f"{control.MAX_ENROLMENT_BYTES // 1024} KiB",
                  f"{MAX_WAITING} requests", f"{CONTROL.handshake_s:.0f} s for a handshake"):
        assert limit in text, limit


def test_every_reason_is_documented() -> None:
    listed = DOCUMENT.read_text().partition("A refusal is")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z]+\.[a-z_]+)`", listed)) == set(REASONS)


def test_process_serves_until_it_is_told_to_stop(world: World, tmp_path: Path) -> None:
    folder = world.folder("hub", tmp_path / "hub")
    process = subprocess.Popen([sys.executable, "-m", "fl_server.cli", "control", tmp_path / "store", "--keys", folder,
                                "--certificates", folder, "--port", "0", "--enrol-port", "0", "--json"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stdout is not None
        ports = re.fullmatch(r'\{"enrol_port": (\d+), "port": (\d+)\}\n', process.stdout.readline())
        assert ports
        channel = world.channel(int(ports[2]), "engineer")
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=20) == b"\x08\x01"
        channel.close()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.wait(10)
