"""What a site accepts: each limit refuses under its own code, and the limit itself passes. Parsing of contracts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fl_client.policy import SitePolicy, accept, load_policy
from privacy.accountant import Release, epsilon, round_up
from privacy.canonical import canonical
from privacy.contract import Contract, load_contract
from privacy.errors import ConsiloError, Refused, UsageError

Make = Callable[..., Contract]
Change = dict[str, Any]
STRICT: Change = {"approver": "data office", "max_epsilon": 8.0, "max_delta": 1e-5, "min_sigma": 1.0, "min_cohort": 3}
NONE: Change = {"trust": "none", "epsilon": None}


def policy(**changes: Any) -> SitePolicy:
    return SitePolicy.model_validate(STRICT | changes)


def code(contract: Contract, **changes: Any) -> str:
    try:
        accept(contract, "site-a", policy(**changes))
    except ConsiloError as e:
        return e.code
    return "accepted"


def weights(make: Make, *values: float) -> Contract:
    document = json.loads(make().to_bytes())
    for site, weight in zip(document["sites"], values, strict=True):
        site["weight"] = weight
    return load_contract(canonical(document))


@pytest.mark.parametrize(("limit", "contract", "refusal"), [
    ({"max_epsilon": 8.0}, {"privacy": {"epsilon": 8.0}}, {"privacy": {"epsilon": 8.001}}),
    ({"max_delta": 1e-5}, {"site": {"delta": 1e-5}}, {"site": {"delta": 1.01e-5}}),
    ({"min_sigma": 1.0}, {"site": {"sigma": 1.0}}, {"site": {"sigma": 0.99}}),
    ({"rules": ["ffa"]}, {"rule": {"name": "ffa"}}, {"rule": {"name": "fedit"}}),
    ({"reveal_update": False}, {"secagg": {"enabled": True}}, {"secagg": {"enabled": False}}),
    ({"allow_non_private": False}, {}, {"privacy": NONE, "site": {"sigma": 0.0}}),
    ({"units": ["record"]}, {"privacy": {"unit": "record"}}, {"privacy": {"unit": "person", "sampled": "person"}}),
], ids=["epsilon", "delta", "sigma", "rule", "reveal_update", "non_private", "unit"])
@pytest.mark.case(35)
def test_each_limit_refuses_under_its_own_code(request: pytest.FixtureRequest, tiny_contract: Make, limit: Change,
                                               contract: Change, refusal: Change) -> None:
    assert code(tiny_contract(**contract), **limit) == "accepted"
    name = request.node.callspec.id
    assert code(tiny_contract(**refusal), **limit) == f"policy.{name}"


def test_refusal_names_the_key_that_only_the_site_changes(tiny_contract: Make) -> None:
    for refused, key in (({"privacy": {"epsilon": 9.0}}, "max_epsilon"), ({"site": {"sigma": 0.9}}, "min_sigma"),
                         ({"secagg": {"enabled": False}}, "reveal_update")):
        with pytest.raises(Refused, match=key) as caught:
            accept(tiny_contract(**refused), "site-a", policy())
        assert caught.value.exit_code == 3


@pytest.mark.case(16)
def test_cohort_limits(tiny_contract: Make) -> None:
    four = tiny_contract(sites=("site-a", "site-b", "site-c", "site-d"))
    assert code(tiny_contract(), min_cohort=3) == "accepted"
    assert code(tiny_contract(), min_cohort=4) == "policy.cohort"
    assert code(four, min_cohort=4) == "policy.cohort", "sums of three sites"
    sums_of_four = tiny_contract(sites=("site-a", "site-b", "site-c", "site-d"), secagg={"survivors": 4})
    assert code(sums_of_four, min_cohort=4) == "accepted"
    assert code(tiny_contract(), colluding=2) == "secagg.cohort"
    assert code(four, colluding=2) == "secagg.threshold"
    assert code(tiny_contract(secagg={"threshold": 2})) == "secagg.threshold"
    assert code(tiny_contract(secagg={"survivors": 2}), min_cohort=2) == "secagg.survivors"
    assert code(tiny_contract(secagg={"survivors": 4})) == "secagg.survivors", "more than there are"
    assert code(tiny_contract(secagg={"bits": 31})) == "encoding.overflow"
    assert code(tiny_contract(secagg={"ring": 16, "bits": 14})) == "accepted"
    assert code(tiny_contract(secagg={"ring": 16})) == "encoding.overflow"
    assert code(tiny_contract(sites=("site-a",), secagg={"threshold": 2}), min_cohort=1) == "secagg.cohort"


def test_weights_that_leave_a_site_alone_in_the_sum(tiny_contract: Make) -> None:
    assert code(weights(tiny_contract, 1.0, 0.1, 0.1), min_weight_ratio=0.1) == "accepted"
    assert code(weights(tiny_contract, 1.0, 0.1, 0.0999), min_weight_ratio=0.1) == "policy.weights"


@pytest.mark.case(6)
def test_floor_is_decided_on_the_declared_size(tiny_contract: Make) -> None:
    assert code(tiny_contract(data={"floor": 70})) == "accepted"
    assert code(tiny_contract(data={"floor": 71})) == "data.floor"


def test_contract_whose_noise_does_not_keep_its_epsilon(tiny_contract: Make) -> None:
    """Rounds and retries, all local steps: boundary at the accountant's own figure."""
    true = round_up(epsilon([Release(0.5, 1.0, (2 + 1) * 2)], 1e-5))
    assert code(tiny_contract(privacy={"epsilon": true, "local_steps": 2}), max_epsilon=20.0) == "accepted"
    assert code(tiny_contract(privacy={"epsilon": true - 1e-3, "local_steps": 2}), max_epsilon=20.0) == "contract.epsilon"


