"""README and reports state rows of docs/claims.md only, and a row is worth something: tests that exist, a bug they catch."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "privacy" / "templates"
CLAIM = re.compile(r"\bC\d+\b")


@dataclass(frozen=True)
class Row:
    claim: str
    adversary: str
    assumption: str
    tests: str
    planted: str


def rows() -> dict[str, Row]:
    lines = (ROOT / "docs" / "claims.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\| C\d+ \|", line)]
    return {name: Row(*rest) for name, *rest in cells}


def named_tests(cell: str) -> list[tuple[Path, str | None]]:
    """(file or folder, test or None): a bare file is in the folder of the one before, a bare test in the file before."""
    found: list[tuple[Path, str | None]] = []
    last = ROOT / "tests"
    for path, test in re.findall(r"(tests/[\w/]+(?:\.py)?|\btest_\w+\.py)?(?:::(\w+))?", cell):
        if path:
            last = ROOT / path if "/" in path else last.parent / path
        if path or test:
            found.append((last, test or None))
    return found


def in_reports() -> set[str]:
    """Claims that the report's templates and fields can state."""
    text = "".join(path.read_text() for path in TEMPLATES.glob("report*.j2"))
    stated = {claim for ids in re.findall(r'data-claim="([^"{]*)"', text) for claim in CLAIM.findall(ids)}
    for path in (ROOT / "privacy").glob("report*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"C\d+( C\d+)*", node.value):
                stated |= set(node.value.split())
    return stated


def test_rows_are_numbered_and_whole() -> None:
    found = rows()
    assert len(found) >= 7 and list(found) == [f"C{i}" for i in range(1, len(found) + 1)]
    assert all(row.claim and row.adversary and row.assumption for row in found.values())


def test_readme_and_reports_state_rows_only() -> None:
    readme = set(re.findall(r"^- \*\*(C\d+)\*\*", (ROOT / "README.md").read_text(), re.M))
    assert readme == set(rows())
    assert {"C1", "C2", "C5", "C7"} <= in_reports() <= set(rows())


@pytest.mark.parametrize("name", rows())
def test_each_row_names_tests_that_exist(name: str) -> None:
    named = named_tests(rows()[name].tests)
    assert named, "a claim without a test"
    for path, test in named:
        assert path.is_file() or (path.is_dir() and list(path.glob("test_*.py"))), path
        if test is not None:
            assert re.search(rf"^def {test}\(", path.read_text(), re.M), f"{path}::{test}"


@pytest.mark.parametrize("name", rows())
def test_each_row_names_a_planted_bug_or_says_why_not(name: str) -> None:
    assert len(rows()[name].planted.strip("- ")) > 10, "name a bug that its tests were seen to catch, or say why none"


def test_the_checks_see_what_is_wrong() -> None:
    assert named_tests("tests/privacy/test_noise.py, test_dpsgd.py; ::test_x") == [
        (ROOT / "tests/privacy/test_noise.py", None), (ROOT / "tests/privacy/test_dpsgd.py", None),
        (ROOT / "tests/privacy/test_dpsgd.py", "test_x")]
    assert not (ROOT / "tests" / "privacy" / "test_nothing.py").is_file() and "C99" not in rows()
