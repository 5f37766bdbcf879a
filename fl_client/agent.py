"""The site's agent, put together: policy and contract first, then keys, trainer, ledger, round and link."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.settings import Settings, SiteSettings
from fl_client import lineage
from fl_client.approval import approved
from fl_client.journal import SiteJournal
from fl_client.policy import SitePolicy, accept, load_policy
from fl_client.round import SiteRound
from fl_client.sandbox import Sandbox
from fl_client.supervisor import TrainerProcess
from fl_client.witness import Witness
from privacy.contract import Contract, load_contract
from privacy.errors import ConsiloError, Refused
from privacy.files import read_file
from privacy.identity import FileSigner, Peer, Role, Signer
from privacy.ledger import Ledger
from privacy.ledger_file import begun
from privacy.ledger_records import REFUSALS
from privacy.secagg.peers import certificate_check
from privacy.signing import check_signature
from privacy.trust import TrustStore
from privacy.trust_files import WatchedTrust
from strategies.records import LabelledFile

if TYPE_CHECKING:
    from fl_client.link import FleetLink

log = logging.getLogger("consilo.agent")
TRAIN_LIMIT_S = 3600.0
REFRESH_S = 60.0
LEDGER, TAGS = "ledger.jsonl", "lineage.tags"


def compare(contract: Contract, site: str, policy: SitePolicy, signer: Signer) -> None:
    """Raises Refused `contract.certificate`, and as `policy.accept`."""
    accept(contract, site, policy)
    if signer.fingerprint != contract.site(site).signer:
        raise Refused("contract.certificate", "The contract names another certificate for this site.",
                      "Ask for a contract with this site's current certificate.")


def consider(contract: Contract, site: str, policy: SitePolicy, signer: Signer, folder: Path) -> None:
    """`compare`, with a refusal recorded in the site's ledger."""
    try:
        compare(contract, site, policy, signer)
    except ConsiloError as e:
        path = folder / LEDGER
        if e.code in REFUSALS and begun(path):
            with suppress(Refused), Ledger.open(path, signer) as ledger:  # another job may hold it
                ledger.refuse(e.code, contract.run, contract.digest, "job")
        raise


def open_ledger(contract: Contract, site: str, policy: SitePolicy, signer: Signer, folder: Path, *,
                found: lineage.Tags | None = None, others: Sequence[Path] = ()) -> Ledger | None:
    """`open_lineage` and `encumber` in one. None for trust=none, which charges nothing."""
    ledger = open_lineage(contract, site, policy, signer, folder, found=found, others=others)
    if ledger is not None:
        encumber(ledger, contract, site, policy)
    return ledger


def open_lineage(contract: Contract, site: str, policy: SitePolicy, signer: Signer, folder: Path, *,
                 found: lineage.Tags | None = None, others: Sequence[Path] = ()) -> Ledger | None:
    """The ledger of this site's data, made on first use; nothing is promised yet. None for trust=none.

    found: tags of the data (None in simulations); the first job's data make the lineage. others: tag files of the
    site's other lineages. Raises Refused `lineage.unregistered`, `lineage.overlap`, and as `Ledger` does.
    """
    mechanism = contract.mechanism(site)
    if not mechanism.private:
        return None
    path = folder / LEDGER
    if begun(path):
        ledger = Ledger.open(path, signer)
    else:
        ledger = Ledger.create(path, signer, lineage=secrets.token_hex(16), unit=mechanism.unit,
                               adjacency=mechanism.adjacency, delta=mechanism.delta, cap=policy.max_epsilon)
    try:
        if found is not None:
            lineage.check(folder / TAGS, found, new=not ledger.summary().reserves, others=others)
    except ConsiloError:
        ledger.close()
        raise
    return ledger


def encumber(ledger: Ledger, contract: Contract, site: str, policy: SitePolicy) -> None:
    """Hold the contract's whole schedule, retries included; an agent that starts again goes on with what it holds.

    Raises Refused `budget.exhausted` (recorded in the ledger, which is then closed) when it doesn't fit the cap, and as
    `Ledger.encumber` does.
    """
    try:
        if contract.run not in {c.run for c in ledger.summary().closes}:  # a closed run is only asked for its evidence
            ledger.encumber(contract.run, contract.plans(site), contract=contract.digest, approver=policy.approver,
                            cap=policy.max_epsilon)
    except ConsiloError as e:
        if e.code in REFUSALS:
            ledger.refuse(e.code, contract.run, contract.digest, "job")
        ledger.close()
        raise


def find_tags(contract: Contract, site: SiteSettings) -> lineage.Tags:
    """Tags of this site's records and, where the unit is a person, of its persons, under the site's own key.

    Raises UsageError `data.*`; Refused `key.permissions`.
    """
    person = site.person if contract.privacy.unit == "person" else None
    records = LabelledFile(Path(site.data), contract.data.labels, text=site.text, label=site.label, person=person)
    return lineage.tags(lineage.site_key(Path(site.state) / "lineage.key"), records.contents, records.people)


def register_data(settings: Settings) -> None:
    """The operator adds the site's present data to its lineage (`fl-client register`).

    Raises UsageError `ledger.missing` where no job has begun a lineage yet, and as the ledger and the data do.
    """
    site = settings.site
    contract, policy = load_contract(read_file(Path(site.contract))), load_policy(Path(site.policy))
    signer = FileSigner(Path(site.keys) / "sign.key", Path(site.certificates) / "sign.pem")
    with Ledger.open(Path(site.state) / LEDGER, signer) as ledger:
        lineage.register(ledger, Path(site.state) / TAGS, find_tags(contract, site), policy.approver)