def test_non_private_needs_leave(tiny_contract: Make) -> None:
    contract = tiny_contract(privacy=NONE, site={"sigma": 0.0})
    assert code(contract, allow_non_private=True) == "accepted"


@pytest.mark.parametrize("change", [{"privacy": {"sampler": "shuffle"}}, {"privacy": {"adjacency": "replace_one"}}])
@pytest.mark.case(4)
def test_what_the_accountant_does_not_know_is_not_accepted(tiny_contract: Make, change: Change) -> None:
    """A sampler that isn't Poisson, under an accountant that assumes it."""
    assert code(tiny_contract(**change)) == "dp.unsupported"


@pytest.mark.parametrize("change", [{"site": {"delta": 0.02}}, {"site": {"sigma": 0.0}}])
def test_impossible_mechanism_is_not_accepted_even_by_a_lax_policy(tiny_contract: Make, change: Change) -> None:
    lax = {"max_epsilon": 1e9, "max_delta": 0.5, "min_sigma": 0.0}
    assert code(tiny_contract(privacy={"epsilon": 1e9}, **change), **lax) in ("dp.parameter", "contract.epsilon")


def test_contract_without_this_site(tiny_contract: Make) -> None:
    with pytest.raises(UsageError, match="'site-b'") as caught:
        accept(tiny_contract(sites=("site-b", "site-c", "site-d")), "site-bb", policy())
    assert caught.value.code == "contract.no_such_site"


# Parsing


def test_contract_round_trip(tiny_contract: Make) -> None:
    contract = tiny_contract()
    assert load_contract(contract.to_bytes()) == contract
    assert load_contract(contract.to_bytes()).digest == contract.digest


@pytest.mark.parametrize(("path", "typo", "nearest"), [
    ((), "purpos", "purpose"), (("privacy",), "epsilom", "epsilon"), (("model",), "poolling", "pooling"),
    (("secagg",), "treshold", "threshold"), (("sites", 1), "n_dcl", "n_decl"), (("lora",), "layer", "layers")])
