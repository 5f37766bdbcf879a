"""Verification of run bundles: what holds passes, and each planted lie fails at the step whose rule it breaks."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evidence_fixture import RUN, SITES, Consortium, contract, reseal, sha, statement_path, write_bundle

import privacy.bundle
import privacy.ledger
import privacy.ledger_chain
import privacy.ledger_records
from privacy.bundle import MANIFEST, BundleWriter, read_bundle
from privacy.errors import CheckFailed, ConsiloError, Refused, UsageError
from privacy.identity import Role
from privacy.ledger import Ledger
from privacy.statements import make
from privacy.verify import Verdict, verify_bundle

CANARY = "canary-7f3a"


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="module")
def good(parties: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("good") / "bundle", parties)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def failed(verdict: Verdict) -> set[str]:
    return {step.name for step in verdict.steps if not step.ok}


def assert_fails(verdict: Verdict, step: str, words: str = "") -> None:
    assert verdict.verdict == "FAIL"
    assert step in failed(verdict), verdict.as_dict()
    detail = next(s.detail for s in verdict.steps if s.name == step)
    assert words in detail, detail
    assert CANARY not in json.dumps(verdict.as_dict())


def change(kind: str, match: dict[str, Any] | None = None, **fields: Any) -> Callable[..., dict[str, Any] | None]:
    """An edit: in statements of that kind that match, set fields. `drop=True` leaves the statement out."""
    drop = fields.pop("drop", False)

    def edit(this: str, predicate: dict[str, Any]) -> dict[str, Any] | None:
        if this != kind or any(predicate.get(k) != v for k, v in (match or {}).items()):
            return predicate
        return None if drop else {**predicate, **fields}

    return edit


def detail(verdict: Verdict, step: str) -> str:
    return next(s.detail for s in verdict.steps if s.name == step)


def following(bundle: Path) -> str:
    """The number that the next statement would have."""
    return f"{1 + len(list((bundle / 'statements').iterdir())):06d}"


# What holds ----------------------------------------------------------------------------------------------------------

def test_valid_bundle_passes(good: Path, parties: Consortium) -> None:
    verdict = verify_bundle(good, parties.fingerprint)
    assert (verdict.verdict, verdict.anchored, failed(verdict)) == ("PASS", True, set())
    assert [s.name for s in verdict.steps] == [
        "files", "anchor", "certificates", "manifest", "statements", "contract", "inclusion", "consistency", "witnesses",
        "rounds", "ledgers", "epsilon", "release"]
    assert set(verdict.as_dict()) == {"verdict", "anchored", "steps"}
    assert set(verdict.as_dict()["steps"][0]) == {"name", "ok", "detail"}


def test_fingerprint_as_openssl_prints_it(good: Path, parties: Consortium) -> None:
    text = ":".join(parties.fingerprint[i:i + 2] for i in range(0, 64, 2)).upper()
    assert verify_bundle(good, text).verdict == "PASS"


def test_unanchored_without_fingerprint(good: Path) -> None:
    verdict = verify_bundle(good)
    assert (verdict.verdict, verdict.anchored) == ("UNANCHORED", False)


def test_other_fingerprint(good: Path) -> None:
    verdict = verify_bundle(good, "0" * 64)
    assert_fails(verdict, "anchor")
    assert not verdict.anchored


def test_malformed_fingerprint_is_a_usage_error(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"verify\.fingerprint"):
        verify_bundle(good, "abc")
    with pytest.raises(UsageError, match=r"bundle\.missing"):
        verify_bundle(tmp_path / "nowhere")


def test_lineage_with_an_earlier_run_shows_commitments(parties: Consortium, tmp_path: Path) -> None:
    verdict = verify_bundle(write_bundle(tmp_path / "b", parties, spent_before=2), parties.fingerprint)
    assert verdict.verdict == "PASS"
    assert "commitments" in detail(verdict, "epsilon")


def test_non_private_run_says_so(parties: Consortium, tmp_path: Path) -> None:
    agreed = contract(parties.signers, trust="none", epsilon=None)
    verdict = verify_bundle(write_bundle(tmp_path / "b", parties, agreed), parties.fingerprint)
    assert verdict.verdict == "PASS"
    assert all("NON-PRIVATE" in detail(verdict, step) for step in ("contract", "ledgers", "epsilon"))


def test_secure_aggregation_off_says_so(parties: Consortium, tmp_path: Path) -> None:
    verdict = verify_bundle(write_bundle(tmp_path / "b", parties, contract(parties.signers, secagg=False)),
                            parties.fingerprint)
    assert verdict.verdict == "PASS"
    assert "INDIVIDUAL UPDATES VISIBLE" in detail(verdict, "rounds")


def test_job_that_ended_early(parties: Consortium, tmp_path: Path) -> None:
    agreed = contract(parties.signers, rounds=9)
    verdict = verify_bundle(write_bundle(tmp_path / "b", parties, agreed), parties.fingerprint)
    assert verdict.verdict == "PASS"
    assert "ended early" in detail(verdict, "rounds")


# Lies told before signing --------------------------------------------------------------------------------------------

LIES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "epsilon understated in closing": (change("closing", {"site": "clinic-a"}, epsilon="0.5"), "epsilon", "clinic-a"),
    "epsilon understated in a round": (change("round-site", {"round": 3}, epsilon="0.1"), "epsilon", "understates"),
    "closing names another cap": (change("closing", cap="99.0"), "ledgers", "cap"),
    "closing hides a record": (change("closing", {"site": "clinic-b"}, records=9), "ledgers", "clinic-b"),
    "sigma other than the contract's": (change("round-site", {"round": 1}, sigma="1.0"), "rounds", "mechanism"),
    "n_decl other than the contract's": (change("round-site", {"round": 1}, n_decl=1001), "rounds", "mechanism"),
    "site statement left out": (change("round-site", {"site": "clinic-b", "round": 2}, drop=True), "rounds",
                                "clinic-b"),
    "round left out": (change("round", {"round": 2, "outcome": "done"}, drop=True), "rounds", "round 2, attempt 1"),
    "void attempt left out": (change("round", {"outcome": "void"}, drop=True), "rounds", "round 2, attempt 0"),
    "void attempt with a result": (change("round", {"outcome": "void"}, sites=list(SITES)), "rounds", "void"),
    "all start from another adapter": (
        lambda kind, p: {**p, "adapter_in": sha("x")} if kind.startswith("round") and p["round"] == 3 else p,
        "rounds", "than the one before left"),
    "release without a round": (change("round", drop=True), "release", "no round was done"),
    "site trained from another adapter": (change("round-site", {"round": 3, "site": "clinic-c"}, adapter_in=sha("x")),
                                          "rounds", "clinic-c"),
    "ledger head of nowhere": (change("round-site", {"round": 2}, ledger_head=sha("x")), "ledgers", "head"),
    "acceptance left out": (change("acceptance", {"site": "clinic-a"}, drop=True), "contract", "clinic-a"),
    "acceptance of another cap": (change("acceptance", {"site": "clinic-a"}, cap="3.0"), "ledgers", "acceptance"),
    "acceptance of no privacy": (change("acceptance", {"site": "clinic-a"}, trust="none"), "contract", "clinic-a"),
    "approver exchanged": (change("acceptance", {"site": "clinic-a"}, approver=CANARY), "ledgers", "approver"),
    "another contract in one statement": (change("round", {"round": 3}, contract=sha("x")), "contract", "another"),
    "another run in one statement": (change("round", {"round": 3}, run="00" * 16), "contract", "another run"),
    "closing left out": (change("closing", {"site": "clinic-a"}, drop=True), "ledgers", "closed the run"),
    "another adapter released": (change("release", adapter=sha("x")), "release", "last round"),
    "release left out": (change("release", drop=True), "release", "exactly one"),
    "release of a metric that nobody agreed to": (change("release", metric_name="recall"), "release", "doesn't name"),
    "release of more rounds": (change("release", rounds=4), "release", "another number"),
    "done with a reason": (change("round", {"round": 1}, reason="round.late"), "rounds", "a reason"),
    "void without a reason": (change("round", {"outcome": "void"}, reason=""), "rounds", "void"),
    "acceptance without a cap": (change("acceptance", {"site": "clinic-a"}, cap=""), "contract", "without a ledger"),
    "acceptance of another delta": (change("acceptance", {"site": "clinic-a"}, delta="0.1"), "contract", "delta"),
    "acceptance of another lineage": (change("acceptance", {"site": "clinic-a"}, lineage="00" * 16), "ledgers",
                                      "acceptance"),
    "closing of another lineage": (change("closing", {"site": "clinic-a"}, lineage="00" * 16), "ledgers", "lineage"),
    "closing above the cap": (change("closing", {"site": "clinic-a"}, epsilon="11.0"), "epsilon", "than the cap"),
    "statement without epsilon": (change("round-site", {"round": 1}, epsilon=""), "epsilon", "names no epsilon"),
    "attempt invented by sites": (change("round-site", {"round": 3}, round=4), "rounds", "account for"),
    "attempt that was never charged": (change("round-site", {"round": 3}, attempt=7), "ledgers", "never charged"),
    "speaking for another site": (change("round-site", {"site": "clinic-a", "round": 1}, site="clinic-b"), "statements",
                                  "another site"),
    "unknown field": (change("release", **{CANARY: 1}), "statements", "config.unknown_key"),
    "number as an integer": (change("round-site", {"round": 1}, sigma=3), "statements", "config.invalid"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lie(lie: str, parties: Consortium, tmp_path: Path) -> None:
    edit, step, words = LIES[lie]
    assert_fails(verify_bundle(write_bundle(tmp_path / "b", parties, edit=edit), parties.fingerprint), step, words)


@pytest.mark.parametrize(("kind", "who", "step"), [
    ("contract", "lab", "contract"), ("acceptance", "clinic-a", "contract"), ("release", "hub", "release"),
    ("closing", "clinic-b", "ledgers"), ("round-site", "clinic-c", "rounds")])
def test_said_twice(kind: str, who: str, step: str, copy: Path, parties: Consortium) -> None:
    shutil.copy(statement_path(copy, kind, who), copy / f"statements/{following(copy)}-{kind}-{who}.json")
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), step)


def test_ledger_and_closing_withheld(parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, edit=change("closing", {"site": "clinic-a"}, drop=True))
    (bundle / "ledgers/clinic-a.jsonl").unlink()
    verdict = verify_bundle(reseal(bundle, parties), parties.fingerprint)
    assert_fails(verdict, "ledgers", "shows no ledger")
    assert_fails(verdict, "epsilon", "no valid ledger")


def test_more_rounds_than_agreed(parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, rounds=2), encumbered=one_round_more)
    verdict = verify_bundle(bundle, parties.fingerprint)
    assert_fails(verdict, "rounds", "more rounds")
    assert_fails(verdict, "ledgers", "encumbered other rounds")


def one_round_more(plans: list[list[tuple[Any, int]]]) -> list[list[tuple[Any, int]]]:
    return [[(m, n + 1) for m, n in plan] for plan in plans]


@pytest.mark.parametrize("plans", [
    one_round_more, lambda plans: [[*plans[0], (dataclasses.replace(plans[0][0][0], q=0.25), 1)]]])
def test_encumbered_other_rounds_than_the_contract_has(plans: Any, parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, encumbered=plans)
    assert_fails(verify_bundle(bundle, parties.fingerprint), "ledgers", "encumbered other rounds")


@pytest.mark.parametrize("planted", ["no encumbrance", "fewer rounds", "nothing freed"])
def test_ledger_of_a_site_that_does_not_encumber(planted: str, parties: Consortium, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A modified client: chain and signatures are its own and hold, the rule is broken."""
    with monkeypatch.context() as site:
        site.setattr(privacy.ledger_chain.Chain, "_reserve", lambda chain, body: (
            chain.reserves.update({body.seq: body}), chain.slots.add((body.run, body.round, body.attempt))))
        site.setattr(privacy.ledger_records.Schedule, "covers", lambda *_: True)
        if planted == "no encumbrance":
            site.setattr(Ledger, "encumber", lambda *_, **__: None)
            site.setattr(Ledger, "reserve", _reserve_anyway)
        plans = (lambda p: [[(m, 1) for m, n in plan] for plan in p]) if planted == "fewer rounds" else (lambda p: p)
        bundle = write_bundle(tmp_path / "b", parties, encumbered=plans)
    assert_fails(verify_bundle(bundle, parties.fingerprint), "ledgers", "ledger.broken")


