"""A site's own evidence: exported whole, verified offline; and how a site withdraws."""

from __future__ import annotations

import hashlib
import json
import shutil
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.settings import SiteSettings
from fl_client.agent import open_ledger
from fl_client.approval import approve, approved
from fl_client.evidence import export, withdraw
from fl_client.journal import SiteJournal
from fl_client.policy import SitePolicy
from fl_client.statements import SiteStatements
from privacy import ca
from privacy.bundle import RawBundle
from privacy.canonical import canonical
from privacy.contract import Contract
from privacy.errors import CheckFailed, Refused, UsageError
from privacy.identity import FileSigner, Role, create_request
from privacy.ledger import Ledger
from privacy.secagg import transcript as tr
from privacy.signing import sign_contract
from privacy.site_bundle import MANIFEST_TYPE, read_site_bundle
from privacy.statements import make
from privacy.transparency import Head, sign_checkpoint
from privacy.verify import verify_bundle

NAME = "site-a"
POLICY = SitePolicy(approver="officer", max_epsilon=20.0)


class Place:
    """One site's folders after two jobs of two rounds each, as the software left them."""

    def __init__(self, folder: Path, make_contract: Callable[..., Contract]) -> None:
        self.folder, self.trust = folder, folder / "ca"
        self.root = ca.init(self.trust, "Consortium")
        for name, role in {NAME: Role.SITE, "eng": Role.ENGINEER, "hub": Role.COORDINATOR}.items():
            ca.issue(self.trust, create_request(folder / name, name, f"Org {name}"), role,
                     hosts=["localhost"] if role is Role.COORDINATOR else [])
        self.signer = self.signed_by(NAME)
        (folder / "certificates").mkdir()
        shutil.copytree(self.trust / "issued" / NAME / "trust", folder / "certificates" / "trust")
        shutil.copy(self.trust / "issued" / NAME / "sign.pem", folder / "certificates")
        (folder / "policy.yaml").write_text("approver: officer\nmax_epsilon: 20.0\n")
        self.state = folder / "state"
        self.state.mkdir()
        self.site = SiteSettings(name=NAME, keys=str(folder / NAME), certificates=str(folder / "certificates"),
                                 state=str(self.state), policy=str(folder / "policy.yaml"),
                                 contract=str(folder / "contract.json"))
        for run in ("1" * 32, "2" * 32):
            self.contract = make_contract(run=run, sites=(NAME, "site-b", "site-c"))
            (folder / "contract.json").write_bytes(self.contract.to_bytes())
            self.job(self.contract)

    def signed_by(self, name: str) -> FileSigner:
        return FileSigner(self.folder / name / "sign.key", self.trust / "issued" / name / "sign.pem")

    def job(self, contract: Contract) -> None:
        approve(contract, NAME, POLICY, self.signer, self.state, approver="A. Lee",
                signature=sign_contract(contract, self.signed_by("eng")))
        journal = SiteJournal(self.state / "rounds.jsonl")
        ledger = open_ledger(contract, NAME, POLICY, self.signer, self.state)
        assert ledger is not None
        says = SiteStatements(contract, NAME, self.signer, ledger, journal.stated)
        says.acceptance(POLICY, approved(contract, NAME, POLICY, self.signer, self.state))
        for round_no in (1, 2):
            seq = ledger.reserve(contract.mechanism(NAME, round_no), run=contract.run, contract=contract.digest,
                                 round=round_no, attempt=0, code=contract.code_version, approver="officer")
            ledger.commit(seq, 1)
            offer = tr.offer(contract, round_no=round_no, attempt=0, ranges=[(3, 1.0)], adapter="0" * 64)
            says.round(offer, b"v" * 32, hashlib.sha256(b"y").hexdigest())
        if contract.run != "2" * 32:  # the second job is still under way
            says.closing()
        head = Head(log="hub", size=7, root="ab" * 32)
        (self.state / "witness.json").write_bytes(canonical({"hub": {
            "head": head.model_dump(), "checkpoint": sign_checkpoint(self.signed_by("hub"), head).decode(),
            "certificate": (self.trust / "issued/hub/sign.pem").read_text()}}))
        ledger.close()
        journal.close()

    def reseal(self, bundle: Path) -> Path:
        """A site that lies about itself signs what is there now."""
        (bundle / "manifest.json").unlink(missing_ok=True)
        raw = read_site_bundle(bundle)
        files = {name: raw.sha256(name) for name in raw.files}
        lineage = json.loads((bundle / "ledger.jsonl").read_text().splitlines()[0])["body"]["lineage"]
        (bundle / "manifest.json").write_bytes(make(self.signer, MANIFEST_TYPE, [("ledger.jsonl", files["ledger.jsonl"])], {
            "site": NAME, "lineage": lineage, "files": files}))
        return bundle


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_contract: Callable[..., Contract]) -> Place:
    place = Place(tmp_path_factory.mktemp("site"), tiny_contract)
    export(place.site, place.folder / "bundle")
    return place


