"""A site's round against a coordinator that deviates: real contract, certificates, ledger and journal; a stub trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client.agent import consider, open_ledger
from fl_client.app import StageRefused
from fl_client.journal import SiteJournal, read_statements
from fl_client.policy import SitePolicy, accept
from fl_client.round import SiteRound
from fl_client.witness import Witness
from privacy import ca, stages
from privacy.canonical import canonical
from privacy.contract import Contract, load_contract
from privacy.errors import Refused, SiteCode
from privacy.identity import FileSigner, Peer, Role, create_request
from privacy.ledger import Ledger, check_extract
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.messages import dump
from privacy.secagg.peers import certificate_check
from privacy.secagg.site import SiteSession
from privacy.signing import Approval, code_digest
from privacy.trust import TrustStore
from strategies.adapter import AdapterSpec, adapter_digest, initial

SPEC = AdapterSpec((("m.lora_A.weight", (2, 6)), ("m.lora_B.weight", (6, 2)), ("head.weight", (3, 6)), ("head.bias", (3,))),
                   frozenset({"m.lora_B.weight", "head.weight", "head.bias"}))
RANGES = [(SPEC.dim, 10.0)]
POLICY = SitePolicy(approver="test", max_epsilon=8.0)
Handlers = dict[str, Callable[..., Any]]


class StubTrainer:
    """Counts what it was asked for; the vector is not the point here."""

    spec = SPEC

    def __init__(self) -> None:
        self.rounds = 0

    def train(self, adapter: Any, round_no: int) -> Any:
        self.rounds += 1
        return np.full(SPEC.dim, 0.25, np.float32)


def approval_of(contract: Contract, site: str) -> Approval:
    return Approval(site=site, run=contract.run, contract=contract.digest, policy=POLICY.digest, code=contract.code,
                    approver="test", approved="2026-01-01T00:00:00+00:00")


def no_coordinator(pem: bytes) -> Peer:
    raise AssertionError("nobody asks for a signature on the log here")


class Site:
    """One site of three with its real files; `restart` is a new process on the same ones."""

    def __init__(self, folder: Path, trust_none: bool = False, rounds: int = 3, retries: int = 1) -> None:
        self.folder = folder
        ca.init(folder / "ca", "Test")
        self.signers = []
        for i in range(3):
            ca.issue(folder / "ca", create_request(folder / f"s{i}", f"s{i}", f"Hospital {i}"), Role.SITE)
            self.signers.append(FileSigner(folder / f"s{i}" / "sign.key", folder / "ca" / "issued" / f"s{i}" / "sign.pem"))
        privacy = {"rounds": rounds, "retries": retries} | ({"trust": "none", "epsilon": None} if trust_none else {})
        self.contract = load_contract(canonical({
            "run": "ab" * 16, "purpose": "test", "code_version": "0", "code": code_digest(),
            "expires": "2099-01-01T00:00:00Z", "model": {"weights": "0" * 64, "tokenizer": "1" * 64},
            "data": {"name": "d", "labels": ["a", "b", "c"]}, "lora": {}, "rule": {}, "privacy": privacy,
            "secagg": {"threshold": 3, "survivors": 3, "range": 10.0},
            "sites": [{"name": f"s{i}", "signer": s.fingerprint, "n_decl": 100, "delta": 1e-5,
                       "sigma": 0.0 if trust_none else 1.0} for i, s in enumerate(self.signers)]}))
        self.ledger: Ledger | None = open_ledger(self.contract, "s0", POLICY, self.signers[0], folder)
        self.trainer, self.journal = StubTrainer(), SiteJournal(folder / "rounds.jsonl")
        self.adapter = initial(SPEC, self.contract.lora.seed)
        self.handlers = self._handlers()

    def _handlers(self) -> Handlers:
        self.round = SiteRound(self.contract, "s0", trainer=self.trainer, policy=POLICY, signer=self.signers[0],
                         check_certificate=certificate_check(TrustStore.load(self.folder / "ca")), journal=self.journal,
                               ledger=self.ledger, approval=approval_of(self.contract, "s0"),
                               witness=Witness(self.folder, "s0", self.signers[0], no_coordinator))
        return self.round.handlers()

    def restart(self) -> None:
        self.journal.close()
        self.journal = SiteJournal(self.folder / "rounds.jsonl")
        if self.ledger:
            self.ledger.close()
            self.ledger = Ledger.open(self.folder / "ledger.jsonl", self.signers[0])
        self.handlers = self._handlers()

    def offer(self, round_no: int = 1, attempt: int = 0, **changes: Any) -> bytes:
        made = tr.offer(self.contract, round_no=round_no, attempt=attempt, ranges=RANGES,
                        adapter=adapter_digest(self.adapter))
        return dump(made.model_copy(update=changes))

    def update(self, body: bytes, adapter: Any = None) -> bytes:
        vector = SPEC.pack(self.adapter if adapter is None else adapter)
        return bytes(self.handlers["train.update"](body, {"adapter": vector})[0])

    def refusal(self, body: bytes, adapter: Any = None) -> SiteCode:
        before = self.ledger.summary().reserves if self.ledger else None
        with pytest.raises(StageRefused) as caught:
            self.update(body, adapter)
        assert (self.ledger.summary().reserves if self.ledger else None) == before, "a refusal spends nothing"
        return caught.value.code


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize(("field", "value", "code"), [
    ("run", "cd" * 16, SiteCode.CONTRACT), ("threshold", 2, SiteCode.CONTRACT), ("survivors", 2, SiteCode.CONTRACT),
    ("ranges", ((SPEC.dim - 1, "10.0"),), SiteCode.CONTRACT), ("ring", 16, SiteCode.CONTRACT),
    ("bits", 8, SiteCode.CONTRACT), ("ranges", ((SPEC.dim, "1000.0"),), SiteCode.CONTRACT),
    ("w_cap", "2.0", SiteCode.CONTRACT),
    ("contract", "9" * 64, SiteCode.CONTRACT), ("base_model", "9" * 64, SiteCode.MODEL),
    ("adapter", "9" * 64, SiteCode.ADAPTER),
    ("round", 4, SiteCode.CONTRACT), ("attempt", 2, SiteCode.CONTRACT)])
@pytest.mark.case(10)
def test_attack_offer_with_each_field_changed(site: Site, field: str, value: Any, code: SiteCode) -> None:
    assert site.refusal(site.offer(**{field: value})) is code
    assert site.trainer.rounds == 0


def test_a_refusal_is_recorded_once_and_signed(site: Site) -> None:
    for _ in range(3):
        site.refusal(site.offer(bits=8))
    assert [(r.code, r.what) for r in site.ledger.summary().refusals] == [("site.contract_mismatch", "round")]  # type: ignore[union-attr]
    kinds = [kind for kind, _ in read_statements(site.folder / "rounds.jsonl")]
    assert kinds == ["refusal"] and list(site.round._statements.refusals) == ["site.contract_mismatch"]
    site.refusal(b"{}")
    assert len(site.ledger.summary().refusals) == 1, "noise on the line is no event"  # type: ignore[union-attr]


def test_a_refused_contract_is_recorded_in_the_sites_ledger(site: Site) -> None:
    site.ledger.close()  # type: ignore[union-attr]
    other = site.contract.model_copy(update={"run": "cd" * 16, "rule": site.contract.rule.model_copy(update={"name": "x"})})
    with pytest.raises(Refused, match=r"policy\.rule"):
        consider(other, "s0", POLICY, site.signers[0], site.folder)
    with Ledger.open(site.folder / "ledger.jsonl", site.signers[0]) as ledger:
        assert [(r.code, r.run, r.what) for r in ledger.summary().refusals] == [("policy.rule", "cd" * 16, "job")]


def test_attack_smaller_cohort_or_another_member(site: Site) -> None:
    cohort = tr.offer(site.contract, round_no=1, attempt=0, ranges=RANGES, adapter="0" * 64).cohort
    other = cohort[1].model_copy(update={"certificate": "8" * 64})
    for members in (cohort[:2], cohort[:1], (cohort[0], other, cohort[2]), cohort[::-1]):
        assert site.refusal(site.offer(cohort=members)) is SiteCode.CONTRACT


def test_attack_another_model_to_one_site(site: Site) -> None:
    """The adapter's bytes differ from the digest that all sites see."""
    changed = {k: v.copy() for k, v in site.adapter.items()}
    changed["head.bias"][0] = 1.0
    assert site.refusal(site.offer(), changed) is SiteCode.ADAPTER


