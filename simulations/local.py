"""A whole federation in one process: the coordinator's and the sites' own code over the in-process grid.

Only three things differ from real processes: the transport, the trainer (same class, no child process) and the CA,
which is made for the occasion in a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.settings import Settings, SiteDeclaration
from fl_client.agent import consider, open_ledger
from fl_client.approval import approve, approved
from fl_client.journal import SiteJournal
from fl_client.link import build_app
from fl_client.policy import SitePolicy
from fl_client.round import SiteRound
from fl_client.training import LocalTrainer
from fl_client.witness import Witness
from fl_server.assemble import check_folder, make_run, site_certificates
from fl_server.contracting import make_contract
from fl_server.exchange import Exchange
from fl_server.run import Progress, Result, Run
from privacy import ca
from privacy.contract import Contract
from privacy.errors import UsageError
from privacy.files import read_file
from privacy.identity import FileSigner, Role, create_request
from privacy.mechanism import declared
from privacy.secagg.peers import certificate_check
from privacy.signing import sign_contract
from privacy.trust import TrustStore
from simulations.inprocess import InProcessGrid
from strategies.records import count_items
from strategies.rules import RULES

ENGINEER = "engineer"
Tap = Callable[[Any, Any], None]
Drop = Callable[[int, Any, int], Any]


@dataclass(frozen=True)
class Outcome:
    """result, the contract, and the root's fingerprint for `fl-privacy verify`."""

    result: Result
    contract: Contract
    root: str


def federate(settings: Settings, *, progress: Progress = lambda event: None, tap: Tap = lambda m, r: None,
             drop: Drop = lambda node, message, k: None, policy: SitePolicy | None = None,
             state: Path | None = None) -> Outcome:
    """Run one job in this process. Sites' ledgers and journals live in `state` (default: with the CA, thrown away).

    Raises what the two sides raise; RoundVoid when the retries are used up.
    """
    check_folder(Path(settings.server.out))
    with federation(settings, tap=tap, drop=drop, policy=policy, state=state) as there:
        return Outcome(there.coordinate(progress).run(), there.contract, there.root)


@dataclass(frozen=True)
class Federation:
    """Sites that wait for a coordinator, and all that one needs; another can take its place."""

    settings: Settings
    contract: Contract
    root: str
    exchange: Exchange
    _folder: Path
    _signature: bytes
    _roster: Mapping[str, ca.RosterEntry]

    def coordinate(self, progress: Progress = lambda event: None) -> Run:
        """A coordinator for the run, or for what is left of it. Raises as `make_run`."""
        return make_run(self.settings, self.contract, self.exchange,
                        signer=_signer(self._folder, self.settings.server.name), trust=self._folder / "ca",
                        signature=self._signature, certificates=site_certificates(self.contract, self._roster),
                        progress=progress)


@contextmanager
def federation(settings: Settings, *, tap: Tap = lambda m, r: None, drop: Drop = lambda node, message, k: None,
               policy: SitePolicy | None = None, state: Path | None = None) -> Iterator[Federation]:
    """A consortium, its contract and its sites, as for `federate`."""
    settings = declare_sites(settings)
    out = Path(settings.server.out)
    settings = settings.model_copy(update={"server": settings.server.model_copy(update={"log": str(out / "log")})})
    policy = policy or _permissive(settings)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="consilo-")))
        trust = _consortium(folder, settings)
        roster = {e.name: e for e in ca.verify_roster(ca.roster(folder / "ca"), TrustStore.load(trust))}
        contract = make_contract(settings, {n: e.sign_fingerprint for n, e in roster.items()})
        signature = sign_contract(contract, _signer(folder, ENGINEER))
        check, apps, nodes = certificate_check(TrustStore.load(trust)), {}, {}
        check_coordinator = certificate_check(TrustStore.load(trust), Role.COORDINATOR)
        for index, (name, site) in enumerate(sorted(settings.data.sites.items())):
            own = (state or folder) / name
            own.mkdir(parents=True, exist_ok=True)
            signer = _signer(folder, name)
            consider(contract, name, policy, signer, own)
            approve(contract, name, policy, signer, own, approver="simulation", signature=signature)
            ledger = open_ledger(contract, name, policy, signer, own)
            journal = SiteJournal(own / "rounds.jsonl")
            stack.callback(journal.close)
            if ledger:
                stack.callback(ledger.close)
            trainer = LocalTrainer(contract, name, model=Path(settings.model.path), data=Path(str(site.file)),
                                   text=settings.data.text, label=settings.data.label, person=settings.data.person,
                                   lineage=ledger.lineage if ledger else "", compute=settings.site.compute)
            handlers = SiteRound(contract, name, trainer=trainer, policy=policy, signer=signer,
                                 check_certificate=check, journal=journal, ledger=ledger,
                                 approval=approved(contract, name, policy, signer, own),
                                 witness=Witness(own, name, signer, check_coordinator)).handlers()
            apps[index + 1], nodes[name] = build_app(handlers), index + 1
        yield Federation(settings, contract, read_file(trust / "ca.sha256").decode().strip(),
                         Exchange(InProcessGrid(apps, drop=drop, tap=tap), nodes), folder, signature, roster)


def declare_sites(settings: Settings) -> Settings:
    """Fill in what a simulation may know: the declared size of each site, from its file."""
    sites, column = {}, settings.data.person if settings.privacy.sampled == "person" else None
    for name, site in settings.data.sites.items():
        if site.file is None:
            raise UsageError("simulation.no_file", f"Site {name} has no data file.", f"Set data.sites.{name}.file.")
        count = count_items(Path(site.file), text=settings.data.text, label=settings.data.label, person=column)
        sites[name] = SiteDeclaration(file=site.file, weight=site.weight, n_decl=site.n_decl or declared(count))
    return settings.model_copy(update={"data": settings.data.model_copy(update={"sites": sites})})


def _permissive(settings: Settings) -> SitePolicy:
    """In a simulation the one who runs it owns all the data."""
    p = settings.privacy
    return SitePolicy(approver="simulation", max_epsilon=p.epsilon or 8.0, max_delta=0.1, min_sigma=0.0, min_cohort=1,
                      colluding=settings.secure_aggregation.colluding, allow_non_private=True, reveal_update=True,
                      rules=tuple(RULES))


def _consortium(folder: Path, settings: Settings) -> Path:
    ca.init(folder / "ca", "Simulated consortium", days=30)
    roles = dict.fromkeys(settings.data.sites, Role.SITE) | {settings.server.name: Role.COORDINATOR, ENGINEER: Role.ENGINEER}
    for name, role in roles.items():
        request = create_request(folder / "keys" / name, name, f"Organisation of {name}")
        ca.issue(folder / "ca", request, role, days=30, hosts=["localhost"] if role is Role.COORDINATOR else [])
    return folder / "ca"


def _signer(folder: Path, name: str) -> FileSigner:
    return FileSigner(folder / "keys" / name / "sign.key", folder / "ca" / "issued" / name / "sign.pem")
