"""The documents keep up with the code: error codes, cases, claims, and what README promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import cases

ROOT = Path(__file__).parents[2]
PACKAGES = ("conf", "fl_client", "fl_server", "privacy", "simulations", "strategies")
RAISED = {"ConsiloError", "CheckFailed", "UsageError", "Refused", "Unreachable", "RoundVoid", "Aborted"}
CODE = re.compile(r"[a-z]+\.[a-z_0-9]+")


def raised_codes() -> set[str]:
    """First argument, where it is a literal, of every error that is made."""
    codes = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISED and node.args:
                    first = node.args[0]
                    if isinstance(first, ast.Constant) and CODE.fullmatch(str(first.value)):
                        codes.add(str(first.value))
    return codes


def test_every_error_code_is_documented() -> None:
    documented = set(CODE.findall((ROOT / "docs" / "errors.md").read_text()))
    assert len(raised_codes()) > 100
    assert raised_codes() <= documented


def test_site_codes_are_a_closed_documented_list() -> None:
    from privacy.errors import SiteCode

    text = (ROOT / "docs" / "errors.md").read_text()
    assert len(SiteCode) <= 12
    assert {f"| {code.value} |" for code in SiteCode} <= set(re.findall(r"\| site\.[a-z_]+ \|", text))


def test_the_table_of_cases_is_that_of_the_tests() -> None:
    """`python tests/house/cases.py` writes it."""
    assert cases.PAGE.read_text() == cases.page()
    assert [number for number, tests in cases.found().items() if not tests] == []


def test_tests_that_documents_name_exist() -> None:
    for name in ("cases.md", "claims.md"):
        text, file = (ROOT / "docs" / name).read_text(), ""
        for path, test in re.findall(r"(tests/[\w/]+\.py|test_\w+\.py)?(?:::(test_\w+))?", text):
            if path:
                found = [ROOT / path] if "/" in path else list((ROOT / "tests").rglob(path))
                assert found and found[0].is_file(), f"{name}: {path}"
                file = found[0].read_text()
            if test:
                assert f"def {test}(" in file, f"{name}: {test}"


def test_readme_promises_rows_of_the_claims_only() -> None:
    claims = dict(re.findall(r"^\| (C\d+) \| ([^|]+) \|", (ROOT / "docs" / "claims.md").read_text(), re.M))
    promised = re.findall(r"^- \*\*(C\d+)\*\*", (ROOT / "README.md").read_text(), re.M)
    assert promised == sorted(claims)


def test_policy_example_is_valid_and_complete() -> None:
    import yaml

    from fl_client.policy import SitePolicy, load_policy

    path = ROOT / "docs" / "policy-example.yaml"
    load_policy(path)
    assert set(yaml.safe_load(path.read_text())) == set(SitePolicy.model_fields)


def test_no_pickle_anywhere() -> None:
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                assert "pickle" not in names, file
                assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save")), file