@pytest.fixture
def bundle(template: Place, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template.folder / "bundle", tmp_path / "bundle"))


@pytest.fixture
def place(tmp_path: Path, tiny_contract: Callable[..., Contract]) -> Place:
    (tmp_path / "own").mkdir()
    return Place(tmp_path / "own", tiny_contract)


def failed(bundle: Path, root: str) -> dict[str, str]:
    return {s.name: s.detail for s in verify_bundle(bundle, root).steps if not s.ok}


def test_all_jobs_of_the_lineage_verify(template: Place, bundle: Path) -> None:
    verdict = verify_bundle(bundle, template.root)
    assert verdict.verdict == "PASS", verdict.as_dict()
    said = {s.name: s.detail for s in verdict.steps}
    assert list(said) == ["files", "anchor", "certificates", "manifest", "ledger", "contracts", "statements", "epsilon",
                          "witness"]
    assert "2 jobs with 4 charges" in said["ledger"] and "7 statements" in said["statements"]
    assert said["witness"] == "last heads seen: hub at 7 entries"
    assert verify_bundle(bundle).verdict == "UNANCHORED"
    assert verify_bundle(bundle, "0" * 64).verdict == "FAIL"


def test_it_holds_what_the_site_signed_and_no_key(template: Place) -> None:
    raw: RawBundle = read_site_bundle(template.folder / "bundle")
    kinds = [path.split("-", 1)[1] for path in raw.files if path.startswith("statements/")]
    assert kinds == ["acceptance.json", "round-site.json", "round-site.json", "closing.json", "acceptance.json",
                     "round-site.json", "round-site.json"]
    assert not any(b"PRIVATE KEY" in data for data in raw.files.values())


def test_export_writes_to_a_new_folder_and_needs_a_ledger(template: Place, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"bundle\.sealed"):
        export(template.site, template.folder / "bundle")
    with pytest.raises(UsageError, match=r"ledger\.missing"):
        export(template.site.model_copy(update={"state": str(tmp_path)}), tmp_path / "out")


def lines(bundle: Path) -> list[bytes]:
    return (bundle / "ledger.jsonl").read_bytes().splitlines()


def _cut(bundle: Path) -> None:
    (bundle / "ledger.jsonl").write_bytes(b"\n".join(lines(bundle)[:-1]) + b"\n")


def _hide(bundle: Path) -> None:
    kept = lines(bundle)
    kept[3] = canonical({"seq": 3, "hash": json.loads(kept[3])["hash"]})
    (bundle / "ledger.jsonl").write_bytes(b"\n".join(kept) + b"\n")


def _swap(bundle: Path) -> None:
    kept = lines(bundle)
    kept[2], kept[3] = kept[3], kept[2]
    (bundle / "ledger.jsonl").write_bytes(b"\n".join(kept) + b"\n")


def _no_contract(bundle: Path) -> None:
    next(p for p in (bundle / "contracts").iterdir() if len(p.stem) == 64).unlink()


def _no_approval(bundle: Path) -> None:
    next((bundle / "contracts").glob("*.approval.json")).write_bytes(b"{}")


def _no_engineer(bundle: Path) -> None:
    next((bundle / "contracts").glob("*.signature.json")).unlink()


def _edit_statement(bundle: Path) -> None:
    path = bundle / "statements" / "000002-round-site.json"
    value = json.loads(path.read_text())
    payload = b64decode(value["payload"]).replace(b'"round":1', b'"round":2')
    value["payload"] = b64encode(payload).decode()
    path.write_bytes(canonical(value))


def _conflict(bundle: Path) -> None:
    (bundle / "witness" / "witness-conflict.json").write_bytes(b"{}")


def _older_head(bundle: Path) -> None:
    path = bundle / "witness" / "witness.json"
    path.write_bytes(path.read_bytes().replace(b'"size":7', b'"size":6'))


LIES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "ledger cut": (_cut, "statements", "head that the ledger doesn't hold"),
    "records hidden": (_hide, "ledger", "hidden behind commitments"),
    "records reordered": (_swap, "ledger", "ledger.broken"),
    "contract missing": (_no_contract, "contracts", "contract that isn't here"),
    "approval missing": (_no_approval, "contracts", "approval is refused"),
    "engineer's signature missing": (_no_engineer, "contracts", "signature or approval is refused"),
    "statement changed": (_edit_statement, "statements", "statement.signature"),
    "two histories seen": (_conflict, "witness", "changed history"),
    "another head": (_older_head, "witness", "isn't what was signed"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_site_that_lies_about_itself(template: Place, bundle: Path, lie: str) -> None:
    edit, step, words = LIES[lie]
    edit(bundle)
    assert "manifest" in failed(bundle, template.root)
    found = failed(template.reseal(bundle), template.root)
    assert words in found[step] and "manifest" not in found


def test_case_28_another_ledger_under_the_same_name(template: Place, place: Place, bundle: Path) -> None:
    """A copy from elsewhere, even one that its own site signed."""
    shutil.copy(place.state / "ledger.jsonl", bundle / "ledger.jsonl")
    assert "ledger" in failed(template.reseal(bundle), template.root)


def test_random_changes_never_pass(template: Place, bundle: Path) -> None:
    rng = np.random.default_rng(5)
    paths = sorted(p for p in bundle.rglob("*") if p.is_file())
    for _ in range(150):
        path = paths[int(rng.integers(len(paths)))]
        data = path.read_bytes()
        at, bit = int(rng.integers(len(data))), 1 << int(rng.integers(8))
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1:])
        assert verify_bundle(bundle, template.root).verdict == "FAIL", (path.name, at, bit)
        path.write_bytes(data)


