"""docs/limits.md is the table of all limits: each MAX_ constant of the code, where it stands, and its value."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("conf", "fl_client", "fl_server", "privacy", "simulations", "strategies")
ROW = re.compile(r"^\| (MAX_[A-Z_]+) \| ([a-z_.]+) \| ([0-9.e+]+(?: [KMG]iB)?) \| (\S.*) \|$", re.M)


def constants() -> set[tuple[str, str]]:
    """(name, module) of every MAX_ constant that a module of the packages defines."""
    found = set()
    for file in (f for package in PACKAGES for f in (ROOT / package).rglob("*.py") if not f.stem.startswith("bench")):
        module = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for node in ast.parse(file.read_text()).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            found |= {(t.id, module) for t in targets if isinstance(t, ast.Name) and t.id.startswith("MAX_")}
    return found


def test_the_table_of_limits_is_that_of_the_code() -> None:
    rows = ROW.findall((ROOT / "docs" / "limits.md").read_text())
    assert len(rows) == len({row[:2] for row in rows}) > 40
    assert {row[:2] for row in rows} == constants()
    for name, module, value, _ in rows:
        assert number(value) == getattr(importlib.import_module(module), name), f"{module}.{name}"


def number(text: str) -> float:
    """`4 MiB` is 4 x 2^20."""
    amount, _, unit = text.partition(" ")
    return float(amount) * {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def test_parsers_of_outside_bytes_have_no_bare_limit() -> None:
    """A comparison of a length with a number of three digits or more names that number."""
    bare = re.compile(r"len\([^)]*\)\s*[<>]=?\s*\d[\d_]{2,}|limit=\d|\bread(?:line)?\(\d{3,}")
    found = [f"{f.name}: {line.strip()}" for package in PACKAGES for f in (ROOT / package).rglob("*.py")
             if not f.name.endswith(("_pb2.py", "_pb2_grpc.py")) for line in f.read_text().splitlines() if bare.search(line)]
    assert found == []
