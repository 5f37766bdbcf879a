"""The report: made from verified facts alone, honest in its titles and numbers, the same bytes each time."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evidence_fixture import SITES, Consortium, contract, sha, write_bundle

import privacy.report
from privacy.accountant import Release, delta_at, epsilon
from privacy.bundle import read_bundle
from privacy.report import write_report
from privacy.report_plots import Charge, spending_plot, trade_off
from privacy.report_spending import odds as odds_of

CANARY = "canary-7f3a"
VOID = {"meta", "br", "link", "img", "path", "use"}
FORBIDDEN = re.compile(r"anonym|匿名|\bsafe(ly|ty)?\b|✓|✔|✅|☑", re.I)


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="module")
def good(parties: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("good") / "evidence", parties)


def read(page: Path) -> tuple[str, dict]:
    return page.read_text(encoding="utf-8"), json.loads(page.with_suffix(".json").read_text())


def words(page: str) -> str:
    """What a reader sees: no style, no figure, no tags."""
    bare = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]+>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(bare))


class Balanced(HTMLParser):
    """Collects tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self.stack or self.stack.pop() != tag):
            self.wrong.append(tag)


def test_report_of_a_valid_bundle(good: Path, parties: Consortium, tmp_path: Path) -> None:
    page, facts = read(write_report(good, tmp_path, ca=parties.fingerprint))
    assert facts["verification"]["verdict"] == "PASS"
    assert facts["command"] == f"fl-privacy verify evidence --ca {parties.fingerprint}"
    m = contract(parties.signers).mechanism(SITES[0])
    true = epsilon([Release(m.q, m.sigma, 4 * m.steps)], m.delta)  # 3 rounds and a void attempt
    for site in facts["sites"]:
        assert true <= float(site["run_alone"]) <= true + 1.1e-4
        assert site["spent"] == site["run_alone"] and site["charges"] == 4
        assert math.isclose(float(site["remaining"]), 10 - float(site["spent"]), abs_tol=1e-9)
        left = site["rounds_left"]
        assert epsilon([Release(m.q, m.sigma, (4 + left) * m.steps)], m.delta) <= 10
        assert epsilon([Release(m.q, m.sigma, (5 + left) * m.steps)], m.delta) > 10 - 2e-3
    text = words(page)
    for phrase in ("Within budget", "在预算之内", "A signature can't prove that the noise was really drawn",
                   "签名不能证明", facts["command"], facts["sites"][0]["spent"], "secagg.forged_share",
                   "officer of clinic-b", "sums over at least 3 sites", "hidden in a sum over at least 2 sites",
                   "至少 3 个机构的总和", "至少 2 个机构的总和", "rounds with all 4 sites: 1, with fewer: 2"):
        assert phrase in text
    for other in ("UNANCHORED", "FAILED", "NON-PRIVATE", "INDIVIDUAL UPDATES VISIBLE"):
        assert other not in text


def test_who_agreed_to_the_contract(parties: Consortium, tmp_path: Path) -> None:
    """Signature, sign-offs, expiry, approvals, code and metrics, in both languages and in JSON."""
    board = {"body": "Ethics board", "who": "Prof Amara <chair>", "reference": "EB-2026-17"}
    agreed = contract(parties.signers, metrics=["accuracy", "recall"], sign_off=[board, {**board, "body": "DPO"}])
    page, facts = read(write_report(write_bundle(tmp_path / "b", parties, agreed), tmp_path, ca=parties.fingerprint))
    said = facts["contract"]
    assert said["signed_by"] == {"name": "lab", "organisation": "Organisation of lab"}
    assert (said["purpose"], said["expires"], said["metrics"]) == (agreed.purpose, agreed.expires, ["accuracy", "recall"])
    assert (said["code_digest"], said["code"], said["sign_off"]) == (agreed.code, "0.1.0", [board, {**board, "body": "DPO"}])
    assert facts["approvals"] == [{
        "site": name, "organisation": f"Organisation of {name}", "approved_by": f"director of {name}",
        "approved": "2026-03-01T09:30:00+00:00", "approver": f"officer of {name}", "policy": sha("policy", name),
        "code": agreed.code} for name in SITES]
    text = words(page)
    for phrase in ("The contract, and who agreed to it", "合约，以及同意合约的各方", "Purpose 用途 A test of evidence",
                   "Signed by 签署人 lab, engineer · 工程师 Organisation of lab",
                   "Signed off 用途审批 Ethics board: Prof Amara <chair> (EB-2026-17) DPO: Prof Amara <chair> (EB-2026-17)",
                   "Expires 有效期至 2099-01-01T00:00:00Z", "Released metrics 公开的评测指标 accuracy, recall", agreed.code,
                   *(f"{name} Organisation of {name} director of {name} 2026-03-01T09:30:00+00:00 {sha('policy', name)} "
                     f"officer of {name}" for name in SITES)):
        assert phrase in text, phrase
    assert "none recorded" not in text


