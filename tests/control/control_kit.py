"""What the tests of the control plane share: a consortium on disk, its coordinator's listeners, raw callers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from evidence_fixture import RUN, Consortium, contract, write_bundle

from fl_client.control import ControlClient
from fl_server.control import CONTROL, ENROL, ControlServer
from fl_server.control_store import ControlStore
from privacy import ca
from privacy.identity import FileSigner, Role, load_key
from privacy.statements import make

HOST = "localhost"
PEOPLE = {"engineer": Role.ENGINEER, "auditor": Role.AUDITOR, "outsider": Role.SITE, "gone": Role.SITE}


@dataclass
class World:
    """A consortium (sites clinic-a .. clinic-d, coordinator hub, `PEOPLE`; gone is revoked), and a finished run."""

    parties: Consortium
    root: Path
    contract: Any
    adapter: dict[str, Any]

    @property
    def ca(self) -> Path:
        return self.parties.folder / "ca"

    def keys(self, name: str) -> Path:
        return self.parties.folder / "keys" / name

    def issued(self, name: str) -> Path:
        return self.ca / "issued" / name

    def folder(self, name: str, where: Path) -> Path:
        """A copy of what an operator has, keys and certificates in one folder."""
        shutil.copytree(self.keys(name), where)
        shutil.copytree(self.issued(name), where, dirs_exist_ok=True)
        return where

    def trust(self, where: Path) -> Path:
        """A copy of the CA's present trust folder."""
        where.mkdir()
        for pem in self.ca.glob("*.pem"):
            shutil.copy(pem, where)
        return where

    def channel(self, port: int | None, name: str | None) -> grpc.Channel:
        """As that person, or without a certificate; without any of our client's checks and limits."""
        ours = (self.keys(name) / "tls.key", self.issued(name) / "tls.pem") if name else ()
        files = [path.read_bytes() for path in (self.issued("hub") / "tls.pem", *ours)]
        return grpc.secure_channel(f"{HOST}:{port}", grpc.ssl_channel_credentials(*files),
                                   [("grpc.enable_http_proxy", 0)])

    def store(self, where: Path) -> ControlStore:
        """Everything that a coordinator serves after the run."""
        store = ControlStore(where)
        (where / "roster.json").write_bytes(ca.roster(self.ca))
        store.publish_contract(self.contract.digest, self.contract.to_bytes(), b"signed by the engineer")
        store.publish_run(RUN, self.root / "run")
        return store


def make_world(root: Path) -> World:
    import numpy as np
    from safetensors.numpy import save_file

    from strategies.adapter import adapter_digest

    parties = Consortium(root / "consortium")
    for name, role in PEOPLE.items():
        parties.enrol(name, role)
    ca.revoke(parties.folder / "ca", "gone")
    parties.signers = {k: v for k, v in parties.signers.items() if k not in PEOPLE}
    rng = np.random.default_rng(1)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (
        ("base.lora_A.weight", (2, 70_000)), ("base.lora_B.weight", (3, 2)), ("head.weight", (3, 4)), ("head.bias", (3,)))}
    digest = adapter_digest(tensors)

    def edit(kind: str, predicate: dict[str, Any]) -> dict[str, Any]:
        if kind == "round" and predicate["round"] == 3:
            predicate["adapter_out"] = digest
        if kind == "release" or (kind == "evaluation" and predicate["round"] == 3):
            predicate["adapter"] = digest
        return predicate

    agreed = contract(parties.signers)
    (root / "run" / "adapter").mkdir(parents=True)
    write_bundle(root / "run" / "evidence", parties, agreed, edit=edit)
    save_file({k: v for k, v in tensors.items() if "lora" in k}, root / "run/adapter/adapter_model.safetensors")
    save_file({k.removeprefix("head."): v for k, v in tensors.items() if "head" in k}, root / "run/adapter/head.safetensors")
    (root / "run/adapter/adapter_config.json").write_text("{}")
    (root / "run/adapter/README.md").write_text("card")
    return World(parties, root, agreed, tensors)


@dataclass
class Running:
    """A coordinator's listeners, and ways to call them."""

    world: World
    server: ControlServer
    store: ControlStore
    trust: Path
    root: Path

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.server.port}"

    @property
    def enrol_url(self) -> str:
        return f"https://{HOST}:{self.server.enrol_port}"

    def client(self, name: str, **kwargs: Any) -> ControlClient:
        folder = self.root / f"at-{name}"
        if not folder.exists():
            self.world.folder(name, folder)
        return ControlClient(self.url, folder, folder, **kwargs)

    @contextmanager
    def channel(self, name: str | None, *, enrol: bool = False) -> Iterator[grpc.Channel]:
        """Without any of our client's checks."""
        with self.world.channel(self.server.enrol_port if enrol else self.server.port, name) as channel:
            yield channel

    def raw(self, name: str | None, method: str, body: bytes = b"", *, enrol: bool = False) -> tuple[str, str]:
        """(status, details) of a call with these very bytes."""
        with self.channel(name, enrol=enrol) as channel:
            return status_of(lambda: list(channel.unary_stream(method)(body, timeout=20)))


def status_of(call: Any) -> tuple[str, str]:
    try:
        call()
    except grpc.RpcError as e:
        return e.code().name, str(e.details())
    return "OK", ""


@contextmanager
def running(world: World, root: Path, **changes: Any) -> Iterator[Running]:
    """changes: arguments of ControlServer; `control` and `enrol` change fields of its limits."""
    store, trust = world.store(root / "store"), world.trust(root / "trust")
    settings: dict[str, Any] = {
        "certificate": world.issued("hub") / "tls.pem", "key": world.keys("hub") / "tls.key", "trust": trust,
        "enrol_port": 0, "limits": replace(CONTROL, **{"grace_s": 0.2, **changes.pop("control", {})}),
        "enrol_limits": replace(ENROL, **{"grace_s": 0.2, **changes.pop("enrol", {})})}
    with ControlServer(store, **{**settings, **changes}) as server:
        yield Running(world, server, store, trust, root)


def secrets_of(folder: Path) -> list[bytes]:
    """What must be found nowhere else, of every key below a folder: in PEM the line that holds the secret, raw and hex."""
    found = []
    for path in folder.rglob("*.key"):
        key = load_key(path)
        raw = (key.private_numbers().private_value.to_bytes(32, "big") if isinstance(key, EllipticCurvePrivateKey)
               else key.private_bytes_raw())
        found += [path.read_bytes().splitlines()[1], raw, raw.hex().encode()]
    return found


def approval(signer: FileSigner, digest: str) -> bytes:
    return make(signer, "urn:consilo:approval:1", [("contract.json", digest)], {"site": "clinic-a"})
