"""A site process that serves many contracts in turn, each with its own ledger and a trainer that stays loaded."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fl_client.agent import open_ledger
from fl_client.app import build_app
from fl_client.approval import approve, approved
from fl_client.journal import SiteJournal
from fl_client.link import FleetLink
from fl_client.link_tls import coordinator_check
from fl_client.policy import SitePolicy, accept
from fl_client.round import SiteRound
from fl_client.training import LocalTrainer
from fl_client.witness import Witness
from privacy.canonical import parse
from privacy.contract import load_contract
from privacy.identity import FileSigner, Role
from privacy.secagg.peers import certificate_check
from privacy.trust import TrustStore

POLICY = SitePolicy(approver="test", allow_non_private=True, max_epsilon=8.0)


def serve(folder: Path, name: str, port: int, model: str, data: str) -> None:
    """Until its stdin ends, so that it never outlives the test."""
    trust = folder / "ca"
    issued, keys = trust / "issued" / name, folder / "keys" / name
    signer, check = FileSigner(keys / "sign.key", issued / "sign.pem"), certificate_check(TrustStore.load(trust))
    check_coordinator = certificate_check(TrustStore.load(trust), Role.COORDINATOR)
    served, current, stop = dict[str, dict[str, Any]](), dict[str, Any](), threading.Event()
    for file in sorted((folder / "contracts").glob("*.json")):
        contract, own = load_contract(file.read_bytes()), folder / "state" / name / file.stem
        own.mkdir(mode=0o700, parents=True)
        accept(contract, name, POLICY)
        approve(contract, name, POLICY, signer, own, approver=POLICY.approver)
        ledger = open_ledger(contract, name, POLICY, signer, own)
        trainer = LocalTrainer(contract, name, model=Path(model), data=Path(data), text="text", label="label",
                               lineage=ledger.lineage if ledger else "")
        served[contract.digest] = SiteRound(
            contract, name, trainer=trainer, policy=POLICY, signer=signer, check_certificate=check,
            journal=SiteJournal(own / "rounds.jsonl"), ledger=ledger, approval=approved(contract, name, POLICY, signer, own),
            witness=Witness(own, name, signer, check_coordinator)).handlers()

    def of(stage: str) -> Callable[[bytes, Any], Any]:
        def handle(body: bytes, arrays: Any) -> Any:
            if stage == "train.update":
                current.update(served[parse(body)["contract"]])
            return current[stage](body, arrays)

        return handle

    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    stages = [stage for stage in next(iter(served.values())) if stage.startswith("train.")]
    FleetLink(f"https://localhost:{port}", issued / "tls.pem", keys / "tls.key", trust / "issuing-coordinator.pem",
              check=coordinator_check(trust)).run(build_app({stage: of(stage) for stage in stages}), None, stop)


if __name__ == "__main__":
    where, *rest = json.loads(sys.argv[1])
    serve(Path(where), *rest)