def test_no_sign_off_is_said(good: Path, parties: Consortium, tmp_path: Path) -> None:
    page, facts = read(write_report(good, tmp_path, ca=parties.fingerprint))
    assert facts["contract"]["sign_off"] == [] and "Signed off 用途审批 none recorded · 无记录" in words(page)


def test_same_bytes_twice_whatever_the_reader_styles(good: Path, parties: Consortium, tmp_path: Path) -> None:
    import matplotlib as mpl

    first = write_report(good, tmp_path / "a", ca=parties.fingerprint)
    with mpl.rc_context({"font.size": 22.0, "svg.fonttype": "path", "axes.facecolor": "black"}):
        second = write_report(good, tmp_path / "b", ca=parties.fingerprint)
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".json").read_bytes() == second.with_suffix(".json").read_bytes()


def test_unanchored_report_says_so_and_names_no_fingerprint(good: Path, parties: Consortium, tmp_path: Path) -> None:
    page, facts = read(write_report(good, tmp_path))
    assert facts["verification"]["verdict"] == "UNANCHORED" and "UNANCHORED" in words(page)
    assert parties.fingerprint not in page
    assert facts["command"].endswith("--ca SHA256")


def test_case_29_failed_bundle_shows_red_and_nothing_else(good: Path, parties: Consortium, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(good, tmp_path / "evidence"))
    (copy / "contract.json").write_bytes(contract(parties.signers, purpose=CANARY).to_bytes())
    page, facts = read(write_report(copy, tmp_path / "out", ca=parties.fingerprint))
    assert facts.keys() == {"schema", "title", "verification", "command"}
    assert facts["title"]["en"] == "FAILED" and '<h1 class="red">FAILED' in page
    for hidden in (CANARY, "officer of", "director of", "Approved by", "Signed by", "Within budget", "Organisation"):
        assert hidden not in page


def test_case_3_non_private_has_its_title_and_no_epsilon(parties: Consortium, tmp_path: Path) -> None:
    agreed = contract(parties.signers, trust="none", epsilon=None)
    page, facts = read(write_report(write_bundle(tmp_path / "b", parties, agreed), tmp_path, ca=parties.fingerprint))
    assert "<title>NON-PRIVATE" in page and '<h1 class="red">NON-PRIVATE' in page
    assert not {"sites", "budget", "odds"} & facts.keys()
    assert not re.search(r"(epsilon|ε|delta)\W{0,12}\d", words(page)) and "Within budget" not in page
    figures = re.findall(r'<figure role="img" aria-label="([^"]+)">', page)
    assert figures == ["Public metric by round"] and "epsilon" not in "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert facts["claims"] == ["C2", "C5", "C7", "C8"]
    assert [g["group"] for g in facts["disclosure"]] == ["deployment", "model", "implementation", "sp800_226"]