@dataclass(frozen=True)
class Papers:
    """What a site decides on: the contract, who signed it, the policy, and with which identity it answers."""

    contract: Contract
    engineer: Peer
    policy: SitePolicy
    signer: FileSigner
    trust: TrustStore

    @classmethod
    def load(cls, site: SiteSettings, *, record: bool = True) -> Papers:
        """Read and check everything that isn't data or model. record: a refusal is an event of the ledger.

        Raises as `consider` and `check_signature` do."""
        contract, policy = load_contract(read_file(Path(site.contract))), load_policy(Path(site.policy))
        certificates, state = Path(site.certificates), Path(site.state)
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        signer = FileSigner(Path(site.keys) / "sign.key", certificates / "sign.pem")
        trust = TrustStore.load(certificates / "trust")
        engineer = check_signature(read_file(Path(site.signature)), contract, trust)
        if record:
            consider(contract, site.name, policy, signer, state)
        else:
            compare(contract, site.name, policy, signer)
        return cls(contract, engineer, policy, signer, trust)


class Agent:
    """One contract at one site. Everything that may be refused is refused here, before the coordinator is spoken to."""

    def __init__(self, settings: Settings) -> None:
        site = settings.site
        papers, state, trust = Papers.load(site), Path(site.state), Path(site.certificates) / "trust"
        self.contract, policy, signer = papers.contract, papers.policy, papers.signer
        approval = approved(self.contract, site.name, policy, signer, state)
        with ExitStack() as held:  # what was opened is given back if anything is refused
            journal = SiteJournal(state / "rounds.jsonl")
            held.callback(journal.close)
            private = self.contract.privacy.trust != "none"
            ledger = open_lineage(self.contract, site.name, policy, signer, state,
                                  found=find_tags(self.contract, site) if private else None,
                                  others=[Path(folder) / TAGS for folder in site.other_lineages])
            if ledger is not None:
                held.callback(ledger.close)
            trainer = TrainerProcess(_request(self.contract, settings, ledger), limit_s=TRAIN_LIMIT_S,
                                     sandbox=sandbox(site, policy))
            held.callback(trainer.close)
            if ledger is not None:  # only now: a site that can't train must not hold its budget for this job
                encumber(ledger, self.contract, site.name, policy)
            self.round = SiteRound(self.contract, site.name, trainer=trainer, policy=policy, signer=signer,
                                   check_certificate=certificate_check(WatchedTrust(trust, [Role.SITE])),
                                   journal=journal, ledger=ledger, approval=approval,
                                   witness=Witness(state, site.name, signer, certificate_check(
                                       WatchedTrust(trust, [Role.COORDINATOR]), Role.COORDINATOR)))
            self._site, self._held = site, held.pop_all()

    def run(self, stop: threading.Event) -> None:
        """Serve the coordinator until `stop`."""
        from fl_client.link import build_app

        site: SiteSettings = self._site
        link = open_link(site)
        refresh = threading.Thread(target=_refresh, args=(site, stop), name="roster", daemon=True)
        try:
            if site.control_url:
                refresh.start()
            link.run(build_app(self.round.handlers()), None, stop, between=self.round.expire)
        finally:
            stop.set()
            self.close()

    def close(self) -> None:
        """End the trainer, give ledger and journal back."""
        self._held.close()


def open_link(site: SiteSettings) -> FleetLink:
    """The way to the coordinator that the settings name. Raises as `FleetLink` and `coordinator_check`."""
    from fl_client.link import FleetLink
    from fl_client.link_tls import coordinator_check

    certificates = Path(site.certificates)
    return FleetLink(site.url, certificates / "tls.pem", Path(site.keys) / "tls.key",
                     certificates / "trust" / "issuing-coordinator.pem", check=coordinator_check(certificates / "trust"),
                     proxy=site.proxy, proxy_ca=Path(site.proxy_ca) if site.proxy_ca else None)


def _refresh(site: SiteSettings, stop: threading.Event) -> None:
    """Keep roster and revocation lists current from the control plane; what can't be had is tried again."""
    from fl_client.control import ControlClient

    wait = 0.0
    while not stop.wait(wait):
        try:
            ControlClient(site.control_url or "", Path(site.keys), Path(site.certificates), proxy=site.proxy).roster()
        except ConsiloError as e:
            log.warning("roster and revocation lists can't be renewed: %s", e.code)
        wait = REFRESH_S


def sandbox(site: SiteSettings, policy: SitePolicy) -> Sandbox:
    """The trainer's: it must not reach what makes this site's signatures and ledger."""
    return Sandbox(required=policy.required_walls, hidden=(site.keys, site.state))


def _request(contract: Contract, settings: Settings, ledger: Ledger | None) -> dict[str, Any]:
    site = settings.site
    return {"contract": contract.to_bytes().decode(), "site": site.name, "model": str(Path(settings.model.path).resolve()),
            "data": str(Path(site.data).resolve()), "text": site.text, "label": site.label, "threads": site.threads,
            "compute": asdict(site.compute), "person": site.person or "", "lineage": ledger.lineage if ledger else ""}