def test_attack_unsynchronised_frozen_a(site: Site) -> None:
    """The coordinator gives this site another A, digest and all."""
    site.adapter = {k: v.copy() for k, v in site.adapter.items()}
    site.adapter["m.lora_A.weight"][0, 0] += 1e-3
    assert site.refusal(site.offer()) is SiteCode.ADAPTER


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"\xff", b'{"a":1,"a":2}', b'{"_target_":"os.system"}'])
@pytest.mark.case(11)
def test_malformed_offer(site: Site, body: bytes) -> None:
    assert site.refusal(body) is SiteCode.BAD_MESSAGE


@pytest.mark.parametrize("vector", [np.zeros(3, np.float32), np.zeros(SPEC.size, np.uint32),
                                    np.full(SPEC.size, np.nan, np.float32)])
@pytest.mark.case(13)
def test_malformed_adapter(site: Site, vector: Any) -> None:
    with pytest.raises(StageRefused) as caught:
        site.handlers["train.update"](site.offer(), {"adapter": vector})
    assert caught.value.code is SiteCode.ADAPTER


@pytest.mark.case(21)
def test_redelivered_offer_gets_the_stored_bytes_and_no_second_charge(site: Site) -> None:
    first = site.update(site.offer())
    assert site.update(site.offer()) == first
    assert site.trainer.rounds == 1
    assert len(site.ledger.summary().reserves) == 1  # type: ignore[union-attr]


