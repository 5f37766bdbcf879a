"""What both roads, real processes and simulation, build around a `Run`: certificates, bundle, model, public split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate

from conf.settings import Settings
from fl_server.attempt import Deadlines
from fl_server.evaluation import PublicSplit
from fl_server.exchange import Exchange
from fl_server.log import TransparencyLog
from fl_server.run import Progress, Run
from privacy.bundle import BundleWriter
from privacy.ca import RosterEntry
from privacy.contract import Contract
from privacy.errors import Refused
from privacy.files import FileLayer, read_file
from privacy.identity import Role, Signer
from privacy.secagg.peers import certificate_check
from privacy.signing import check_signature, envelope
from privacy.trust import TrustStore
from privacy.trust_files import WatchedTrust
from strategies.model import build


def begun(folder: Path) -> bool:
    """Whether a coordinator has begun a run there, however early it was killed."""
    return any((folder / name).exists() for name in ("journal.jsonl", "evidence"))


def check_folder(folder: Path) -> None:
    """Before anything slow: a run's folder is its own. Raises Refused `run.exists`."""
    if begun(folder):
        raise Refused("run.exists", "The output folder holds a run already.",
                      "Set server.out to a new folder; another run needs a contract of its own.")


def site_certificates(contract: Contract, roster: Mapping[str, RosterEntry]) -> dict[str, Certificate]:
    """Each site's Ed25519 certificate. Raises Refused `contract.certificate` where roster and contract differ."""
    out = {}
    for site in contract.sites:
        entry = roster.get(site.name)
        if entry is None or entry.role is not Role.SITE or entry.sign_fingerprint != site.signer:
            raise Refused("contract.certificate", f"Roster and contract name different certificates for {site.name}.",
                          "Make a new roster, and a new contract from it.")
        out[site.name] = entry.sign
    return out


def make_run(settings: Settings, contract: Contract, exchange: Exchange, *, signer: Signer, trust: Path, signature: bytes,
             certificates: Mapping[str, Certificate], progress: Progress) -> Run:
    """trust: the folder with root.pem and issuing-<role>.pem. signature: the engineer's, on the contract. Writes under
    settings.server.out. Raises as `check_signature` does."""
    engineer = check_signature(signature, contract, TrustStore.load(trust))
    server, folder = settings.server, Path(settings.server.out)
    folder.mkdir(parents=True, exist_ok=True)
    FileLayer().write_atomic(folder / "contract.json", contract.to_bytes())
    pems = {name: c.public_bytes(Encoding.PEM) for name, c in certificates.items()}
    pems[server.name] = signer.certificate.public_bytes(Encoding.PEM)
    if len({*pems, engineer.name}) != len(pems) + 1:
        raise Refused("contract.certificate", "The engineer has the name of a site or of the coordinator.",
                      "Have the CA issue certificates under names of their own.")
    pems[engineer.name] = engineer.certificate.public_bytes(Encoding.PEM)
    roles = (Role.SITE, Role.COORDINATOR, Role.ENGINEER)
    issuing = {str(role): read_file(trust / f"issuing-{role}.pem") for role in roles}
    bundle = BundleWriter(folder / "evidence", contract.run, contract.to_bytes(), read_file(trust / "root.pem"),
                          issuing, pems)
    model = build(Path(settings.model.path), contract)
    split = PublicSplit(model, contract, settings.data.evaluation)
    return Run(contract, model, settings.model.name, split, exchange, name=server.name, signer=signer, bundle=bundle,
               log=TransparencyLog(Path(server.log), server.name, signer), signed=(engineer.name, envelope(signature)),
               folder=folder, deadlines=Deadlines(server.deadline_s, server.stage_deadline_s),
               check_certificate=certificate_check(WatchedTrust(trust, [Role.SITE])), certificates=certificates,
               evaluate_every=server.evaluate_every, progress=progress)
