"""From configuration to contract: what must be refused before a model is loaded or a site is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conf import load_settings
from fl_server.contracting import make_contract
from privacy.accountant import Release, epsilon
from privacy.contract import Contract, load_contract
from privacy.errors import ConsiloError

SIGNERS = {n: c * 64 for n, c in (("a", "a"), ("b", "b"), ("c", "c"), ("d", "d"))}
Make = Callable[..., Contract]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Overrides -> contract, on a folder that looks like a model (nothing of it is loaded)."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def run(*overrides: str) -> Contract:
        given = {o.split("=")[0] for o in overrides}
        base = [f"model.path={tmp_path}", "model=local", "model.name=x", "data=files", "data.name=x", "data.labels=[p,q]",
                "data.sites={a:{n_decl:1000},b:{n_decl:700},c:{n_decl:500}}"]
        return make_contract(load_settings([b for b in base if b.split("=")[0] not in given] + list(overrides)), SIGNERS)

    return run


def test_sigma_is_calibrated_over_rounds_and_retries(make: Make) -> None:
    contract = make("privacy.epsilon=3", "privacy.rounds=10", "privacy.retries=2")
    for site in contract.sites:
        assert site.delta == 1e-5
        spent = epsilon([Release(0.5, site.sigma, 12)], site.delta)
        assert 2.95 < spent <= 3.0
    assert load_contract(contract.to_bytes()) == contract


@pytest.mark.parametrize(("override", "code"), [
    ("privacy.epsilon=0", "config.invalid"), ("privacy.epsilon=-1", "config.invalid"),
    ("privacy.epsilon=null", "config.invalid"),
    ("privacy.delta=0.5", "dp.parameter"), ("privacy.delta=0.001", "dp.parameter"), ("privacy.sigma=0", "config.invalid"),
    ("privacy.clip=nan", "config.invalid"), ("privacy.clip=0", "config.invalid"), ("privacy.q=0", "config.invalid"),
    ("privacy.q=1.5", "config.invalid"), ("privacy.sampler=shuffle", "dp.unsupported"),
    ("privacy.adjacency=replace_one", "dp.unsupported"), ("privacy.unit=household", "dp.unsupported"),
    ("data.sites={}", "contract.no_sites"), ("data.sites={a:{n_decl:9}}", "secagg.cohort"),
    ("data.sites={a:{n_decl:9},b:{n_decl:9}}", "secagg.cohort"),
    ("data.sites={a:{n_decl:9},b:{n_decl:9},z:{n_decl:9}}", "contract.no_certificate"),
    ("data.sites={a:{n_decl:9},b:{n_decl:9},c:{weight:1}}", "contract.n_decl"),
    ("rule.name=krum", "rule.not_linear"), ("rule.optimizer=adamw", "optimizer.unknown"),
    ("secure_aggregation.bits=31", "encoding.overflow"), ("secure_aggregation.threshold=2", "secagg.threshold"),
    ("secure_aggregation.threshold=4", "secagg.threshold"), ("secure_aggregation.colluding=2", "secagg.cohort")])
@pytest.mark.case(2)
def test_refused_with_its_code(make: Make, override: str, code: str) -> None:
    with pytest.raises(ConsiloError) as caught:
        make(override)
    assert caught.value.code == code


@pytest.mark.parametrize("override", [
    "privacy.schedule=[{rounds:5,q:0.25,noise:1.5},{rounds:15,q:0.5,noise:1.0}]",
    "privacy.unit=person privacy.sampled=person privacy.draws=4",
    "privacy.unit=person privacy.sampled=record privacy.k_max=4"])
def test_schedules_and_persons_keep_their_epsilon_wherever_the_retries_fall(make: Make, override: str) -> None:
    contract = make("privacy.retries=3", *override.split())
    for site in contract.sites:
        plans = [[Release(m.q, m.sigma, m.steps * rounds, m.group) for m, rounds in plan]
                 for plan in contract.plans(site.name)]
        spent = max(epsilon(plan, site.delta) for plan in plans)
        assert 7.9 < spent <= 8.0


@pytest.mark.parametrize("override", [
    "privacy.schedule=[{rounds:5,q:0.25}]", "privacy.unit=person",
    "privacy.unit=person privacy.sampled=person privacy.k_max=4", "privacy.sampled=person", "privacy.draws=3"])
def test_impossible_units_and_schedules_are_refused(make: Make, override: str) -> None:
    with pytest.raises(ConsiloError) as caught:
        make(*override.split())
    assert caught.value.code in ("config.invalid", "dp.parameter")