def _reserve_anyway(self: Ledger, m: Any, **names: Any) -> int:
    asked = privacy.ledger_records.charge(m)
    return self._append(self._next(
        privacy.ledger_records.Reserve, **names, **asked.model_dump(), accountant="x", epsilon="1.0", enforced="pld"))


def test_phases_are_charged_each_with_its_own_mechanism(parties: Consortium, tmp_path: Path) -> None:
    phases = [{"rounds": 1, "q": 0.5}, {"rounds": 2, "q": 0.25, "noise": 1.5}]
    agreed = contract(parties.signers, schedule=phases)
    verdict = verify_bundle(write_bundle(tmp_path / "b", parties, agreed), parties.fingerprint)
    assert verdict.verdict == "PASS", verdict.as_dict()
    first = agreed.mechanism("clinic-a")
    flat = write_bundle(tmp_path / "c", parties, agreed, ledger_mechanism=lambda m: first)
    assert_fails(verify_bundle(flat, parties.fingerprint), "ledgers", "another mechanism")


def test_refusals_in_the_ledger_are_evidence_and_no_failure(parties: Consortium, tmp_path: Path) -> None:
    from privacy.report import write_report

    bundle = write_bundle(tmp_path / "b", parties, refused=("site.adapter_invalid", "round"))
    assert verify_bundle(bundle, parties.fingerprint).verdict == "PASS"
    assert b'"code":"site.adapter_invalid"' in (bundle / "ledgers/clinic-a.jsonl").read_bytes()
    page = write_report(bundle, tmp_path, ca=parties.fingerprint)
    incidents = json.loads(page.with_suffix(".json").read_bytes())["incidents"]
    assert incidents[0] == {"kind": "refused", "round": 0, "attempt": 0, "stage": "", "reason": "site.adapter_invalid",
                            "sites": list(SITES)}
    assert "refused: <code>site.adapter_invalid</code>" in page.read_text()


