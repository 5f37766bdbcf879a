"""What a history is made of: a consortium, contracts, agents and coordinators, all the product's own but for the model.

Trainer and model are cheap ones of the same interface: an update is drawn from the seed, and nobody needs torch. All else
(ledger, journal, sessions, statements, log, recovery, evidence) is the code that runs in production.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from conf import load_settings
from conf.settings import Settings
from fl_client import lineage
from fl_client.agent import consider, encumber, open_lineage
from fl_client.app import Handler, build_app
from fl_client.approval import approve, approved
from fl_client.journal import SiteJournal
from fl_client.policy import SitePolicy
from fl_client.round import SiteRound
from fl_client.witness import Witness
from fl_server.assemble import make_run, site_certificates
from fl_server.contracting import make_contract
from fl_server.evaluation import Score
from fl_server.exchange import Exchange
from fl_server.run import Progress, Run
from privacy import ca
from privacy.contract import Contract
from privacy.files import read_file
from privacy.identity import FileSigner, Role, create_request
from privacy.secagg.peers import certificate_check
from privacy.signing import sign_contract
from privacy.trust import TrustStore
from strategies.adapter import AdapterSpec, Tensors
from strategies.base import adapter_spec
from strategies.rules import RULES, rule

SHAPES = (("m.lora_A.weight", (2, 32)), ("m.lora_B.weight", (32, 2)), ("head.weight", (3, 6)), ("head.bias", (3,)))
NAMES = tuple(f"site-{x}" for x in "abcdefgh")
COORDINATOR, ENGINEER = "coordinator", "engineer"
RANGE, LARGEST = 4.0, 0.1  # of values that are sent; of an update's, so that none of them is cut
Wrap = Callable[[Mapping[str, Handler]], Mapping[str, Handler]]
Draw = Callable[[int], NDArray[np.float32]]


class CheapModel:
    """In place of `TextClassifier`. saved: told of each adapter before its files are written."""

    def __init__(self, contract: Contract, saved: Callable[[Tensors], None]) -> None:
        self._saved, self._shapes = saved, rule(contract.rule.name, secure=contract.secagg.enabled).tensors(SHAPES)

    def spec(self, trains: Callable[[str], bool]) -> AdapterSpec:
        return AdapterSpec(self._shapes, frozenset(name for name, _ in self._shapes if trains(name)))

    def save(self, folder: Path, adapter: Tensors, base_name: str) -> None:
        self._saved(adapter)
        folder.mkdir(parents=True, exist_ok=True)


class CheapSplit:
    """In place of `PublicSplit`."""

    name = "public split"

    def __init__(self, contract: Contract) -> None:
        self._score = Score(dict.fromkeys(contract.metrics, 0.5), 100)

    def score(self, adapter: Tensors) -> Score:
        return self._score


class CheapTrainer:
    """In place of `LocalTrainer`. draw: of a round, the update, float32 (dim,)."""

    def __init__(self, contract: Contract, draw: Draw) -> None:
        self.spec, self._draw = spec_of(contract), draw

    def train(self, adapter: Tensors, round_no: int) -> NDArray[np.float32]:
        return self._draw(round_no)


def spec_of(contract: Contract) -> AdapterSpec:
    """The adapter that the contract's rule makes of the cheap model."""
    return adapter_spec(rule(contract.rule.name, secure=contract.secagg.enabled), SHAPES)