@pytest.mark.case(21)
def test_attack_round_replayed(site: Site) -> None:
    first = site.offer(1, 0)
    site.update(first)
    site.update(site.offer(1, 1))
    assert site.refusal(first) is SiteCode.STALE_ROUND
    site.restart()
    assert site.refusal(first) is SiteCode.STALE_ROUND
    assert site.refusal(site.offer(1, 1)) is SiteCode.STALE_ROUND


@pytest.mark.case(24)
def test_restart_between_reserve_and_send_stays_spent(site: Site) -> None:
    """Killed in training: the attempt is charged, and is never begun again."""
    def die(adapter: Any, round_no: int) -> Any:
        raise KeyboardInterrupt

    site.trainer.train = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        site.update(site.offer())
    site.trainer = StubTrainer()
    site.restart()
    assert [(r.round, r.attempt) for r in site.ledger.summary().reserves] == [(1, 0)]  # type: ignore[union-attr]
    assert site.refusal(site.offer()) is SiteCode.FAILED, "the ledger refuses the same attempt"
    assert site.trainer.rounds == 0


@pytest.mark.case(25)
def test_a_journal_that_can_not_be_written_costs_no_budget(site: Site) -> None:
    """What is trained then could never be sent."""
    site.journal.close()
    assert site.refusal(site.offer()) is SiteCode.FAILED
    assert (site.trainer.rounds, site.ledger.summary().reserves) == (0, ())  # type: ignore[union-attr]
    site.restart()
    site.update(site.offer())


def test_a_step_that_runs_out_of_memory_stays_spent(site: Site) -> None:
    """The coordinator hears a code; the mend stays at the site; the next attempt is another charge."""
    def over(adapter: Any, round_no: int) -> Any:
        raise Refused("dp.memory", "A step doesn't fit.", "Set site.physical_batch=16.")

    site.trainer.train = over  # type: ignore[method-assign]
    with pytest.raises(StageRefused) as caught:
        site.update(site.offer())
    assert caught.value.code is SiteCode.FAILED and "physical_batch" not in str(caught.value)
    site.trainer = StubTrainer()
    site.restart()
    site.update(site.offer(1, 1))
    assert [(r.round, r.attempt) for r in site.ledger.summary().reserves] == [(1, 0), (1, 1)]  # type: ignore[union-attr]


