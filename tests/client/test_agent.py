"""The agent put together, and the doctor who looks at the same things: real files of one site under its own CA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf import load_settings
from conf.settings import Settings
from fl_client import agent
from fl_client.agent import Papers
from fl_client.approval import approve
from fl_client.doctor import Doctor
from privacy import ca
from privacy.errors import ConsiloError, Refused
from privacy.identity import FileSigner, Role, create_request
from privacy.ledger import Ledger
from privacy.signing import sign_contract


class Place:
    """Keys, certificates, policy, signed contract and state of site-a, whose contract is the tiny one."""

    def __init__(self, folder: Path, contract: Any, data: Path, model: Path) -> None:
        self.folder = folder
        ca.init(folder / "ca", "Test")
        for name, role in (("site-a", Role.SITE), ("eng", Role.ENGINEER)):
            ca.issue(folder / "ca", create_request(folder / name, name, f"Org {name}"), role)
        self.issued = folder / "ca" / "issued" / "site-a"
        self.signer = FileSigner(folder / "site-a" / "sign.key", self.issued / "sign.pem")
        sites = tuple(s.model_copy(update={"signer": self.signer.fingerprint}) if s.name == "site-a" else s
                      for s in contract.sites)
        self.contract = contract.model_copy(update={"sites": sites})
        self.engineer = FileSigner(folder / "eng" / "sign.key", folder / "ca" / "issued" / "eng" / "sign.pem")
        self.write(self.contract)
        (folder / "policy.yaml").write_text("approver: test\n")
        self.settings: Settings = load_settings([
            "model=local", "model.name=tiny", f"model.path={model}", "site.name=site-a", f"site.data={data}",
            f"site.keys={folder}/site-a",
            f"site.certificates={self.issued}", f"site.contract={folder}/contract.json",
            f"site.signature={folder}/contract.signature.json", f"site.policy={folder}/policy.yaml",
            f"site.state={folder}/state", "site.url=https://localhost:1"])

    def write(self, contract: Any) -> None:
        (self.folder / "contract.json").write_bytes(contract.to_bytes())
        (self.folder / "contract.signature.json").write_bytes(sign_contract(contract, self.engineer))

    def approve(self) -> None:
        papers = Papers.load(self.settings.site)
        approve(papers.contract, "site-a", papers.policy, papers.signer, self.folder / "state", approver="A. Lee")

    def findings(self) -> dict[str, str]:
        """Check -> "" if it is well, else its code."""
        return {f.name: f.code for f in Doctor(self.settings).examine()}


@pytest.fixture
def place(tmp_path: Path, tiny_contract: Callable[..., Any], tiny_data: dict[str, Path], tiny_model: Path) -> Place:
    return Place(tmp_path, tiny_contract(), tiny_data["site-a"], tiny_model)


def test_a_site_that_cannot_train_holds_no_budget(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer refuses the model: the contract's rounds must stay free for another job."""
    def refuse(request: dict[str, Any], **how: Any) -> None:
        raise Refused("model.digest", "The base model differs.", "Install the right one.")

    place.approve()
    monkeypatch.setattr(agent, "TrainerProcess", refuse)
    with pytest.raises(Refused, match=r"model\.digest"):
        agent.Agent(place.settings)
    with Ledger.open(place.folder / "state" / "ledger.jsonl", place.signer) as ledger:
        assert ledger.summary().encumbrances == ()


def test_attack_a_contract_that_nobody_here_approved(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "TrainerProcess", lambda *a, **k: pytest.fail("it must not get so far"))
    with pytest.raises(Refused, match=r"contract\.not_approved"):
        agent.Agent(place.settings)
    place.approve()
    place.write(place.contract.model_copy(update={"purpose": "another one"}))
    with pytest.raises(Refused, match=r"contract\.not_approved"):
        agent.Agent(place.settings)


def test_attack_a_contract_without_the_engineers_signature(place: Place) -> None:
    (place.folder / "contract.json").write_bytes(place.contract.model_copy(update={"purpose": "another"}).to_bytes())
    with pytest.raises(ConsiloError, match=r"contract\.signature"):
        agent.Agent(place.settings)


def test_the_doctor_finds_a_well_site_well_but_for_the_coordinator(place: Place) -> None:
    place.approve()
    found = place.findings()
    assert found.pop("route") == "link.unreachable"
    assert found.pop("sandbox") in ("", "doctor.sandbox"), "as far as this machine goes"
    assert set(found.values()) == {""}, found


def _loose_key(place: Place) -> None:
    (place.folder / "site-a" / "sign.key").chmod(0o644)


def _no_certificate(place: Place) -> None:
    (place.issued / "tls.pem").unlink()


def _revoked(place: Place) -> None:
    ca.revoke(place.folder / "ca", "site-a")
    (place.issued / "trust" / "crl-site.pem").write_bytes((place.folder / "ca" / "crl-site.pem").read_bytes())


def _other_model(place: Place) -> None:
    place.write(place.contract.model_copy(update={"model": place.contract.model.model_copy(update={"weights": "9" * 64})}))


def _other_column(place: Place) -> None:
    place.settings = place.settings.model_copy(update={"site": place.settings.site.model_copy(update={"text": "nope"})})


def _tight_policy(place: Place) -> None:
    (place.folder / "policy.yaml").write_text("approver: test\nmax_epsilon: 0.5\n")


@pytest.mark.parametrize(("break_it", "check", "code"), [
    (_loose_key, "keys", "key.permissions"), (_revoked, "certificates", "identity.revoked"),
    (_no_certificate, "certificates", "file.missing"),
    (_other_model, "model", "model.digest"), (_other_column, "data", "data.column"),
    (_tight_policy, "contract", "policy.epsilon")])
def test_the_doctor_names_what_is_wrong_and_its_mend(place: Place, break_it: Callable[[Place], None], check: str,
                                                     code: str) -> None:
    place.approve()
    break_it(place)
    found = {f.name: f for f in Doctor(place.settings).examine()}
    assert (found[check].ok, found[check].code) == (False, code)
    assert found[check].mend


def test_the_doctor_shows_nothing_of_the_data(place: Place, tmp_path: Path) -> None:
    """Neither a record nor a count, whether all is well or the data break."""
    place.approve()
    data = Path(place.settings.site.data)
    leaky = tmp_path / "leaky.csv"
    leaky.write_text(data.read_text() + "CANARY-patient,heart\n" + '"CANARY unclosed,heart\n')
    count = str(len(data.read_text().splitlines()))
    for file in (data, leaky):
        place.settings = place.settings.model_copy(update={
            "site": place.settings.site.model_copy(update={"data": str(file)})})
        text = " ".join(f"{f.detail} {f.mend}" for f in Doctor(place.settings).examine() if f.name in ("data", "budget"))
        assert "CANARY" not in text and count not in text.split()


def test_the_doctor_records_no_refusal(place: Place) -> None:
    place.approve()
    Ledger.create(place.folder / "state" / "ledger.jsonl", place.signer, lineage="0" * 32, unit="record",
                  adjacency="add_remove", delta=1e-5, cap=8.0).close()
    before = (place.folder / "state" / "ledger.jsonl").read_bytes()
    _tight_policy(place)
    assert place.findings()["contract"] == "policy.epsilon"
    assert (place.folder / "state" / "ledger.jsonl").read_bytes() == before