@contextmanager
def cheap_coordinator(saved: Callable[[Tensors], None]) -> Iterator[None]:
    """Coordinators are made with the cheap model and split."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("fl_server.assemble.build", lambda path, contract: CheapModel(contract, saved)))
        stack.enter_context(mock.patch("fl_server.assemble.PublicSplit", lambda _m, contract, _s: CheapSplit(contract)))
        stack.enter_context(mock.patch("fl_server.run.write_card", lambda *args: None))
        yield


class Consortium:
    """A CA, sites, a coordinator and an engineer, with their key files in `folder`; `sites` are the first n names."""

    def __init__(self, folder: Path, n: int) -> None:
        self._folder, self.sites = folder, NAMES[:n]
        ca.init(folder / "ca", "Consortium", days=3650)
        roles = dict.fromkeys(self.sites, Role.SITE) | {COORDINATOR: Role.COORDINATOR, ENGINEER: Role.ENGINEER}
        for name, role in roles.items():
            request = create_request(folder / "keys" / name, name, f"Organisation of {name}")
            ca.issue(folder / "ca", request, role, hosts=["localhost"] if role is Role.COORDINATOR else [])
        self.trust = TrustStore.load(folder / "ca")
        self.roster = {e.name: e for e in ca.verify_roster(ca.roster(folder / "ca"), self.trust)}
        self.trust = TrustStore.load(folder / "ca")
        self.root = read_file(folder / "ca" / "ca.sha256").decode().strip()
        self.signers = {name: FileSigner(folder / "keys" / name / "sign.key", folder / "ca" / "issued" / name / "sign.pem")
                        for name in roles}
        model = folder / "model"
        model.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (model / name).write_text(name)

    @property
    def trust_folder(self) -> Path:
        return self._folder / "ca"

    def settings(self, *overrides: str) -> Settings:
        """Small and cheap; later overrides win."""
        sites = ",".join(f"{name}:{{n_decl:1000}}" for name in self.sites)
        base = ["model=local", "model.name=cheap", f"model.path={self._folder / 'model'}", "data=files", "data.name=none",
                "data.labels=[a,b,c]", f"data.sites={{{sites}}}", "privacy.q=0.1", "privacy.sigma=4.0", "privacy.clip=1.0",
                "lora.r=2", "privacy.epsilon=6.0", "++rule.max_norm=100.0", f"secure_aggregation.range={RANGE}",
                "server.deadline_s=20", "server.stage_deadline_s=10", "server.evaluate_every=2"]
        if "privacy=none" in overrides:
            base = [o for o in base if not o.startswith(("privacy.epsilon=", "privacy.sigma="))]
        latest = {o.lstrip("+~").partition("=")[0]: o for o in (*base, *overrides)}
        return load_settings(list(latest.values()))


def changed(settings: Settings, **sections: Mapping[str, Any]) -> Settings:
    """The settings with values of some sections replaced."""
    return settings.model_copy(update={name: getattr(settings, name).model_copy(update=dict(values))
                                       for name, values in sections.items()})


@dataclass(frozen=True)
class Job:
    """One run: its contract, and where the coordinator keeps it."""

    name: str
    settings: Settings
    contract: Contract
    signature: bytes
    policy: SitePolicy

    @classmethod
    def make(cls, name: str, consortium: Consortium, settings: Settings, *, cap: float) -> Job:
        """cap: epsilon of each site's data for their life."""
        contract = make_contract(settings, {n: e.sign_fingerprint for n, e in consortium.roster.items()})
        policy = SitePolicy(approver="chaos", max_epsilon=cap, max_delta=0.1, min_sigma=0.0, min_cohort=1,
                            colluding=settings.secure_aggregation.colluding, allow_non_private=True, reveal_update=True,
                            rules=tuple(RULES))
        return cls(name, settings, contract, sign_contract(contract, consortium.signers[ENGINEER]), policy)

    def approve(self, consortium: Consortium, site: str, state: Path) -> None:
        signer = consortium.signers[site]
        consider(self.contract, site, self.policy, signer, state)
        approve(self.contract, site, self.policy, signer, state, approver="chaos", signature=self.signature)

    def agent(self, consortium: Consortium, site: str, state: Path, draw: Draw, wrap: Wrap) -> tuple[Any, SiteRound]:
        """What `fl_client.agent.Agent` puts together: the app, and the round behind it."""
        signer, contract, policy = consortium.signers[site], self.contract, self.policy
        consider(contract, site, policy, signer, state)
        approval = approved(contract, site, policy, signer, state)
        journal = SiteJournal(state / "rounds.jsonl")
        private = contract.privacy.trust != "none"
        found = lineage.tags(lineage.site_key(state / "lineage.key"), [site.encode()]) if private else None
        ledger = open_lineage(contract, site, policy, signer, state, found=found)
        if ledger is not None:
            encumber(ledger, contract, site, policy)
        made = SiteRound(contract, site, trainer=CheapTrainer(contract, draw), policy=policy, signer=signer,
                         check_certificate=certificate_check(consortium.trust), journal=journal, ledger=ledger,
                         approval=approval,
                         witness=Witness(state, site, signer, certificate_check(consortium.trust, Role.COORDINATOR)))
        return build_app(wrap(made.handlers())), made

    def coordinator(self, consortium: Consortium, exchange: Exchange, progress: Progress) -> Run:
        return make_run(self.settings, self.contract, exchange, signer=consortium.signers[COORDINATOR],
                        trust=consortium.trust_folder, signature=self.signature,
                        certificates=site_certificates(self.contract, consortium.roster), progress=progress)


def drawn_update(chance: random.Random, dim: int) -> NDArray[np.float32]:
    """float32 (dim,), within LARGEST."""
    return np.asarray([chance.uniform(-LARGEST, LARGEST) for _ in range(dim)], np.float32)