@pytest.mark.parametrize("trust_none", [False, True])
def test_attack_more_attempts_than_the_contract_has(tmp_path: Path, trust_none: bool) -> None:
    site = Site(tmp_path, trust_none=trust_none, rounds=2, retries=1)
    for slot in ((1, 0), (1, 1), (2, 0)):
        site.update(site.offer(*slot))
    site.restart()
    assert site.refusal(site.offer(2, 1)) is SiteCode.BUDGET
    assert site.trainer.rounds == 3


def test_stages_out_of_order(site: Site) -> None:
    for stage in ("shares", "masked", "unmask"):
        with pytest.raises(StageRefused) as caught:
            site.handlers[f"train.{stage}"](b"{}", {})
        assert caught.value.code is SiteCode.STALE_ROUND


def test_abort_drops_the_update_and_the_session(site: Site) -> None:
    site.update(site.offer())
    with pytest.raises(StageRefused) as caught:
        site.handlers["train.shares"](b"{}", {})
    assert caught.value.code is SiteCode.SECAGG
    with pytest.raises(StageRefused) as caught:
        site.handlers["train.shares"](b"{}", {})
    assert caught.value.code is SiteCode.STALE_ROUND
    assert site.round._encoded.size == 0


def test_closing_says_the_same_however_often_it_is_asked(site: Site) -> None:
    site.update(site.offer())
    ask = stages.dump(stages.Ask(contract=site.contract.digest))
    first = site.handlers["query.closing"](ask, {})[0]
    site.restart()
    again = json.loads(site.handlers["query.closing"](ask, {})[0])
    assert again["ledger"] == json.loads(first)["ledger"]
    summary = check_extract(again["ledger"].encode(), site.signers[0].certificate)
    assert len(summary.closes) == 1
    assert site.refusal(site.offer(2)) is SiteCode.FAILED, "a closed run charges nothing more"


def test_asked_about_another_contract(site: Site) -> None:
    for stage in ("accept", "closing"):
        with pytest.raises(StageRefused) as caught:
            site.handlers[f"query.{stage}"](stages.dump(stages.Ask(contract="9" * 64)), {})
        assert caught.value.code is SiteCode.CONTRACT


def test_a_private_contract_needs_a_ledger(site: Site) -> None:
    site.ledger = None
    with pytest.raises(Refused, match=r"ledger\.missing"):
        site._handlers()


def _weights(contract: Contract, *weights: float) -> Contract:
    sites = tuple(s.model_copy(update={"weight": w}) for s, w in zip(contract.sites, weights, strict=True))
    return contract.model_copy(update={"sites": sites})


@pytest.mark.case(17)
def test_attack_weights_that_unmask_one_site(site: Site) -> None:
    with pytest.raises(Refused, match=r"policy\.weights"):
        accept(_weights(site.contract, 1.0, 1e-9, 1e-9), "s0", POLICY)
    with pytest.raises(Refused, match=r"policy\.weights"):
        accept(_weights(site.contract, 1.0, 0.099, 1.0), "s0", POLICY)


def test_attack_contract_whose_noise_does_not_keep_its_epsilon(site: Site) -> None:
    with pytest.raises(Refused, match=r"contract\.epsilon"):
        accept(site.contract.model_copy(update={"privacy": site.contract.privacy.model_copy(update={"epsilon": 0.1})}),
               "s0", POLICY)


