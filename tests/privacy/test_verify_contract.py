"""Verification of who agreed: the engineer's signature, each site's approval, the code and the metrics that they name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from evidence_fixture import LAB, SITES, Consortium, contract, relog, reseal, sha, statement_path, write_bundle
from test_verify import assert_fails, change, failed, following

from fl_client.policy import SitePolicy
from fl_client.statements import SiteStatements
from privacy.contract import Contract
from privacy.identity import FileSigner, Role
from privacy.predicates import KINDS
from privacy.signing import approval, check_approval, envelope, sign_contract
from privacy.statements import make
from privacy.verify import verify_bundle

NOBODY = "no engineer of this consortium signed the contract"
EXPIRES = "2026-03-01T09:30:00Z"  # the moment at which the fixture's sites approve


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="module")
def good(parties: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("good") / "bundle", parties)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def signed(signer: FileSigner, agreed: Contract) -> bytes:
    return envelope(sign_contract(agreed, signer))


def first(bundle: Path, who: str = LAB) -> Path:
    return bundle / f"statements/000001-contract-{who}.json"


# What holds ----------------------------------------------------------------------------------------------------------

def test_what_engineer_and_site_sign_holds(copy: Path, parties: Consortium) -> None:
    """Signature and acceptance of the software itself, in the place of those made here."""
    agreed, signer = contract(parties.signers), parties.signers["clinic-a"]
    first(copy).write_bytes(signed(parties.signers[LAB], agreed))
    made = statement_path(copy, "acceptance", "clinic-a")
    lineage = json.loads(b64decode(json.loads(made.read_bytes())["payload"]))["predicate"]["lineage"]
    policy = SitePolicy.model_validate({"approver": "officer of clinic-a", "max_epsilon": 10.0})
    yes = check_approval(approval(agreed, "clinic-a", policy=policy.digest, approver="Dr Lin", signer=signer), agreed,
                         "clinic-a", policy=policy.digest, signer=signer)
    ledger = cast(Any, SimpleNamespace(lineage=lineage, cap=10.0))
    made.write_text(SiteStatements(agreed, "clinic-a", signer, ledger, lambda kind, envelope: None).acceptance(policy, yes))
    verdict = verify_bundle(relog(copy, parties), parties.fingerprint)
    assert verdict.verdict == "PASS", verdict.as_dict()
    assert verdict.steps[2].detail == "1 coordinator, 1 engineer and 4 sites, each under the CA of its role"
    assert verdict.steps[5].detail.startswith("signed by the engineer lab, accepted by all 4 sites before it expired")
    said = json.loads(b64decode(json.loads(made.read_bytes())["payload"]))["predicate"]
    assert (said["approved_by"], said["approver"], said["code"]) == ("Dr Lin", "officer of clinic-a", agreed.code)


def test_approval_in_the_last_second(parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, expires="2026-03-01T09:30:01Z"))
    assert verify_bundle(bundle, parties.fingerprint).verdict == "PASS"


# The engineer's signature --------------------------------------------------------------------------------------------

def test_nobody_signed(parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, edit=change("contract", drop=True))
    verdict = verify_bundle(bundle, parties.fingerprint)
    assert failed(verdict) == {"contract"}
    assert_fails(verdict, "contract", NOBODY)


@pytest.mark.parametrize("who", ["hub", "clinic-a"])
@pytest.mark.parametrize("own_name", [False, True])
def test_signed_by_another_role(who: str, own_name: bool, copy: Path, parties: Consortium) -> None:
    first(copy).unlink()
    first(copy, who if own_name else LAB).write_bytes(signed(parties.signers[who], contract(parties.signers)))
    verdict = verify_bundle(reseal(copy, parties), parties.fingerprint)
    assert_fails(verdict, "statements", "statement 1 is refused (statement.key)")
    assert_fails(verdict, "contract", NOBODY)


def test_signed_by_an_engineer_of_another_ca(copy: Path, parties: Consortium, tmp_path: Path) -> None:
    other = Consortium(tmp_path / "other")
    first(copy).write_bytes(signed(other.signers[LAB], contract(parties.signers)))
    verdict = verify_bundle(reseal(copy, parties), parties.fingerprint)
    assert_fails(verdict, "statements", "statement.key")
    assert_fails(verdict, "contract", NOBODY)
    (copy / "certificates/lab.pem").write_bytes(other.pem("issued/lab/sign.pem"))
    verdict = verify_bundle(reseal(copy, parties), parties.fingerprint)
    assert_fails(verdict, "certificates", "identity.untrusted")
    assert_fails(verdict, "certificates", "not exactly one engineer")
    assert_fails(verdict, "contract", NOBODY)
    (copy / "certificates/issuing-engineer.pem").write_bytes(other.pem("issuing-engineer.pem"))
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "anchor", "identity.untrusted")


def test_engineer_under_the_ca_of_another_role(copy: Path, parties: Consortium, tmp_path: Path) -> None:
    """Who may name sites may not thereby sign contracts."""
    crowd = Consortium(tmp_path / "crowd")
    lab = crowd.enrol("lab-2", Role.SITE)
    bundle = write_bundle(tmp_path / "b", crowd, contract(crowd.signers), signers={**crowd.signers, LAB: lab})
    assert_fails(verify_bundle(bundle, crowd.fingerprint), "contract", NOBODY)


def test_tls_certificate_of_the_engineer(copy: Path, parties: Consortium) -> None:
    (copy / "certificates/lab.pem").write_bytes(parties.pem("issued/lab/tls.pem"))
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "certificates", "identity.usage")


def test_no_certificates_of_engineers(copy: Path, parties: Consortium) -> None:
    (copy / "certificates/lab.pem").unlink()
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "certificates", "not exactly one engineer")
    (copy / "certificates/issuing-engineer.pem").unlink()
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "certificates",
                 "not exactly those of sites, coordinator and engineer")


@pytest.mark.parametrize(("fields", "words"), [
    ({"contract": sha("x")}, "000001-contract-lab.json is bound to another contract"),
    ({"run": "00" * 16}, "000001-contract-lab.json belongs to another run"),
    ({"purpose": "Another purpose"}, "another purpose or expiry"), ({"expires": "2098-01-01T00:00:00Z"}, "another purpose")])
def test_signed_something_else(fields: dict[str, str], words: str, parties: Consortium, tmp_path: Path) -> None:
    verdict = verify_bundle(write_bundle(tmp_path / "b", parties, edit=change("contract", **fields)), parties.fingerprint)
    assert_fails(verdict, "contract", words)
    assert failed(verdict) == {"contract"}


def test_signature_of_another_contract(copy: Path, parties: Consortium) -> None:
    """A real one, of the same engineer, on a contract that differs in its metrics alone."""
    first(copy).write_bytes(signed(parties.signers[LAB], contract(parties.signers, metrics=["accuracy", "recall"])))
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "contract", "bound to another contract")


def test_signature_about_another_subject(copy: Path, parties: Consortium) -> None:
    agreed = contract(parties.signers)
    said = {"run": agreed.run, "contract": agreed.digest, "purpose": agreed.purpose, "expires": agreed.expires}
    kind = KINDS["contract"].predicate_type
    first(copy).write_bytes(make(parties.signers[LAB], kind, [("contract.json", sha("x"))], said))
    verdict = verify_bundle(reseal(copy, parties), parties.fingerprint)
    assert_fails(verdict, "statements", "another subject")
    assert_fails(verdict, "contract", NOBODY)


def test_signed_twice_by_one_engineer(copy: Path, parties: Consortium) -> None:
    shutil.copy(first(copy), copy / f"statements/{following(copy)}-contract-lab.json")
    verdict = verify_bundle(relog(copy, parties), parties.fingerprint)
    assert_fails(verdict, "contract", "signed more than once")
    assert "contract" in failed(verdict)


def test_signed_by_two_engineers(parties: Consortium, tmp_path: Path) -> None:
    crowd = Consortium(tmp_path / "crowd")
    agreed, second = contract(crowd.signers), crowd.enrol("lab-2", Role.ENGINEER)
    bundle = write_bundle(tmp_path / "b", crowd, agreed)
    (bundle / f"statements/{following(bundle)}-contract-lab-2.json").write_bytes(signed(second, agreed))
    verdict = verify_bundle(reseal(bundle, crowd), crowd.fingerprint)
    assert_fails(verdict, "certificates", "not exactly one engineer")
    assert_fails(verdict, "contract", "signed more than once")
    assert failed(verdict) == {"certificates", "contract", "inclusion"}  # its certificate is no site's


# The sites' approvals ------------------------------------------------------------------------------------------------

B = {"site": "clinic-b"}
LIES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "approved at the expiry": (change("acceptance", B, approved="2099-01-01T00:00:00+00:00"), "contract",
                               "clinic-b approved the contract when it had expired"),
    "approved after the expiry": (change("acceptance", B, approved="2100-06-01T00:00:00+00:00"), "contract", "clinic-b"),
    "other code": (change("acceptance", B, code=sha("code")), "contract", "clinic-b has other code installed"),
    "approved by nobody": (change("acceptance", B, approved_by=""), "statements", "config.invalid"),
    "approved by a blank": (change("acceptance", B, approved_by=" "), "statements", "config.invalid"),
    "policy of nobody": (change("acceptance", B, approver=" "), "statements", "config.invalid"),
    "approved in another zone": (change("acceptance", B, approved="2026-03-01T09:30:00+08:00"), "statements",
                                 "config.invalid"),
    "approved in no zone": (change("acceptance", B, approved="2026-03-01T09:30:00"), "statements", "config.invalid"),
    "approved on no day": (change("acceptance", B, approved="2026-02-30T09:30:00+00:00"), "statements", "config.invalid"),
    "approved with a remark": (change("acceptance", B, approved="2026-03-01T09:30:00+00:00 "), "statements",
                               "config.invalid"),
    "who approved left out": (lambda kind, p: {k: v for k, v in p.items() if kind != "acceptance" or k != "approved_by"},
                              "statements", "config.invalid"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lie(lie: str, parties: Consortium, tmp_path: Path) -> None:
    edit, step, words = LIES[lie]
    assert_fails(verify_bundle(write_bundle(tmp_path / "b", parties, edit=edit), parties.fingerprint), step, words)


def test_contract_that_had_expired_at_every_approval(parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, expires=EXPIRES))
    verdict = verify_bundle(bundle, parties.fingerprint)
    for site in SITES:
        assert_fails(verdict, "contract", f"{site} approved the contract when it had expired")
    assert failed(verdict) == {"contract"}


def test_acceptance_of_the_first_version(parties: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as old:
        old.setitem(KINDS, "acceptance", dataclasses.replace(KINDS["acceptance"], predicate_type="urn:consilo:acceptance:1"))
        bundle = write_bundle(tmp_path / "b", parties)
    assert_fails(verify_bundle(bundle, parties.fingerprint), "statements", "verify.type")


# What is released ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metrics", [["accuracy"], ["recall", "accuracy"], ["recall"]])
def test_metric_that_the_contract_names(metrics: list[str], parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, metrics=metrics))
    verdict = verify_bundle(bundle, parties.fingerprint)
    assert failed(verdict) == (set() if "accuracy" in metrics else {"release"})
