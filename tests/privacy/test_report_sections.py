"""The report's sections: a lost site, budget, log and witnesses, public metric, fields, articles, claims."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from evidence_fixture import SITES, Consortium, contract, reseal, write_bundle
from test_report import read, words

from privacy.canonical import canonical
from privacy.contract import Contract
from privacy.errors import UsageError
from privacy.report import write_report
from privacy.report_fields import ARTICLES, LAWS
from privacy.report_plots import MAX_BARS, Bar, metric_plot, sites_plot

CLAIMS = Path(__file__).parents[2] / "docs" / "claims.md"


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("consortium"))


def without_witnesses(folder: Path, parties: Consortium, *gone: str) -> Path:
    """The last signed head as if these sites had never signed it."""
    last = max((folder / "log").glob("[0-9]*.json"))
    head = json.loads(last.read_bytes())
    head["witnesses"] = {name: said for name, said in head["witnesses"].items() if name not in gone}
    last.write_bytes(canonical(head))
    return reseal(folder, parties)


def lost(folder: Path, parties: Consortium, who: str, agreed: Contract | None = None) -> Path:
    """A bundle of a run in which a site trained to the end and then vanished for good, its ledger with it."""
    def left_out(kind: str, said: dict[str, Any]) -> dict[str, Any] | None:
        return None if kind == "closing" and said["site"] == who else said

    write_bundle(folder, parties, agreed, seal=False, edit=left_out)
    (folder / "ledgers" / f"{who}.jsonl").unlink()
    return without_witnesses(folder, parties, who)


def report(bundle: Path, parties: Consortium) -> tuple[str, dict[str, Any]]:
    return read(write_report(bundle, bundle.parent, ca=parties.fingerprint))


@pytest.mark.parametrize("who", ["clinic-a", "clinic-d"])
def test_a_site_whose_ledger_never_came_is_named(who: str, parties: Consortium, tmp_path: Path) -> None:
    """clinic-a signed every attempt, so it is among those that spent most; clinic-d missed one before it signed."""
    page, facts = report(lost(tmp_path / "b", parties, who), parties)
    assert facts["verification"]["verdict"] == "PASS" and facts["unaccounted"] == [who] and not facts["over"]
    site = next(s for s in facts["sites"] if s["name"] == who)
    others = [s for s in facts["sites"] if s["name"] != who]
    assert (site["ledger"], site["remaining"], site["rounds_left"]) == (False, None, None)
    assert all(s["ledger"] and float(s["spent"]) >= float(site["spent"]) > 0 for s in others) and len(others) == 3
    assert site["charges"] == (4 if who == "clinic-a" else 3)
    assert {"kind": "unaccounted", "round": 0, "attempt": 0, "stage": "", "reason": "", "sites": [who]} in facts["incidents"]
    text = words(page)
    for phrase in (f"Ledger missing: {who}", f"缺少账本：{who}", "Within budget, as far as ledgers came",
                   "NO LEDGER, statements", f"≥ {site['run_alone']}", "trained, and its ledger never came",
                   "there the odds may be worse", "more where a ledger is missing"):
        assert phrase in text, phrase
    assert f"{who} (no ledger)" in page


def test_a_site_over_the_contracts_budget_is_never_within(parties: Consortium, tmp_path: Path) -> None:
    agreed = contract(parties.signers, epsilon=2.2)
    sites = tuple(s.model_copy(update={"sigma": 1.5}) if s.name == "clinic-a" else s for s in agreed.sites)
    page, facts = report(lost(tmp_path / "b", parties, "clinic-a", agreed.model_copy(update={"sites": sites})), parties)
    if facts["verification"]["verdict"] != "FAIL":
        assert facts["over"] == ["clinic-a"] and "OVER BUDGET" in page and "超出预算" in page
    assert "Within budget" not in page and "在预算之内" not in page


def test_log_and_witnesses(parties: Consortium, tmp_path: Path) -> None:
    page, facts = report(write_bundle(tmp_path / "b", parties), parties)
    log = facts["log"]
    assert (log["operator"], log["witnesses"], log["silent"], log["least"]) == ("hub", list(SITES), [], 3)
    assert log["all_rounds"] and log["heads"] == 5 and log["root"] in page
    assert "All rounds lie under such a head." in words(page) and "perhaps for the last" not in page
    page, facts = report(without_witnesses(tmp_path / "b", parties, "clinic-b", "clinic-c"), parties)
    assert facts["verification"]["verdict"] == "PASS"
    assert facts["log"]["silent"] == ["clinic-b", "clinic-c"] and not facts["log"]["all_rounds"]
    assert "Did not 未签署 clinic-b, clinic-c" in words(page) and "but perhaps for the last one" in page


def test_public_metric_by_round(parties: Consortium, tmp_path: Path) -> None:
    page, facts = report(write_bundle(tmp_path / "b", parties), parties)
    assert [(e["round"], e["metric"]) for e in facts["evaluations"]] == [(0, "0.5"), (1, "0.6"), (2, "0.75"), (3, "0.81")]
    assert 'aria-label="Public metric by round"' in page
    assert "public test (400 units, public: nobody's records)" in words(page)


def test_every_section_is_there_in_both_languages(parties: Consortium, tmp_path: Path) -> None:
    page, _ = report(write_bundle(tmp_path / "b", parties), parties)
    found = re.findall(r'<h2>([^<]+)<span lang="zh-Hans">([^<]+)</span></h2>', page)
    assert [en for en, _ in found] == [
        "Verdict", "Who is protected against whom", "In plain words", "Figures", "The contract, and who agreed to it",
        "Mechanism", "What was released", "Incidents", "Transparency log", "What is not covered",
        "Which field serves which article", "How to verify"]
    assert all(re.search(r"[\u4e00-\u9fff]", zh) for _, zh in found)
    rows = re.findall(r'<th>([^<]+)<small lang="zh-Hans">', page)
    assert {"Protected", "Meaning", "Cap", "Against", "How", "Period", "Lifetime total"} <= set(rows)
    assert len(re.findall(r"<figure\b", page)) == 4


def test_fields_stand_under_the_registrys_groups(parties: Consortium, tmp_path: Path) -> None:
    agreed = contract(parties.signers, unit="person", sampled="record", k_max=3)
    page, facts = report(write_bundle(tmp_path / "b", parties, agreed), parties)
    groups = {g["group"]: {f["field"]: f for f in g["fields"]} for g in facts["disclosure"]}
    assert list(groups) == ["deployment", "privacy_loss", "model", "accounting", "implementation", "sp800_226"]
    assert groups["privacy_loss"]["privacy_unit"]["en"] == "person, with all its records"
    assert "a person owns at most 3 of them" in groups["implementation"]["mechanism"]["en"]
    assert "每人至多 3 条" in groups["implementation"]["mechanism"]["zh"]
    text = words(page)
    assert all(f["en"] in text and f["zh"] in text for fields in groups.values() for f in fields.values())


@pytest.mark.parametrize("trust", ["local", "none"])
def test_articles_name_fields_that_the_json_has(trust: str, parties: Consortium, tmp_path: Path) -> None:
    agreed = contract(parties.signers, trust=trust, epsilon=8.0 if trust == "local" else None)
    page, facts = report(write_bundle(tmp_path / "b", parties, agreed), parties)
    for row in facts["articles"]:
        value: Any = facts
        for key in row["field"].split("."):
            value = value[key]
        assert value and [a["law"] for a in row["articles"]] == list(LAWS) and row["zh"] in page
    named = {row["field"] for row in facts["articles"]}
    assert named == {path for path, *_ in ARTICLES} - (set() if trust == "local" else {"budget", "odds"})
    assert "no legal claim" in page and "不构成法律意见" in page
    assert not re.search(r"\bcompl(y|ies|iant|iance)\b|(?<!聚)合规", words(page))


@pytest.mark.parametrize("changes", [{}, {"secagg": False}, {"trust": "none", "epsilon": None},
                                     {"secagg": False, "trust": "none", "epsilon": None}])
def test_claims_on_the_page_are_rows_and_fit_the_run(changes: dict[str, Any], parties: Consortium, tmp_path: Path) -> None:
    page, facts = report(write_bundle(tmp_path / "b", parties, contract(parties.signers, **changes)), parties)
    shown = {claim for ids in re.findall(r'data-claim="([^"]*)"', page) for claim in ids.split()}
    assert shown == set(facts["claims"]) <= set(re.findall(r"^\| (C\d+) \|", CLAIMS.read_text(), re.M))
    assert ("C1" in shown) == ("C3" in shown) == (changes.get("trust") != "none")
    assert ("C2" in shown) == changes.get("secagg", True)


def test_a_site_bundle_is_not_a_run(tmp_path: Path) -> None:
    from privacy.site_bundle import MARK

    (tmp_path / MARK).write_bytes(b"{}")
    with pytest.raises(UsageError, match=r"cli\.usage"):
        write_report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_figures_of_many_sites_and_metrics() -> None:
    bars = [Bar(f"site-{i}", i / 10, i / 5, 30.0, i % 7 > 0) for i in range(100)]
    drawn = sites_plot(bars, 8.0)
    assert drawn == sites_plot(bars, 8.0) and "site-99<" in drawn and "site-1<" not in drawn
    assert len(re.findall(r">site-\d+", drawn)) == MAX_BARS
    assert "recall" in metric_plot([(0, 0.5, "accuracy"), (1, 0.6, "accuracy"), (1, 0.7, "recall")])
