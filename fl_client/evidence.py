"""`fl-client evidence export` and `fl-client withdraw`: what a site shows its own auditor, and how it leaves."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from conf.settings import SiteSettings
from fl_client.agent import LEDGER
from fl_client.approval import FOLDER
from fl_client.journal import SiteJournal, read_statements
from fl_client.policy import load_policy
from fl_client.witness import CONFLICT, HEAD
from privacy.contract import load_contract
from privacy.errors import Refused, UsageError
from privacy.files import read_file
from privacy.identity import FileSigner, Role
from privacy.ledger import Ledger
from privacy.ledger_chain import check_extract, split_lines
from privacy.predicates import KINDS
from privacy.site_bundle import write_site_bundle
from privacy.statements import make

JOURNAL = "rounds.jsonl"
SUFFIX = {"": ".approval", "withdrawn": ".approval", "contract": "", "signature": ".signature"}


def export(site: SiteSettings, out: Path) -> Path:
    """Write the site bundle of `site.state`'s lineage into a new folder; the agent may be running.

    Raises UsageError `ledger.missing` where no job has begun a lineage; Refused `bundle.sealed`, `key.permissions`.
    """
    state, certificates = Path(site.state), Path(site.certificates)
    signer = FileSigner(Path(site.keys) / "sign.key", certificates / "sign.pem")
    path = state / LEDGER
    if not path.is_file():
        raise UsageError("ledger.missing", "There is no ledger in this state folder.", "Give the site's own settings.")
    statements = read_statements(state / JOURNAL)  # before the ledger, which holds all that they name
    data = read_file(path)
    ledger = data[:split_lines(data)[1]]
    trust = certificates / "trust"
    files = {"ledger.jsonl": ledger, "certificates/root.pem": read_file(trust / "root.pem"),
             f"certificates/{site.name}.pem": signer.certificate.public_bytes(Encoding.PEM)}
    for role in (Role.SITE, Role.COORDINATOR, Role.ENGINEER):
        files[f"certificates/issuing-{role}.pem"] = read_file(trust / f"issuing-{role}.pem")
    for approved in sorted((state / FOLDER).glob("*.json"), reverse=True):  # what is in force after what was withdrawn
        digest, _, kind = approved.name.removesuffix(".json").partition(".")
        files[f"contracts/{digest}{SUFFIX[kind]}.json"] = read_file(approved)
    for number, (kind_, envelope) in enumerate(statements, 1):
        files[f"statements/{number:06d}-{kind_}.json"] = envelope
    for name in (HEAD, CONFLICT):
        if (state / name).is_file():
            files[f"witness/{name}"] = read_file(state / name)
    return write_site_bundle(out, files, site=site.name, lineage=check_extract(ledger, signer.certificate).lineage,
                             signer=signer)


def withdraw(site: SiteSettings, approver: str) -> bytes:
    """Leave the contract of `site.contract`: no round of it is answered any more. Returns the signed statement.

    The ledger records it and closes the job, which frees what it held; what was spent stays spent. Raises Refused
    `file.leased` (the agent is running), `contract.not_approved` (there is nothing to withdraw), and as `Ledger` does.
    """
    contract, state = load_contract(read_file(Path(site.contract))), Path(site.state)
    signer = FileSigner(Path(site.keys) / "sign.key", Path(site.certificates) / "sign.pem")
    approval = state / FOLDER / f"{contract.digest}.json"
    if not approval.is_file():
        raise Refused("contract.not_approved", "This contract isn't approved here, so there is nothing to withdraw.",
                      "Nothing needs to be done.")
    approver = approver or load_policy(Path(site.policy)).approver
    journal = SiteJournal(state / JOURNAL)  # its lease shows that no agent is running
    try:
        lineage, head = "", (0, "")
        if (state / LEDGER).is_file():
            with Ledger.open(state / LEDGER, signer) as ledger:
                if contract.run not in {close.run for close in ledger.summary().closes}:
                    ledger.refuse("site.withdrawn", contract.run, contract.digest, "job")
                    ledger.close_run(contract.run)
                lineage, head = ledger.lineage, (ledger.head.seq, ledger.head.hash)
        said = make(signer, KINDS["withdrawal"].predicate_type, [("contract", contract.digest)], {
            "run": contract.run, "contract": contract.digest, "site": site.name, "lineage": lineage, "ledger_seq": head[0],
            "ledger_head": head[1], "withdrawn": datetime.now(UTC).isoformat(timespec="seconds"),
            "approver": approver})
        journal.stated("withdrawal", said.decode())
        approval.rename(approval.with_name(f"{contract.digest}.withdrawn.json"))
    finally:
        journal.close()
    return said