def test_individual_updates_visible(parties: Consortium, tmp_path: Path) -> None:
    seen = write_bundle(tmp_path / "b", parties, contract(parties.signers, secagg=False))
    page, _ = read(write_report(seen, tmp_path, ca=parties.fingerprint))
    assert "<title>INDIVIDUAL UPDATES VISIBLE" in page
    both = write_bundle(tmp_path / "c", parties, contract(parties.signers, secagg=False, trust="none", epsilon=None))
    page, facts = read(write_report(both, tmp_path, ca=parties.fingerprint))
    assert facts["title"]["en"] == "NON-PRIVATE" and facts["title"]["sub_en"] == "INDIVIDUAL UPDATES VISIBLE"
    assert "sums over at least" not in page


def test_other_jobs_of_the_lineage_are_counted_as_claimed(parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, spent_before=2)
    page, facts = read(write_report(bundle, tmp_path, ca=parties.fingerprint))
    for site in facts["sites"]:
        assert float(site["spent"]) > float(site["run_alone"])
        assert site["other_runs"] and site["rounds_left"] is None
    assert "what the site's ledger claims" in words(page)


def test_incidents_of_a_run_that_went_badly(parties: Consortium, tmp_path: Path) -> None:
    """Dropouts before and after sums, and in a void attempt for which two sites were charged that had not signed yet."""
    gone = "site.unreachable"
    drops = {(1, 0): {"clinic-d": ("masked", "secagg.vector")},
             (2, 0): {"clinic-a": ("update", gone), "clinic-b": ("shares", gone), "clinic-c": ("unmask", gone)},
             (3, 0): {"clinic-a": ("vote", "site.session_aborted"), "clinic-b": ("unmask", gone)}}
    page, facts = read(write_report(write_bundle(tmp_path / "b", parties, drops=drops), tmp_path, ca=parties.fingerprint))
    assert facts["verification"]["verdict"] == "PASS"
    assert [(i["kind"], i["round"], i["attempt"], i["stage"], i["reason"], i["sites"]) for i in facts["incidents"]] == [
        ("missing", 1, 0, "masked", "secagg.vector", ["clinic-d"]), ("void", 2, 0, "", "secagg.forged_share", []),
        ("dropped", 2, 0, "update", gone, ["clinic-a"]), ("dropped", 2, 0, "shares", gone, ["clinic-b"]),
        ("dropped", 2, 0, "unmask", gone, ["clinic-c"]), ("unsigned", 2, 0, "", "", ["clinic-a", "clinic-b"]),
        ("silent", 3, 0, "vote", "site.session_aborted", ["clinic-a"]), ("silent", 3, 0, "unmask", gone, ["clinic-b"])]
    assert all(site["charges"] == 4 for site in facts["sites"])
    assert (facts["rounds"]["full"], facts["rounds"]["partial"]) == (2, 1)
    for phrase in ("missing from the sum · 未计入总和 sending the update · 发送更新: secagg.vector clinic-d",
                   "void: secagg.forged_share", f"dropped out · 退出 training · 训练: {gone} clinic-a",
                   f"dropped out · 退出 key shares · 密钥份额: {gone} clinic-b", "charged, without a statement",
                   "in the sum, then dropped out · 已计入总和，其后退出 vote on the sum · 对总和的投票: site.session",
                   f"unmasking · 去除掩码: {gone} clinic-b"):
        assert phrase in words(page)


def test_text_from_the_bundle_never_becomes_markup(parties: Consortium, tmp_path: Path) -> None:
    attack = f"<script>{CANARY}</script><img src=x onerror=1>{{{{ 7*7 }}}}"
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, purpose=attack))
    page, _ = read(write_report(bundle, tmp_path, ca=parties.fingerprint))
    assert html.escape(attack) in page
    assert "<script" not in page and "<img" not in page and ">49<" not in page


def test_folder_name_is_quoted_in_the_command(good: Path, parties: Consortium, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(good, tmp_path / "a b; rm <x>"))
    page, facts = read(write_report(odd, tmp_path / "out", ca=parties.fingerprint))
    assert facts["command"].startswith("fl-privacy verify 'a b; rm <x>' --ca ")
    assert "<x>" not in page