def test_withdrawal_ends_the_job_and_is_recorded(place: Place) -> None:
    said = json.loads(b64decode(json.loads(withdraw(place.site, "B. Kim"))["payload"]))["predicate"]
    assert (said["site"], said["contract"], said["approver"]) == (NAME, place.contract.digest, "B. Kim")
    with pytest.raises(Refused, match=r"contract\.not_approved"):
        approved(place.contract, NAME, POLICY, place.signer, place.state)
    with pytest.raises(Refused, match=r"contract\.not_approved"):
        withdraw(place.site, "B. Kim")
    kinds = [json.loads(line)["body"]["kind"] for line in (place.state / "ledger.jsonl").read_bytes().splitlines()]
    assert kinds[-2:] == ["refusal", "close"]
    export(place.site, place.folder / "bundle")
    verdict = verify_bundle(place.folder / "bundle", place.root)
    assert verdict.verdict == "PASS", verdict.as_dict()
    assert any(p.name.endswith("-withdrawal.json") for p in (place.folder / "bundle" / "statements").iterdir())


def test_withdrawal_while_the_agent_runs(place: Place) -> None:
    journal: Any = SiteJournal(place.state / "rounds.jsonl")
    try:
        with pytest.raises(Refused, match=r"file\.leased"):
            withdraw(place.site, "B. Kim")
    finally:
        journal.close()
    approved(place.contract, NAME, POLICY, place.signer, place.state)


def test_withdrawal_from_a_job_that_has_ended(place: Place, tiny_contract: Callable[..., Contract]) -> None:
    first = tiny_contract(run="1" * 32, sites=(NAME, "site-b", "site-c"))
    Path(place.site.contract).write_bytes(first.to_bytes())
    before = (place.state / "ledger.jsonl").read_bytes()
    withdraw(place.site, "B. Kim")
    assert (place.state / "ledger.jsonl").read_bytes() == before


def test_statements_from_before_a_renewal_still_count(place: Place, tmp_path: Path) -> None:
    """The ledger's key stays, its certificate is a new one; another key under the same name doesn't count."""
    ca.issue(place.trust, (place.folder / NAME / "request.json").read_bytes(), Role.SITE)
    new = place.trust / "issued" / NAME / "sign.pem"
    assert new.read_bytes() != (place.folder / "certificates" / "sign.pem").read_bytes()
    shutil.copy(new, place.folder / "certificates" / "sign.pem")
    export(place.site, place.folder / "bundle")
    verdict = verify_bundle(place.folder / "bundle", place.root)
    assert verdict.verdict == "PASS", verdict.as_dict()
    for approval_file in (place.folder / "bundle" / "contracts").glob("*.approval.json"):
        value = json.loads(approval_file.read_text())
        value["certificate"] = (place.trust / "issued" / "hub" / "sign.pem").read_text()
        approval_file.write_bytes(canonical(value))
    assert "contracts" in failed(place.folder / "bundle", place.root)


def test_a_ledger_that_cannot_be_written_is_no_withdrawal(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(ledger: Ledger, *args: str) -> None:
        raise Refused("ledger.write_failed", "The disk is full.", "Free it.")

    monkeypatch.setattr(Ledger, "refuse", full)
    with pytest.raises(Refused, match=r"ledger\.write_failed"):
        withdraw(place.site, "B. Kim")
    approved(place.contract, NAME, POLICY, place.signer, place.state)


def test_the_manifest_is_another_sites(template: Place, bundle: Path, tmp_path: Path) -> None:
    ca.issue(template.trust, create_request(tmp_path / "b", "site-b", "Org b"), Role.SITE)
    other = FileSigner(tmp_path / "b" / "sign.key", template.trust / "issued" / "site-b" / "sign.pem")
    said = json.loads(b64decode(json.loads((bundle / "manifest.json").read_text())["payload"]))
    (bundle / "manifest.json").write_bytes(make(other, MANIFEST_TYPE, [("ledger.jsonl", "0" * 64)], said["predicate"]))
    assert "statement.key" in failed(bundle, template.root)["manifest"]
    with pytest.raises((CheckFailed, UsageError)):
        read_site_bundle(bundle / "nowhere")