def _through_m5(sites: list[SiteRound], adapter: Any, round_no: int, attempt: int) -> None:
    """The honest coordinator's part until every site's masked vector has left."""
    made = tr.offer(sites[0].contract, round_no=round_no, attempt=attempt, ranges=RANGES,
                    adapter=adapter_digest(adapter))
    c = CoordinatorSession(made, sites[0]._check_certificate)
    for u, s in enumerate(sites):
        c.take_m1(u, s.handlers()["train.update"](dump(made), {"adapter": SPEC.pack(adapter)})[0])
    m2 = c.m2()
    for u, s in enumerate(sites):
        c.take_m3(u, s.handlers()["train.shares"](m2, {})[0])
    m4 = c.m4()
    for u, s in enumerate(sites):
        s.handlers()["train.masked"](m4[u], {})


def _sites(folder: Path, first: Site) -> list[SiteRound]:
    """All three sites of the contract; the first one is `first`."""
    out = [first.round]
    for i in (1, 2):
        (folder / f"state{i}").mkdir()
        ledger = open_ledger(first.contract, f"s{i}", POLICY, first.signers[i], folder / f"state{i}")
        out.append(SiteRound(first.contract, f"s{i}", trainer=StubTrainer(), policy=POLICY, signer=first.signers[i],
                             check_certificate=first.round._check_certificate,
                             journal=SiteJournal(folder / f"state{i}" / "rounds.jsonl"), ledger=ledger,
                             approval=approval_of(first.contract, f"s{i}"),
                             witness=Witness(folder / f"state{i}", f"s{i}", first.signers[i], no_coordinator)))
    return out


@pytest.mark.parametrize("trust_none", [False, True])
def test_attack_retry_of_the_same_update(tmp_path: Path, trust_none: bool) -> None:
    """The masked vectors have left, and the coordinator voids the attempt: without noise another sum of the same updates
    would give one away, so no site trains from that adapter again; with noise a retry is a fresh, charged update."""
    site = Site(tmp_path, trust_none=trust_none)
    _through_m5(_sites(tmp_path, site), site.adapter, 1, 0)
    if trust_none:
        assert site.refusal(site.offer(1, 1)) is SiteCode.BUDGET
        site.restart()
        assert site.refusal(site.offer(1, 1)) is SiteCode.BUDGET
        site.adapter = SPEC.add(site.adapter, np.ones(SPEC.dim, np.float32))
        site.update(site.offer(2, 0))
    else:
        site.update(site.offer(1, 1))
        assert len(site.ledger.summary().reserves) == 2  # type: ignore[union-attr]


def test_void_before_the_masked_vector_left_may_be_tried_again_without_noise(tmp_path: Path) -> None:
    site = Site(tmp_path, trust_none=True)
    site.update(site.offer(1, 0))
    site.update(site.offer(1, 1))
    assert site.trainer.rounds == 2


def test_a_session_left_lying_is_dropped_with_its_secrets(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import fl_client.round as module

    site.update(site.offer())
    session = site.round._session
    assert isinstance(session, SiteSession) and session._secrets is not None
    site.round.expire()
    assert session._secrets is not None, "not yet"
    monkeypatch.setattr(module, "SESSION_S", -1.0)
    site.round.expire()
    assert session._secrets is None and site.round._session is None and site.round._encoded.size == 0
    with pytest.raises(StageRefused) as caught:
        site.handlers["train.shares"](b"{}", {})
    assert caught.value.code is SiteCode.STALE_ROUND


def test_a_new_offer_drops_the_session_before(site: Site) -> None:
    site.update(site.offer(1, 0))
    before = site.round._session
    assert isinstance(before, SiteSession)
    site.update(site.offer(1, 1))
    assert before._secrets is None


def test_training_does_not_count_towards_a_sessions_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import fl_client.round as module

    clock, train = [0.0], site.trainer.train
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def slow(adapter: Any, round_no: int) -> Any:
        clock[0] += module.SESSION_S + 1
        return train(adapter, round_no)

    site.trainer.train = slow  # type: ignore[method-assign]
    site.update(site.offer())
    site.round.expire()
    assert site.round._session is not None
    clock[0] += module.SESSION_S + 1
    site.round.expire()
    assert site.round._session is None