def test_code_other_than_agreed(parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, code_version="0.2.0"))
    assert_fails(verify_bundle(bundle, parties.fingerprint), "ledgers", "code")


def test_ledger_shown_although_non_private(parties: Consortium, copy: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, trust="none", epsilon=None))
    (bundle / "ledgers").mkdir(exist_ok=True)
    shutil.copy(copy / "ledgers/clinic-a.jsonl", bundle / "ledgers")
    assert_fails(verify_bundle(reseal(bundle, parties), parties.fingerprint), "ledgers", "non-private")


def test_certificates_under_other_names(copy: Path, parties: Consortium, tmp_path: Path) -> None:
    folder = copy / "certificates"
    for a, b, words in (("clinic-a", "clinic-b", "another name"),
                        ("issuing-site", "issuing-coordinator", "role's name")):
        (folder / f"{a}.pem").rename(tmp_path / "aside")
        (folder / f"{b}.pem").rename(folder / f"{a}.pem")
        (tmp_path / "aside").rename(folder / f"{b}.pem")
        assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "certificates", words)


def test_issuing_ca_of_a_role_that_does_not_belong(copy: Path, parties: Consortium) -> None:
    (copy / "certificates/issuing-auditor.pem").write_bytes(parties.pem("issuing-auditor.pem"))
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "certificates", "not exactly those")


