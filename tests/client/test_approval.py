"""A contract is signed by an engineer and approved by the site, in words that its approver can read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fl_client.approval import approve, approved, describe
from fl_client.policy import SitePolicy
from privacy import ca
from privacy.canonical import canonical
from privacy.contract import Contract
from privacy.errors import CheckFailed, ConsiloError, Refused
from privacy.identity import FileSigner, Role, create_request
from privacy.signing import check_signature, code_digest, sign_contract
from privacy.trust import TrustStore

Make = Callable[..., Contract]
POLICY = SitePolicy(approver="data protection officer")


class People:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ca.init(folder / "ca", "Test")
        roles = {"site-a": Role.SITE, "site-b": Role.SITE, "eng": Role.ENGINEER, "hub": Role.COORDINATOR,
                 "aud": Role.AUDITOR}
        self.signers = {name: self._made(name, role) for name, role in roles.items()}
        self.trust = TrustStore.load(folder / "ca")

    def _made(self, name: str, role: Role) -> FileSigner:
        ca.issue(self.folder / "ca", create_request(self.folder / name, name, f"Org {name}"), role,
                 hosts=["localhost"] if role is Role.COORDINATOR else [])
        return FileSigner(self.folder / name / "sign.key", self.folder / "ca" / "issued" / name / "sign.pem")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    return People(tmp_path_factory.mktemp("people"))


def test_an_engineers_signature(people: People, tiny_contract: Make) -> None:
    contract = tiny_contract()
    peer = check_signature(sign_contract(contract, people.signers["eng"]), contract, people.trust)
    assert (peer.name, peer.role) == ("eng", Role.ENGINEER)


@pytest.mark.parametrize("who", ["site-a", "hub", "aud"])
def test_attack_signed_by_another_role(people: People, tiny_contract: Make, who: str) -> None:
    contract = tiny_contract()
    with pytest.raises(Refused, match=r"identity\.role"):
        check_signature(sign_contract(contract, people.signers[who]), contract, people.trust)


FIELDS: dict[str, Any] = {
    "run": "1" * 32, "purpose": "another", "sign_off": [{"body": "DPO", "who": "x", "reference": "y"}],
    "expires": "2099-01-02T00:00:00Z", "code_version": "9", "code": "9" * 64, "metrics": ["accuracy", "loss"],
    "model": {"max_length": 17}, "data": {"floor": 51}, "lora": {"r": 3}, "rule": {"server_lr": 0.3},
    "privacy": {"clip": 4.0}, "secagg": {"survivors": 2}, "site": {"n_decl": 80}, "sites": ("site-a", "site-b", "site-d")}


def test_every_field_of_the_contract_is_in_the_list() -> None:
    assert {"site" if name == "sites" else name for name in Contract.model_fields} - {"schema_version"} <= FIELDS.keys()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.case(35)
def test_attack_contract_with_each_field_changed(people: People, tiny_contract: Make, tmp_path: Path, field: str) -> None:
    """A signature and an approval are of one contract: neither carries over to another."""
    contract, changed = tiny_contract(), tiny_contract(**{field: FIELDS[field]})
    assert contract.digest != changed.digest
    with pytest.raises(CheckFailed, match=r"contract\.signature"):
        check_signature(sign_contract(contract, people.signers["eng"]), changed, people.trust)
    approve(contract, "site-a", POLICY, people.signers["site-a"], tmp_path, approver="A. Lee")
    approved(contract, "site-a", POLICY, people.signers["site-a"], tmp_path)
    with pytest.raises(Refused, match=r"contract\.not_approved"):
        approved(changed, "site-a", POLICY, people.signers["site-a"], tmp_path)
    file = tmp_path / "approvals" / f"{contract.digest}.json"
    file.rename(file.with_name(f"{changed.digest}.json"))
    with pytest.raises(Refused, match=r"contract\.not_approved"):
        approved(changed, "site-a", POLICY, people.signers["site-a"], tmp_path)


def test_an_approval_names_approver_policy_and_code(people: People, tiny_contract: Make, tmp_path: Path) -> None:
    contract, signer = tiny_contract(), people.signers["site-a"]
    path = approve(contract, "site-a", POLICY, signer, tmp_path, approver="A. Lee")
    got = approved(contract, "site-a", POLICY, signer, tmp_path)
    assert (got.approver, got.policy, got.code, got.contract) == ("A. Lee", POLICY.digest, code_digest(), contract.digest)
    assert path.parent.stat().st_mode & 0o077 == 0


def test_an_approval_ends_with_policy_code_site_and_key(people: People, tiny_contract: Make, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    import privacy.signing as module

    contract, signer = tiny_contract(), people.signers["site-a"]
    approve(contract, "site-a", POLICY, signer, tmp_path, approver="A. Lee")
    looser = POLICY.model_copy(update={"max_epsilon": 9.0})
    for site, policy, key in (("site-a", looser, "site-a"), ("site-b", POLICY, "site-a"), ("site-a", POLICY, "site-b")):
        with pytest.raises(Refused, match=r"contract\.not_approved"):
            approved(contract, site, policy, people.signers[key], tmp_path)
    monkeypatch.setattr(module, "code_digest", lambda: "8" * 64)
    with pytest.raises(Refused, match=r"contract\.not_approved"):
        approved(contract, "site-a", POLICY, signer, tmp_path)


def test_a_forged_approval_file(people: People, tiny_contract: Make, tmp_path: Path) -> None:
    contract, signer = tiny_contract(), people.signers["site-a"]
    path = approve(contract, "site-a", POLICY, signer, tmp_path, approver="A. Lee")
    value = json.loads(path.read_bytes())
    for data in (b"", b"{}", canonical(value | {"envelope": "{}"}), canonical(value | {"extra": 1}), b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(ConsiloError, match=r"contract\.not_approved"):
            approved(contract, "site-a", POLICY, signer, tmp_path)


@pytest.mark.case(35)
def test_nobody_approved(people: People, tiny_contract: Make, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"contract\.not_approved"):
        approved(tiny_contract(), "site-a", POLICY, people.signers["site-a"], tmp_path)


def test_the_contract_in_plain_words(tiny_contract: Make) -> None:
    contract = tiny_contract(sign_off=[{"body": "DPO", "who": "A. Lee", "reference": "note 7"}])
    text = describe(contract, "site-a", POLICY, engineer="eng", ledger=None)
    for what in (contract.digest, contract.purpose, "signed by     eng", "A. Lee: note 7", "about 70 records",
                 "epsilon", "at least 3 of 3 sites", "still among 2", "the data's cap is 8.0; earlier jobs spent 0.0"):
        assert what in text, what
    assert all(len(line) < 220 for line in text.splitlines())
    visible = tiny_contract(secagg={"enabled": False}, privacy={"trust": "none", "epsilon": None}, site={"sigma": 0.0})
    text = describe(visible, "site-a", POLICY, engineer="eng", ledger=None)
    assert "NOT HIDDEN" in text and "privacy       NONE" in text and "sign-off      none" in text


def test_the_code_digest_covers_every_python_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import privacy.signing as module

    home = Path(module.__file__).resolve().parent.parent
    copy = tmp_path / "privacy" / "signing.py"
    for file in (f for name in module.PACKAGES for f in (home / name).rglob("*.py")):
        target = tmp_path / file.relative_to(home)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    monkeypatch.setattr(module, "__file__", str(copy))
    assert module.code_digest.__wrapped__() == code_digest()
    (tmp_path / "strategies" / "rules.py").write_text("# changed\n")
    changed = module.code_digest.__wrapped__()
    (tmp_path / "fl_client" / "more.py").write_text("")
    assert len({code_digest(), changed, module.code_digest.__wrapped__()}) == 3