@pytest.mark.case(1)
def test_unknown_key_suggests_the_nearest(tiny_contract: Make, path: tuple[Any, ...], typo: str, nearest: str) -> None:
    document = json.loads(tiny_contract().to_bytes())
    section = document
    for part in path:
        section = section[part]
    section[typo] = 1
    with pytest.raises(UsageError, match=f"Did you mean '{nearest}'") as caught:
        load_contract(canonical(document))
    assert caught.value.code == "config.unknown_key"
    assert ".".join([*map(str, path), typo]) in caught.value.cause


@pytest.mark.parametrize("change", [
    {"run": "0" * 31}, {"run": "../../../../../../etc/passwd0000"}, {"privacy": {"q": 0.0}}, {"privacy": {"q": 1.5}},
    {"privacy": {"clip": 0}}, {"privacy": {"epsilon": -1}}, {"privacy": {"epsilon": None}}, {"privacy": {"rounds": 0}},
    {"privacy": NONE | {"epsilon": 8.0}}, {"site": {"delta": 0}}, {"site": {"delta": 1}}, {"site": {"sigma": -1}},
    {"site": {"n_decl": 0}}, {"site": {"weight": 1.5}}, {"site": {"weight": 0}}, {"data": {"labels": ["one"]}},
    {"site": {"signer": "0" * 64}}, {"sites": ("site-a", "site-a")}, {"sites": ("../site",)}, {"sites": ()},
    {"model": {"pooling": "max"}}, {"secagg": {"suite": "none"}}, {"secagg": {"bits": 32}},
    {"schema_version": "consilo.contract/1"}, {"expires": "soon"}, {"expires": "2026-13-01T00:00:00Z"}, {"code": ""},
    {"data": {"fields": ["text", "label", "person"]}}, {"data": {"fields": ["path"]}}])
def test_contract_that_cannot_be_right_is_refused(tiny_contract: Make, change: Change) -> None:
    with pytest.raises(UsageError) as caught:
        tiny_contract(**change)
    assert caught.value.code == "config.invalid"


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"a": NaN}', "[" * 100 + "]" * 100, "{", ""])
def test_contract_that_is_no_strict_json(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_contract(text.encode())
    assert caught.value.code == "json.invalid"


# The policy's file


def test_example_policy_loads_and_is_strict() -> None:
    example = load_policy(Path(__file__).parents[2] / "docs" / "policy-example.yaml")
    default = SitePolicy(approver=example.approver)
    assert example == default


@pytest.mark.parametrize(("text", "want"), [
    ("approver: a\nmax_epsilom: 3\n", "config.unknown_key"), ("approver: a\nmax_epsilon: .nan\n", "config.invalid"),
    ("approver: a\nmax_epsilon: 0\n", "config.invalid"), ("max_epsilon: 3\n", "config.invalid"), ("", "config.invalid"),
    ("- a\n", "config.invalid"), ("approver: [\n", "policy.yaml"),
    ("approver: !!python/object/apply:os.system ['touch {marker}']\n", "policy.yaml")])
@pytest.mark.case(11)
def test_bad_policy_file_is_refused_and_never_executed(tmp_path: Path, text: str, want: str) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "policy.yaml"
    path.write_text(text.replace("{marker}", str(marker)))
    with pytest.raises(UsageError) as caught:
        load_policy(path)
    assert caught.value.code == want
    assert not marker.exists()


def test_missing_policy_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_policy(tmp_path / "policy.yaml")
    assert caught.value.code == "file.missing"


def test_policy_digest_changes_with_any_term() -> None:
    assert policy().digest == policy().digest
    assert len({policy().digest, policy(colluding=2).digest, policy(max_epsilon=7.9).digest}) == 3


def test_expiry_code_and_sign_off(tiny_contract: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code(tiny_contract(expires="2020-01-01T00:00:00Z")) == "contract.expired"
    assert code(tiny_contract(code="9" * 64)) == "contract.code"
    assert code(tiny_contract(), sign_off=True) == "policy.sign_off"
    signed_off = tiny_contract(sign_off=[{"body": "DPO", "who": "A. Lee", "reference": "2026-11"}])
    assert code(signed_off, sign_off=True) == "accepted"