def test_tls_certificate_in_place_of_the_signing_one(copy: Path, parties: Consortium) -> None:
    (copy / "certificates/clinic-a.pem").write_bytes(parties.pem("issued/clinic-a/tls.pem"))
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "certificates", "identity.usage")


@pytest.mark.parametrize(("subject", "named"), [(sha("x"), None), (None, sha("x"))])
def test_manifest_of_another_contract(subject: str | None, named: str | None, copy: Path, parties: Consortium) -> None:
    (copy / "manifest.json").unlink()
    raw, digest = read_bundle(copy), contract(parties.signers).digest
    predicate = {"run": RUN, "contract": named or digest, "files": {name: raw.sha256(name) for name in raw.files}}
    envelope = make(parties.signers["hub"], MANIFEST.predicate_type, [("contract.json", subject or digest)], predicate)
    (copy / "manifest.json").write_bytes(envelope)
    verdict = verify_bundle(copy, parties.fingerprint)
    assert_fails(verdict, "manifest", "another subject")
    assert named is None or "manifest.json is bound to another contract" in verdict.steps[5].detail


def test_manifest_of_another_run(copy: Path, parties: Consortium) -> None:
    _writer(copy, parties, sealed=True, run="00" * 16).seal(parties.signers["hub"])
    assert_fails(verify_bundle(copy, parties.fingerprint), "contract", "manifest.json belongs to another run")


