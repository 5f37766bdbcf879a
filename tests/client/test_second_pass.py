"""The second sum of an attempt at the site: the same update, the same sites, the same basis for all, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_round import POLICY, Site, approval_of, no_coordinator

from fl_client.agent import open_ledger
from fl_client.app import StageRefused
from fl_client.journal import SiteJournal
from fl_client.round import SiteRound
from fl_client.witness import Witness
from privacy.contract import load_contract
from privacy.errors import SiteCode
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.messages import M1, M2, dump, load
from privacy.stages import Masked
from strategies.adapter import AdapterSpec, adapter_digest, initial
from strategies.base import A, B, Round, adapter_spec, flatten, segments, setup, unflatten
from strategies.rules import RULES

EXACT = RULES["exact"]
SPEC = adapter_spec(EXACT, (("m" + A, (2, 32)), ("m" + B, (32, 2)), ("head.weight", (3, 32))))
STAGES = ("train.shares", "train.masked", "train.vote", "train.unmask")


class Drawn:
    """Another update each time; counts them."""

    spec: AdapterSpec = SPEC

    def __init__(self, seed: int) -> None:
        self.rng, self.rounds = np.random.default_rng(seed), 0

    def train(self, adapter: Any, round_no: int) -> Any:
        self.rounds += 1
        return self.rng.normal(0, 0.1, SPEC.dim).astype(np.float32)


class Three:
    """Three sites and an honest coordinator, stage by stage."""

    def __init__(self, folder: Path) -> None:
        first = Site(folder)
        self.contract = load_contract(first.contract.model_copy(update={
            "run": "cd" * 16, "rule": first.contract.rule.model_copy(update={"name": "exact"}),
            "lora": first.contract.lora.model_copy(update={"r": 2})}).to_bytes())
        self.check = first.round._check_certificate
        self.sites, self.trainers = list[SiteRound](), [Drawn(i) for i in range(3)]
        for i in range(3):
            own = folder / f"again{i}"
            own.mkdir()
            self.sites.append(SiteRound(
                self.contract, f"s{i}", trainer=self.trainers[i], policy=POLICY, signer=first.signers[i],
                check_certificate=self.check, journal=SiteJournal(own / "rounds.jsonl"),
                ledger=open_ledger(self.contract, f"s{i}", POLICY, first.signers[i], own),
                approval=approval_of(self.contract, f"s{i}"),
                witness=Witness(own, f"s{i}", first.signers[i], no_coordinator)))
        self.setup = setup(EXACT, self.contract, SPEC)
        self.round = Round(self.setup, 1, initial(SPEC, self.contract.lora.seed))

    def offer(self, second: tr.Second | None = None) -> tr.Offer:
        plan = EXACT.plan(self.round, 2 if second else 1)
        return tr.offer(self.contract, round_no=1, attempt=0, ranges=segments(plan),
                        adapter=adapter_digest(self.round.old), second=second)

    def ask(self, u: int, stage: str, body: bytes, **arrays: Any) -> bytes:
        return bytes(self.sites[u].handlers()[stage](body, arrays)[0])

    def sum(self, offer: tr.Offer, stage: str, until: str = "", **arrays: Any) -> tuple[CoordinatorSession, Any]:
        """The coordinator, and the mean by name; ends before the stage `until`."""
        c = CoordinatorSession(offer, self.check)
        for u in range(3):
            c.take_m1(u, self.ask(u, stage, dump(offer), **arrays))
        m2 = c.m2()
        for u in range(3):
            c.take_m3(u, self.ask(u, "train.shares", m2))
        for u, m4 in c.m4().items():
            reply, given = self.sites[u].handlers()["train.masked"](m4, {})
            c.take_m5(u, Masked.model_validate_json(reply).m5.encode(), given["y"])
        m6 = c.m6()
        for u in range(3):
            c.take_m7(u, self.ask(u, "train.vote", m6))
        if until == "train.unmask":
            return c, None
        m8 = c.m8()
        for u in range(3):
            c.take_m9(u, self.ask(u, "train.unmask", m8))
        plan = EXACT.plan(self.round, offer.pass_no)
        return c, unflatten(offer.encoding.decode_mean(c.unmask(), [1.0] * 3), plan)

    def first(self) -> tuple[CoordinatorSession, Any, Any]:
        """After the first sum: its session, its means and the basis as it travels."""
        c, means = self.sum(self.offer(), "train.update", adapter=SPEC.pack(self.round.old))
        shared = EXACT.between(self.round, means)
        return c, means, shared

    def second(self, c: CoordinatorSession, shared: Any, **changes: Any) -> tr.Second:
        return tr.Second(**{"sites": ("s0", "s1", "s2"), "after": c.transcript.hex(),
                            "shared": adapter_digest(shared)} | changes)

    def refusal(self, u: int, offer: tr.Offer, shared: Any) -> SiteCode:
        with pytest.raises(StageRefused) as caught:
            self.ask(u, "train.again", dump(offer), shared=flatten(shared, EXACT.shares(self.setup)))
        assert self.trainers[u].rounds == 1
        return caught.value.code


@pytest.fixture
def three(tmp_path: Path) -> Three:
    return Three(tmp_path)


def test_two_sums_of_one_update_and_one_charge(three: Three) -> None:
    c, means, shared = three.first()
    vector = flatten(shared, EXACT.shares(three.setup))
    _, more = three.sum(three.offer(three.second(c, shared)), "train.again", shared=vector)
    change = EXACT.change(three.round, means | more)
    old = three.round.old
    news = [SPEC.add(old, np.random.default_rng(i).normal(0, 0.1, SPEC.dim).astype(np.float32)) for i in range(3)]
    want = np.mean([n["m" + B].astype(float) @ n["m" + A] - old["m" + B].astype(float) @ old["m" + A] for n in news], 0)
    assert np.linalg.norm(change["m.product"] - want) < 1e-3 * np.linalg.norm(want)
    assert [t.rounds for t in three.trainers] == [1] * 3
    ledger = three.sites[0]._ledger
    assert ledger is not None and [(r.round, r.attempt) for r in ledger.summary().reserves] == [(1, 0)]
    assert three.sites[0]._journal.last(three.contract.run) == (1, 0, 2)
    assert three.sites[0]._new == {} and three.sites[0]._summed is None


def test_attack_second_sum_over_fewer_sites(three: Three) -> None:
    c, _, shared = three.first()
    offer = three.offer(three.second(c, shared, sites=("s0", "s1")))
    assert three.refusal(0, offer, shared) is SiteCode.CONTRACT
    fewer = three.offer(three.second(c, shared)).model_copy(update={"survivors": 2})
    assert three.refusal(0, fewer, shared) is SiteCode.CONTRACT


def test_attack_second_sum_after_another_first_one(three: Three) -> None:
    c, _, shared = three.first()
    assert three.refusal(0, three.offer(three.second(c, shared, after="00" * 32)), shared) is SiteCode.CONTRACT


def test_attack_basis_that_is_not_the_announced_one(three: Three) -> None:
    c, _, shared = three.first()
    zero = {name: np.zeros_like(value) for name, value in shared.items()}
    assert three.refusal(0, three.offer(three.second(c, shared)), zero) is SiteCode.CONTRACT


def test_attack_basis_longer_than_one(three: Three) -> None:
    """It would carry a coordinate beyond the limit on the norm, so that the range cuts it off."""
    c, _, shared = three.first()
    long = {name: 3 * value for name, value in shared.items()}
    assert three.refusal(0, three.offer(three.second(c, long)), long) is SiteCode.BAD_MESSAGE


@pytest.mark.case(21)
def test_attack_third_sum_of_one_update(three: Three) -> None:
    c, _, shared = three.first()
    offer, vector = three.offer(three.second(c, shared)), flatten(shared, EXACT.shares(three.setup))
    three.sum(offer, "train.again", shared=vector)
    turned = {name: -value for name, value in shared.items()}
    assert three.refusal(0, three.offer(three.second(c, turned)), turned) is SiteCode.STALE_ROUND


def test_attack_second_sum_before_the_first_is_known(three: Three) -> None:
    c, _ = three.sum(three.offer(), "train.update", until="train.unmask", adapter=SPEC.pack(three.round.old))
    shared = {n: np.zeros(shape, np.float32) for n, shape in EXACT.shares(three.setup)}
    assert three.refusal(0, three.offer(three.second(c, shared)), shared) is SiteCode.STALE_ROUND


def test_a_site_that_restarted_between_the_sums_is_out_of_the_attempt(three: Three) -> None:
    c, _, shared = three.first()
    three.sites[0]._drop_round()
    assert three.refusal(0, three.offer(three.second(c, shared)), shared) is SiteCode.STALE_ROUND
    with pytest.raises(StageRefused):
        three.ask(0, "train.update", dump(three.offer()), adapter=SPEC.pack(three.round.old))
    assert three.trainers[0].rounds == 1


def test_sites_that_were_given_another_basis_share_no_keys(three: Three) -> None:
    """Each is consistent with itself: the offers differ in `shared`, so ctx does, and M2 ends the session."""
    c, _, shared = three.first()
    order, sessions = EXACT.shares(three.setup), []
    for u, given in enumerate((shared, {n: 0 * v for n, v in shared.items()}, {n: 0 * v for n, v in shared.items()})):
        offer = three.offer(three.second(c, given))
        sessions.append(three.ask(u, "train.again", dump(offer), shared=flatten(given, order)))
    m2 = dump(M2(keys=tuple(load(M1, data) for data in sessions)))
    for u in range(3):
        with pytest.raises(StageRefused) as caught:
            three.ask(u, "train.shares", m2)
        assert caught.value.code is SiteCode.SECAGG
