"""The report of a run: one HTML file (English and Chinese side by side) and the same facts as JSON.

Guarantees: it is made from facts that `privacy.verify` established, never from unverified files; a bundle that fails
gives a page that says FAILED and shows nothing of its content; with trust=none there is no epsilon on the page. The
same input gives the same bytes. Text from outside is escaped, and the page asks for no other resource. What isn't part
of the signed evidence (`report_extras`) is shown as such.

A sentence that claims something of the product carries `data-claim`, the rows of docs/claims.md that it rests on; the
JSON lists them as `claims`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import jinja2

from privacy.canonical import canonical
from privacy.errors import UsageError
from privacy.files import FileLayer
from privacy.report_extras import AttackExtra, AuditExtra, Extra
from privacy.report_fields import articles, disclosure
from privacy.report_plots import metric_plot
from privacy.report_run import approvals, contract, evaluations, incidents, log, released, rounds
from privacy.report_spending import spending
from privacy.site_bundle import is_site_bundle
from privacy.verify import Verdict, examine
from privacy.verify_trust import Facts

SCHEMA = "consilo.report/2"


def write_report(bundle: Path, out: Path, *, ca: str | None = None, audit: Path | None = None,
                 attack: Path | None = None) -> Path:
    """Verify a bundle and write report.html and report.json into the folder `out`; returns the path of the page.

    ca: the root's fingerprint from outside the bundle; without it the report says UNANCHORED. audit, attack: what
    `fl-simulate audit` and `fl-simulate demo-attack` wrote; nothing of them is verified. Raises UsageError
    `bundle.missing`, `verify.fingerprint`, `report.audit`, `report.attack`, `cli.usage` (the bundle of one site); a bundle
    that fails verification gives a report that says so."""
    extras: dict[str, Extra] = {}
    if audit:
        extras["audit"] = AuditExtra(audit)
    if attack:
        extras["attack"] = AttackExtra(attack)
    if is_site_bundle(bundle):
        raise UsageError("cli.usage", "That is the bundle of one site; a report is about a run.",
                         "Check it with fl-privacy verify; give the run's bundle for a report.")
    verdict, facts = examine(bundle, ca)
    report, figures = _contents(verdict, facts, bundle, extras)
    out.mkdir(parents=True, exist_ok=True)
    files = FileLayer()
    files.write_atomic(out / "report.json", canonical(report))
    files.write_atomic(out / "report.html", _page(report, figures).encode())
    return out / "report.html"


def _page(report: dict[str, Any], figures: dict[str, str]) -> str:
    """Only the figures, which this package draws, go into the page without escaping."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
                                   autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                   lstrip_blocks=True, keep_trailing_newline=True)
    return templates.get_template("report.html.j2").render(r=report, figures=figures)


def _contents(verdict: Verdict, facts: Facts, bundle: Path,
              extras: dict[str, Extra]) -> tuple[dict[str, Any], dict[str, str]]:
    """(what report.json holds, SVG by name). Without a valid contract, or after a FAIL: the verification alone."""
    name = shlex.quote(bundle.resolve().name)
    report: dict[str, Any] = {
        "schema": SCHEMA, "verification": verdict.as_dict(),
        "command": f"fl-privacy verify {name} --ca {facts.ca if verdict.anchored else 'SHA256'}"}
    if verdict.verdict == "FAIL" or facts.contract is None:
        return {**report, "title": _title("FAILED", "未通过", "this evidence does not hold", "证据不成立")}, {}
    agreed, figures = facts.contract, dict[str, str]()
    private, hidden = agreed.privacy.trust != "none", agreed.secagg.enabled
    for extra in extras.values() if not private else ():
        raise UsageError(extra.code, "The run is NON-PRIVATE: it claims no epsilon, so no test of one goes with its report.",
                         "Make the report without it.")
    measured = evaluations(facts)
    report |= {"title": _titles(private, hidden), "private": private, "secure_aggregation": hidden, "run": agreed.run,
               "claims": sorted(["C5", "C7", "C8", *(["C1", "C3"] if private else []), *(["C2"] if hidden else [])]),
               "contract": contract(facts, agreed), "rounds": rounds(facts, agreed), "incidents": incidents(facts, agreed),
               "approvals": approvals(facts), "log": log(facts, agreed), "evaluations": measured,
               "release": released(facts), "extras": {key: extra.shown(agreed) for key, extra in extras.items()}}
    if len(measured) > 1:
        figures["metric"] = metric_plot([(e["round"], float(e["metric"]), e["metric_name"]) for e in measured])
    if private:
        added, drawn = spending(facts, agreed)
        report, figures = report | added, figures | drawn
    report["disclosure"] = disclosure(report, agreed)
    return {**report, "articles": articles(report)}, figures


def _titles(private: bool, hidden: bool) -> dict[str, str]:
    if not private:
        return _title("NON-PRIVATE", "无隐私保护", "training report" if hidden else "INDIVIDUAL UPDATES VISIBLE",
                      "训练报告" if hidden else "各机构的更新可见")
    if not hidden:
        return _title("INDIVIDUAL UPDATES VISIBLE", "各机构的更新可见", "privacy report", "隐私报告")
    return _title("Privacy report", "隐私报告", "differential privacy with secure aggregation", "差分隐私与安全聚合")


def _title(en: str, zh: str, sub_en: str, sub_zh: str) -> dict[str, str]:
    return {"en": en, "zh": zh, "sub_en": sub_en, "sub_zh": sub_zh}
