"""An audit and an attack demonstration beside the evidence: of the documented form, marked as unsigned, never trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evidence_fixture import Consortium, contract, write_bundle
from extras_kit import CANARY, attack, audit
from test_report import FORBIDDEN, read, words

from privacy.cli import app
from privacy.cli_edge import run
from privacy.errors import UsageError
from privacy.report import write_report

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="module")
def good(parties: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("good") / "evidence", parties)


def put(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_audit_is_shown_as_unsigned_and_no_assurance(good: Path, parties: Consortium, tmp_path: Path) -> None:
    file = put(tmp_path / "audit.json", audit(parties))
    page, facts = read(write_report(good, tmp_path, ca=parties.fingerprint, audit=file))
    said, text = facts["extras"]["audit"], words(page)
    assert said["signed"] is False and said["verdict"] == "consistent" and said["contract_mechanism"]
    for phrase in ("Not part of the signed evidence 不属于已签名证据的内容", "Nobody signed this section.",
                   "A lower bound, not an assurance", "并非保证", said["tests"]["noise"], said["lower_bound"]["f_dp"],
                   said["sha256"]):
        assert phrase in text, phrase
    assert "VIOLATION" not in text and "statement" not in said and not FORBIDDEN.search(page)


def test_violation_is_at_the_top(good: Path, parties: Consortium, tmp_path: Path) -> None:
    file = put(tmp_path / "audit.json", audit(parties, noise=0.25))
    page, facts = read(write_report(good, tmp_path, ca=parties.fingerprint, audit=file))
    assert facts["extras"]["audit"]["verdict"] == "violation"
    assert page.index("AUDIT: VIOLATION") < page.index("Who is protected against whom")


@pytest.mark.parametrize("change", [
    lambda a: a.update(site="elsewhere"), lambda a: a.update(unit="person"), lambda a: a["claimed"].update(sigma="3.1"),
    lambda a: a["claimed"].update(q="0.4"), lambda a: a["claimed"].update(clip="4.0"),
    lambda a: a["claimed"].update(delta="1e-06")])
def test_audit_of_something_else_says_so(change: Change, good: Path, parties: Consortium, tmp_path: Path) -> None:
    document = audit(parties)
    change(document)
    page, facts = read(write_report(good, tmp_path, ca=parties.fingerprint, audit=put(tmp_path / "a.json", document)))
    assert not facts["extras"]["audit"]["contract_mechanism"]
    assert "Another mechanism or site than those of this run's contract" in page


@pytest.mark.parametrize("change", [
    lambda a: a.update(verdict="violation"), lambda a: a["tests"].update(noise="0.000001"), lambda a: a.pop("estimate"),
    lambda a: a.update(extra=1), lambda a: a.update(format="consilo.audit/2"), lambda a: a.update(correct=10**6),
    lambda a: a["claimed"].update(epsilon=4.2), lambda a: a["claimed"].update(epsilon="nan"), lambda a: a.update(live=1),
    lambda a: a.update(confidence="1.0"), lambda a: a.update(site="<b>"), lambda a: a.update(statement="x" * 70_000)])
def test_malformed_audit(change: Change, good: Path, parties: Consortium, tmp_path: Path) -> None:
    """A verdict that its own p-values contradict, missing and unknown keys, wrong types, sizes: refused, nothing written."""
    document = audit(parties)
    change(document)
    with pytest.raises(UsageError, match=r"^report\.audit") as e:
        write_report(good, tmp_path / "out", ca=parties.fingerprint, audit=put(tmp_path / "audit.json", document))
    assert "<b>" not in str(e.value) and not (tmp_path / "out").exists()


def test_attack_shows_counts_and_never_the_sentence(good: Path, parties: Consortium, tmp_path: Path) -> None:
    file = put(tmp_path / "attack.json", attack())
    page, facts = read(write_report(good, tmp_path, ca=parties.fingerprint, attack=file))
    said, text = facts["extras"]["attack"], words(page)
    assert CANARY not in page and CANARY not in json.dumps(facts) and said["signed"] is False
    assert (said["plain"], said["noise"]["recovered"]) == ({"recovered": 30, "of": 30, "releases": 3}, 0)
    for phrase in ("it read 30 of 30", "not on this run or its adapter", "and on another base model",
                   "nor that it is enough", "says nothing of other attacks", "Nobody signed this section."):
        assert phrase in text, phrase
    assert not FORBIDDEN.search(page)


@pytest.mark.parametrize("change", [
    lambda a: a.pop("text"), lambda a: a.update(more=1), lambda a: a["scenarios"].pop("noise"),
    lambda a: a["scenarios"]["noise"].update(recovered=31), lambda a: a["scenarios"]["noise"].update(rate=0.5),
    lambda a: a["mechanism"].update(epsilon=float("inf")), lambda a: a["mechanism"].update(epsilon="8"),
    lambda a: a["seeds"].clear(), lambda a: a.update(tokens=["x"] * 2000)])
def test_malformed_attack(change: Change, good: Path, parties: Consortium, tmp_path: Path) -> None:
    document = attack()
    change(document)
    with pytest.raises(UsageError, match=r"^report\.attack"):
        write_report(good, tmp_path / "out", ca=parties.fingerprint, attack=put(tmp_path / "attack.json", document))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"format":"consilo.audit/1","format":"consilo.audit/1"}', b"\xff",
                                  b"[" * 100, None])
def test_what_is_no_document_at_all(data: bytes | None, good: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(UsageError, match=r"^report\.audit"):
        write_report(good, tmp_path / "out", audit=file)
    with pytest.raises(UsageError, match=r"^report\.attack"):
        write_report(good, tmp_path / "out", attack=file)


def test_case_3_no_epsilon_enters_a_non_private_report_from_beside(parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, trust="none", epsilon=None))
    with pytest.raises(UsageError, match=r"^report\.audit.*NON-PRIVATE"):
        write_report(bundle, tmp_path / "out", ca=parties.fingerprint, audit=put(tmp_path / "a.json", audit(parties)))
    with pytest.raises(UsageError, match=r"^report\.attack.*NON-PRIVATE"):
        write_report(bundle, tmp_path / "out", ca=parties.fingerprint, attack=put(tmp_path / "b.json", attack()))
    assert not (tmp_path / "out").exists()


def test_case_29_a_failed_bundle_shows_no_extras(good: Path, parties: Consortium, tmp_path: Path) -> None:
    file = put(tmp_path / "audit.json", audit(parties))
    page, facts = read(write_report(good, tmp_path, ca="0" * 64, audit=file))
    assert facts["title"]["en"] == "FAILED" and "extras" not in facts and "audit" not in words(page).lower()


def test_command_takes_both(good: Path, parties: Consortium, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(put(tmp_path / "audit.json", audit(parties))), str(put(tmp_path / "attack.json", attack()))]
    assert run(app, ["report", str(good), "--out", str(tmp_path / "out"), "--ca", parties.fingerprint,
                     "--audit", files[0], "--attack", files[1], "--json"]) == 0
    capsys.readouterr()
    assert set(json.loads((tmp_path / "out" / "report.json").read_bytes())["extras"]) == {"audit", "attack"}
    assert run(app, ["report", str(good), "--out", str(tmp_path / "o"), "--audit", files[1], "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "report.audit"