def test_statement_under_another_type(copy: Path, parties: Consortium) -> None:
    path = statement_path(copy, "closing", "clinic-a")
    path.rename(path.with_name(path.name.replace("closing", "acceptance")))
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "statements", "verify.type")


def test_cumulative_epsilon_that_falls(parties: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = privacy.ledger.epsilon
    monkeypatch.setattr(privacy.ledger, "epsilon",
                        lambda releases, delta: real(list(releases), delta) + (5 if len(list(releases)) < 3 else 0))
    bundle = write_bundle(tmp_path / "b", parties)
    assert_fails(verify_bundle(bundle, parties.fingerprint), "epsilon", "falls")


def test_other_noise_in_the_ledger(parties: Consortium, tmp_path: Path) -> None:
    weak = write_bundle(tmp_path / "b", parties, ledger_mechanism=lambda m: dataclasses.replace(m, sigma=2.0))
    assert_fails(verify_bundle(weak, parties.fingerprint), "ledgers", "another mechanism")


def test_ledger_with_a_flattering_accountant(parties: Consortium, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    real = privacy.ledger.epsilon
    monkeypatch.setattr(privacy.ledger, "epsilon", lambda releases, delta: real(releases, delta) / 2.5)
    bundle = write_bundle(tmp_path / "b", parties)
    assert_fails(verify_bundle(bundle, parties.fingerprint), "epsilon", "claims less epsilon than was spent")


def test_lineage_of_another_adjacency(parties: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = Ledger.create
    monkeypatch.setattr(privacy.ledger, "ADJACENCIES", ("replace_one",))
    monkeypatch.setattr(Ledger, "_check_mechanism", lambda *_: None)
    monkeypatch.setattr(Ledger, "create", lambda path, signer, **budget: create(
        path, signer, **{**budget, "adjacency": "replace_one"}))
    assert_fails(verify_bundle(write_bundle(tmp_path / "b", parties), parties.fingerprint), "ledgers", "adjacency")


def test_run_left_open(parties: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "close_run", lambda *_: None)
    assert_fails(verify_bundle(write_bundle(tmp_path / "b", parties), parties.fingerprint), "ledgers", "isn't closed")


def test_more_spent_than_the_contract_allows(parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, epsilon=0.5))
    assert_fails(verify_bundle(bundle, parties.fingerprint), "epsilon", "contract's epsilon")


def test_epsilon_claimed_without_privacy(parties: Consortium, tmp_path: Path) -> None:
    agreed = contract(parties.signers, trust="none", epsilon=None)
    bundle = write_bundle(tmp_path / "b", parties, agreed, edit=change("round-site", epsilon="1.0"))
    assert_fails(verify_bundle(bundle, parties.fingerprint), "epsilon", "non-private")


def test_coordinator_statement_signed_by_a_site(parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, signers={**parties.signers, "hub": parties.signers["clinic-a"]})
    verdict = verify_bundle(bundle, parties.fingerprint)
    assert_fails(verdict, "statements", "statement.key")
    assert_fails(verdict, "manifest", "statement.key")


def test_signed_under_another_ca(parties: Consortium, tmp_path: Path) -> None:
    other = Consortium(tmp_path / "other")
    bundle = write_bundle(tmp_path / "b", parties, signers={**parties.signers, "clinic-a": other.signers["clinic-a"]})
    assert_fails(verify_bundle(bundle, parties.fingerprint), "statements", "statement.key")
    shutil.copy(other.folder / "ca/issued/clinic-a/sign.pem", bundle / "certificates/clinic-a.pem")
    assert_fails(verify_bundle(reseal(bundle, parties), parties.fingerprint), "certificates", "identity.untrusted")


def test_whole_bundle_of_another_ca(parties: Consortium, tmp_path: Path) -> None:
    other = Consortium(tmp_path / "other")
    bundle = write_bundle(tmp_path / "b", other)
    verdict = verify_bundle(bundle, parties.fingerprint)
    assert failed(verdict) == {"anchor"}
    assert verify_bundle(bundle).verdict == "UNANCHORED"


def test_surplus_certificate(parties: Consortium, tmp_path: Path) -> None:
    crowd = Consortium(tmp_path / "crowd")
    agreed = contract(crowd.signers)
    crowd.enrol("clinic-e", Role.SITE)
    assert_fails(verify_bundle(write_bundle(tmp_path / "b", crowd, agreed), crowd.fingerprint), "contract", "sites")
    crowd.enrol("hub-2", Role.COORDINATOR)
    assert_fails(verify_bundle(write_bundle(tmp_path / "c", crowd, agreed), crowd.fingerprint), "certificates",
                 "exactly one coordinator")


# Ledgers that a site tampers with, and signs for ---------------------------------------------------------------------

def _lines(edit: Callable[[list[bytes]], list[bytes]]) -> Callable[[str, bytes], bytes]:
    return lambda site, data: b"".join(edit(data.splitlines(keepends=True))) if site == "clinic-b" else data


def _as_commitment(line: bytes) -> bytes:
    record = json.loads(line)
    return b'{"hash":"%s","seq":%d}\n' % (record["hash"].encode(), record["body"]["seq"])


LEDGERS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "record edited": lambda rows: [rows[0], rows[1].replace(b'"planned_steps":2', b'"planned_steps":1'), *rows[2:]],
    "record removed": lambda rows: [*rows[:3], *rows[5:]],
    "records reordered": lambda rows: [*rows[:3], rows[5], rows[6], rows[3], rows[4], *rows[7:]],
    "tail cut off": lambda rows: rows[:-3],
    "closing record cut off": lambda rows: rows[:-1],
    "reserve hidden as a commitment": lambda rows: [*rows[:3], _as_commitment(rows[3]), *rows[4:]],
    "charge hidden as commitments": lambda rows: [*rows[:3], *map(_as_commitment, rows[3:5]), *rows[5:]],
    "all hidden as commitments": lambda rows: [rows[0], *map(_as_commitment, rows[1:])],
    "first record hidden": lambda rows: [_as_commitment(rows[0]), *rows[1:]],
    "record repeated": lambda rows: [*rows[:3], rows[2], *rows[3:]],
    "garbage appended": lambda rows: [*rows, b"{}\n"],
    "emptied": lambda rows: [],
}


@pytest.mark.parametrize("lie", LEDGERS)
def test_ledger(lie: str, parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, extract=_lines(LEDGERS[lie]))
    assert_fails(verify_bundle(bundle, parties.fingerprint), "ledgers", "clinic-b")


def test_ledger_of_another_site(copy: Path, parties: Consortium) -> None:
    shutil.copy(copy / "ledgers/clinic-a.jsonl", copy / "ledgers/clinic-b.jsonl")
    verdict = verify_bundle(reseal(copy, parties), parties.fingerprint)
    assert_fails(verdict, "statements", "another subject")
    assert_fails(verdict, "ledgers")


# Files changed afterwards, by someone without and with the coordinator's key -----------------------------------------

def test_statement_edited(copy: Path, parties: Consortium) -> None:
    path = statement_path(copy, "round-site", "clinic-a")
    path.write_bytes(path.read_bytes().replace(b'"payload":"e', b'"payload":"f'))
    assert_fails(verify_bundle(copy, parties.fingerprint), "manifest", path.name)
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "statements")


