"""One session of real processes over mutual TLS: all linear rules in turn on agents that stay warm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fl_client.training import LocalTrainer
from fl_server.attempt import Deadlines, Done
from fl_server.exchange import Exchange
from fl_server.fleet import FleetServer
from fl_server.round import RoundDriver
from privacy import ca
from privacy.contract import Contract
from privacy.identity import Role, create_request
from privacy.secagg.encoding import Encoding as FixedPoint
from privacy.secagg.peers import certificate_check
from privacy.trust import TrustStore
from strategies.adapter import initial
from strategies.base import Round, after_training, segments
from strategies.federate import federate
from strategies.merge import effective
from strategies.optimizers import stepped
from strategies.rules import RULES

HUB, NAMES = "hub", ("site-a", "site-b", "site-c")
RULES_IN_TURN = ("ffa", "fedit", "rolora", "exact", "fedsb", "hetero")
AMPLIFIED = {"hetero": 4.0, "exact": 60.0}
ROUNDS = 2


@pytest.fixture
def roster(tmp_path: Path) -> dict[str, ca.RosterEntry]:
    trust = tmp_path / "ca"
    ca.init(trust, "Test consortium", days=1)
    for name in (*NAMES, HUB):
        request = create_request(tmp_path / "keys" / name, name, f"Organisation of {name}")
        hub = name == HUB
        ca.issue(trust, request, Role.COORDINATOR if hub else Role.SITE, days=1, hosts=["localhost"] if hub else [])
    return {e.name: e for e in ca.verify_roster(ca.roster(trust), TrustStore.load(trust))}


def contracts(make: Callable[..., Contract], roster: dict[str, ca.RosterEntry], folder: Path) -> dict[str, Contract]:
    """By rule, and `noise-off-` the same without noise, where each site trains on all of its records."""
    out = {}
    for i, rule in enumerate(RULES_IN_TURN):
        for off in (False, True):
            privacy = {"trust": "none", "epsilon": None, "q": 1.0} if off else {"epsilon": 8.0}
            ranks = [{"site": "site-b", "r": 1}] if RULES[rule].ranked else []
            made = make(run=f"{2 * i + off:032x}", lora={"seed": 2 * i + off}, privacy={"rounds": ROUNDS, **privacy},
                        site={"sigma": 0.0 if off else 4.0}, rule={"name": rule, "ranks": ranks, "server_lr": 1.0})
            signers = [s.model_copy(update={"signer": roster[s.name].sign_fingerprint}) for s in made.sites]
            out[f"noise-off-{rule}" if off else rule] = made.model_copy(update={"sites": tuple(signers)})
    (folder / "contracts").mkdir()
    for name, contract in out.items():
        (folder / "contracts" / f"{name}.json").write_bytes(contract.to_bytes())
    return out


@contextmanager
def agents(folder: Path, port: int, model: Path, data: dict[str, Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = []
    try:
        for name in NAMES:
            what = json.dumps([str(folder), name, port, str(model), str(data[name])])
            with (folder / f"{name}.log").open("wb") as log:
                processes.append(subprocess.Popen([sys.executable, str(Path(__file__).with_name("rules_site.py")), what],
                                                  stdin=subprocess.PIPE, stdout=log, stderr=log))
        yield processes
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def play(driver: RoundDriver) -> list[tuple[Any, Done]]:
    """(old adapter, result) of each round."""
    by, contract = RULES[driver.contract.rule.name], driver.contract
    adapter, state, out = initial(driver.spec, contract.lora.seed), dict[str, Any](), []
    for no in range(1, ROUNDS + 1):
        done = driver.attempt(no, 0, adapter)
        change, state = stepped(contract.rule, done.change, state)
        out.append((adapter, done))
        adapter = by.apply(Round(driver.setup, no, adapter), change)
    return out


def test_all_linear_rules_in_turn_on_warm_agents(roster: dict[str, ca.RosterEntry], tmp_path: Path, tiny_model: Path,
                                                 tiny_data: dict[str, Path], tiny_contract: Callable[..., Contract]) -> None:
    made, issued, trust = contracts(tiny_contract, roster, tmp_path), tmp_path / "ca" / "issued" / HUB, tmp_path / "ca"
    with FleetServer(host="127.0.0.1", port=0, certificate=issued / "tls.pem", key=tmp_path / "keys" / HUB / "tls.key",
                     trusted=[trust / "issuing-site.pem"], crl=trust / "crl-site.pem",
                     roster={n: roster[n].tls.public_bytes(Encoding.PEM) for n in NAMES}) as fleet, \
            agents(tmp_path, fleet.port, tiny_model, tiny_data) as processes:
        exchange = Exchange(fleet.grid, fleet.nodes)
        assert set(exchange.wait_online(NAMES, 120.0, 3)) == set(NAMES)
        for name, contract in made.items():
            by = RULES[contract.rule.name]
            trainers = [LocalTrainer(contract, site, model=tiny_model, data=tiny_data[site], text="text", label="label")
                        for site in NAMES] if name.startswith("noise-off") else []
            spec = trainers[0].spec if trainers else spec_of(contract, tiny_model)
            driver = RoundDriver(contract, spec, exchange, deadlines=Deadlines(60.0, 30.0),
                                 check_certificate=certificate_check(TrustStore.load(trust)),
                                 certificates={n: roster[n].sign for n in NAMES})
            for no, (old, done) in enumerate(play(driver), 1):
                assert (done.sites, len(done.sums), driver.lost) == (NAMES, driver._rule.passes(driver.setup), [])
                if trainers:
                    round_ = Round(driver.setup, no, old)
                    news = [after_training(by, round_, rank, trainer.train(old, no))
                            for rank, trainer in zip(driver.setup.ranks, trainers, strict=True)]
                    want = effective(federate(by, driver.setup, no, old, news, [1.0] * 3).adapter)
                    plain, got = effective(old), effective(by.apply(round_, done.change))
                    terms = FixedPoint(bits=contract.secagg.bits, ring=32, cohort=3, ranges=segments(by.plan(round_, 1)))
                    bound = AMPLIFIED.get(by.name, 1.0) * max(terms.error_bound([1.0] * 3))
                    for part, value in want.items():
                        slack = 3e-6 * max(1.0, float(np.abs(value).max()))
                        assert np.abs(got[part] - value).max() <= bound + slack, (name, no, part)
                    assert max(np.abs(want[part] - plain[part]).max() for part in want) > 1e-2, "something moved"
        assert [p.poll() for p in processes] == [None] * 3, "the agents stayed"
    for site in NAMES:
        for name in RULES_IN_TURN:
            lines = (tmp_path / "state" / site / name / "ledger.jsonl").read_text().splitlines()
            assert sum('"kind":"commit"' in line for line in lines) == ROUNDS, (site, name)


def spec_of(contract: Contract, model: Path) -> Any:
    from strategies.model import build

    return build(model, contract).spec(RULES[contract.rule.name].trains)