@pytest.mark.parametrize("kind", ["private", "none", "visible", "failed"])
def test_form_and_words(kind: str, good: Path, parties: Consortium, tmp_path: Path) -> None:
    changes = {"none": {"trust": "none", "epsilon": None}, "visible": {"secagg": False}}.get(kind, {})
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, **changes))
    page, _ = read(write_report(bundle, tmp_path, ca="0" * 64 if kind == "failed" else parties.fingerprint))
    assert not FORBIDDEN.search(page)
    assert "//" not in page and "@import" not in page and not re.search(r"\s(src|href)=[\"'](?!#)", page)
    assert not re.search(r"url\((?!#)", page)
    parser = Balanced()
    parser.feed(page)
    assert parser.wrong == [] and parser.stack == []
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert page.count('lang="zh-Hans"') >= 5


def test_odds_are_bounds_on_any_attacker(good: Path, parties: Consortium, tmp_path: Path) -> None:
    """Against the exact optimum for one unsampled Gaussian, where the balanced error is Phi(-1 / (2 sigma))."""
    for sigma in (0.3, 1.0, 4.0):
        releases = [Release(1.0, sigma, 1)]
        eps = epsilon(releases, 1e-5)
        grid = [1.25 * eps * i / 24 for i in range(25)]
        odds = odds_of(grid, [delta_at(releases, e, interval=1e-3) for e in grid], eps, 1e-5)
        exact = 50 * math.erfc(1 / (2 * sigma) / math.sqrt(2))
        assert float(odds["out"]) <= exact <= float(odds["out"]) + 2
        assert 100 - exact <= float(odds["in"]) <= 100 - exact + 2
        assert float(odds["pair_in"]) >= float(odds["in"])


def test_trade_off_curve_lies_below_the_exact_one() -> None:
    releases = [Release(1.0, 1.0, 1)]
    grid = list(np.linspace(0, 6, 25))
    alarm, miss = trade_off(grid, [delta_at(releases, e) for e in grid])
    from scipy.special import ndtr, ndtri

    exact = ndtr(ndtri(1 - alarm) - 1)
    assert np.all(miss <= exact + 1e-9) and np.max(exact - miss) < 0.01
    assert miss[0] > 0.99 and miss[-1] == 0


def test_an_epsilon_that_hides_nothing_says_so() -> None:
    grid, deltas = [0.0, 500.0, 1000.0], [1.0, 1.0, 1e-6]
    odds = odds_of(grid, deltas, 1000.0, 1e-5)
    assert (odds["out"], odds["in"]) == ("0", "100")
    assert np.all(np.isfinite(trade_off(grid, deltas)[1]))


def test_many_sites_and_no_charges_are_drawn() -> None:
    lines = {f"site-{i}": [Charge(0.1 * i + 0.1, True)] * (i % 3) for i in range(40)}
    picture = spending_plot(lines, {"budget of the run": 8.0})
    assert picture == spending_plot(lines, {"budget of the run": 8.0}) and picture.startswith("<svg")


def test_report_needs_neither_torch_nor_flower(good: Path, parties: Consortium, tmp_path: Path) -> None:
    from test_verify import BLOCK

    before = read_bundle(good)
    code = BLOCK + ("from privacy.report import write_report\n"
                    "print(write_report(Path(sys.argv[1]), Path(sys.argv[2]), ca=sys.argv[3]).name)")
    out = subprocess.run([sys.executable, "-c", code, str(good), str(tmp_path), parties.fingerprint],
                         capture_output=True, text=True, check=True, cwd=Path(privacy.report.__file__).parent.parent)
    assert out.stdout.strip() == "report.html"
    assert (tmp_path / "report.html").read_bytes() == write_report(good, tmp_path / "b",
                                                                    ca=parties.fingerprint).read_bytes()
    assert read_bundle(good) == before