def test_statement_deleted(copy: Path, parties: Consortium) -> None:
    statement_path(copy, "round", "hub", 1).unlink()
    assert_fails(verify_bundle(copy, parties.fingerprint), "manifest", "missing")
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "statements", "numbered")


def test_older_statement_repeated(copy: Path, parties: Consortium) -> None:
    shutil.copy(statement_path(copy, "round", "hub"), copy / f"statements/{following(copy)}-round-hub.json")
    assert_fails(verify_bundle(copy, parties.fingerprint), "manifest", "doesn't list")
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "rounds", "repeated")


def test_statement_under_another_name(copy: Path, parties: Consortium) -> None:
    path = statement_path(copy, "round-site", "clinic-a")
    path.rename(path.with_name(path.name.replace("clinic-a", "clinic-b")))
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "statements", "another name")


def test_contract_swapped(copy: Path, parties: Consortium) -> None:
    (copy / "contract.json").write_bytes(contract(parties.signers, purpose=CANARY).to_bytes())
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "contract", "another contract")


def test_contract_reformatted(copy: Path, parties: Consortium) -> None:
    (copy / "contract.json").write_bytes((copy / "contract.json").read_bytes() + b"\n")
    assert_fails(verify_bundle(reseal(copy, parties), parties.fingerprint), "contract", "canonical")


@pytest.mark.parametrize("name", ["contract.json", "manifest.json", "statements/000001-contract-lab.json",
                                  "statements/000002-acceptance-clinic-a.json"])
@pytest.mark.case(29)
def test_duplicated_json_key(copy: Path, parties: Consortium, name: str) -> None:
    text = (copy / name).read_text()
    key = "purpose" if name == "contract.json" else "payloadType"
    (copy / name).write_text(f'{{"{key}":"{CANARY}",{text[1:]}')
    step = {"contract.json": "contract", "manifest.json": "manifest"}.get(name, "statements")
    assert_fails(verify_bundle(copy, parties.fingerprint), step)


def test_extra_file(copy: Path, parties: Consortium) -> None:
    shutil.copy(copy / "ledgers/clinic-a.jsonl", copy / "ledgers/clinic-x.jsonl")
    assert_fails(verify_bundle(copy, parties.fingerprint), "manifest", "doesn't list")


@pytest.mark.parametrize("name", ["contract.json", "certificates/root.pem", "ledgers/clinic-a.jsonl", "manifest.json",
                                  "certificates/issuing-site.pem", "certificates/issuing-engineer.pem",
                                  "certificates/hub.pem", "certificates/lab.pem"])
def test_missing_file(copy: Path, parties: Consortium, name: str) -> None:
    (copy / name).unlink()
    assert_fails(verify_bundle(copy, parties.fingerprint), "manifest")


# Folders made to hurt the reader -------------------------------------------------------------------------------------

def _link(folder: Path) -> None:
    (folder / "contract.json").rename(folder.parent / "contract.json")
    (folder / "contract.json").symlink_to(folder.parent / "contract.json")


def _linked_folder(folder: Path) -> None:
    shutil.move(folder / "ledgers", folder.parent / "elsewhere")
    (folder / "ledgers").symlink_to(folder.parent / "elsewhere")


def _huge(folder: Path) -> None:
    with (folder / "ledgers/clinic-a.jsonl").open("ab") as file:
        file.truncate(1 << 40)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "symlink": _link,
    "linked folder": _linked_folder,
    "huge file": _huge,
    "fifo": lambda f: os.mkfifo(f / "ledgers/clinic-x.jsonl"),
    "strange name": lambda f: (f / f"<script>{CANARY}").write_text(""),
    "name with a newline": lambda f: (f / f"statements/000099-round-hub.json\n{CANARY}").write_text(""),
    "folder": lambda f: (f / CANARY).mkdir(),
    "nested folder": lambda f: (f / "ledgers" / CANARY).mkdir(),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_folder(what: str, copy: Path, parties: Consortium) -> None:
    HOSTILE[what](copy)
    verdict = verify_bundle(copy, parties.fingerprint)
    assert_fails(verdict, "files")
    assert not verdict.anchored
    assert not any(step.ok for step in verdict.steps)


def test_too_many_files_and_bytes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy.bundle, "MAX_FILES", 20)
    with pytest.raises(CheckFailed, match=r"bundle\.limits"):
        read_bundle(copy)
    monkeypatch.undo()
    monkeypatch.setattr(privacy.bundle, "MAX_BUNDLE_BYTES", 5000)
    assert_fails(verify_bundle(copy), "files", "bundle.limits")


def test_an_unforeseen_error_is_a_finding(good: Path, parties: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(*_: object) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr("privacy.verify_run.check_extract", boom)
    assert_fails(verify_bundle(good, parties.fingerprint), "ledgers", "verify.RuntimeError")


# Writing -------------------------------------------------------------------------------------------------------------

def _writer(folder: Path, parties: Consortium, *, sealed: bool = False, run: str = RUN, **changes: Any) -> BundleWriter:
    agreed = contract(parties.signers, **changes)
    if sealed:
        (folder / "manifest.json").unlink()
    return BundleWriter(folder, run, agreed.to_bytes(), parties.pem("root.pem"), {}, parties.certificates())


def test_writer_goes_on_after_a_kill(parties: Consortium, tmp_path: Path) -> None:
    first = _writer(tmp_path / "b", parties)
    assert first.add_statement("round", "hub", b"one") == "statements/000001-round-hub.json"
    (tmp_path / "b/statements/.000002-round-hub.json.77.tmp").write_bytes(b"tor")
    second = _writer(tmp_path / "b", parties)
    assert second.add_statement("round", "hub", b"one") == "statements/000001-round-hub.json"
    assert second.add_statement("round-site", "clinic-a", b"two") == "statements/000002-round-site-clinic-a.json"
    assert len(list((tmp_path / "b/statements").iterdir())) == 2


def test_writer_refuses(parties: Consortium, good: Path, tmp_path: Path) -> None:
    def code(act: Callable[[], object]) -> str:
        with pytest.raises(ConsiloError) as caught:
            act()
        return caught.value.code

    writer = _writer(tmp_path / "b", parties)
    assert code(lambda: _writer(tmp_path / "b", parties, purpose="Another")) == "bundle.other_run"
    assert code(lambda: _writer(good, parties)) == "bundle.sealed"
    assert code(lambda: writer.add_statement("round", "../x", b"")) == "bundle.name"
    assert code(lambda: writer.add_statement("rumour", "hub", b"1")) == "bundle.name"
    assert code(lambda: writer.add_statement("round", "site-a", b"2")) == "bundle.name"
    assert code(lambda: writer.add_ledger("../../x", b"")) == "bundle.name"
    for name in ("root", "issuing-site", "issuing-x"):  # a party of that name would stand in a CA's place
        assert code(lambda: BundleWriter(tmp_path / "c", RUN, b"{}", b"root", {}, {name: b"pem"})) == "bundle.name"  # noqa: B023
    writer.seal(parties.signers["hub"])
    with pytest.raises(Refused, match=r"bundle\.sealed"):
        writer.add_ledger("clinic-a", b"")


# Without the heavy stack ---------------------------------------------------------------------------------------------

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "flwr", "hydra", "omegaconf", "opacus", "dp_accounting", "transformers"}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import socket
socket.socket.connect = None
from pathlib import Path
"""


def test_verifies_without_torch_flower_hydra_or_network(good: Path, parties: Consortium) -> None:
    code = BLOCK + ("from privacy.verify import verify_bundle\n"
                    "print(verify_bundle(Path(sys.argv[1]), sys.argv[2]).verdict, 'matplotlib' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code, str(good), parties.fingerprint], capture_output=True, text=True,
                         check=True, cwd=Path(privacy.bundle.__file__).parent.parent)
    assert out.stdout.split() == ["PASS", "False"]
