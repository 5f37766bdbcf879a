"""docs/cases.md from the tests: `python tests/house/cases.py` writes it.

A test belongs to a case by its name (test_case_23_...) or by `@pytest.mark.case(23, ...)`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cases.md"
TITLES = {
    1: "unknown key or typo in a config or override", 2: "epsilon <= 0, delta >= 1/n, sigma = 0, NaN clip, empty cohort",
    3: "DP off and a report asked for", 4: "a sampler that isn't Poisson",
    5: "unit person without exactly one person for a record", 6: "empty silo, or fewer units than the floor",
    7: "empty Poisson batch", 8: "malformed, oversized, mis-typed record, or one that raises or makes NaN",
    9: "batch norm, or another layer without per-sample gradients", 10: "digest of base model or tokenizer differs",
    11: "`_target_`, interpolation or import path smuggled in", 12: "NaN or Inf in an update",
    13: "wrong shape, rank, dtype, missing or extra tensor", 14: "a safetensors header that lies about sizes or offsets",
    15: "a pickle or torch file",
    16: "value outside the range; sum could overflow", 17: "a weight other than the contract's",
    18: "the adapter can't move", 19: "a site drops at each stage", 20: "a site comes back in mid-round",
    21: "duplicate or late message", 22: "a peer that is slow, half-closed or never answers",
    23: "kill of the coordinator at every journal write", 24: "kill of a site between reserve and send",
    25: "disk full or EIO while appending to the ledger", 26: "the clock jumps back", 27: "two runs at one site at once",
    28: "ledger truncated, edited, reordered, rolled back, swapped",
    29: "signature, key id, payload type or duplicated JSON key wrong", 30: "private key readable by others",
    31: "secrets and record text in anything that leaves", 32: "another distribution or folder owns an import name",
    33: "an app bundle shipped by the coordinator", 34: "an exception in training",
    35: "a contract that the site has not approved", 36: "expired, self-signed, wrong-role or revoked certificate",
    37: "a poisoned, scaled or sign-flipped update", 38: "values tagged system, dp-released or local-only",
}
HEAD = """# Cases and their tests

What bad input, faults and attacks must meet, and the tests that show it; made from the tests by `tests/house/cases.py`.

| case | tests |
|---|---|
"""


def found() -> dict[int, list[str]]:
    """Case -> `path::test`, in order of path and line."""
    out: dict[int, list[str]] = {number: [] for number in TITLES}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in _numbers(node):
                    out[number].append(f"{path.relative_to(ROOT)}::{node.name}")
    return out


def _numbers(test: ast.FunctionDef) -> list[int]:
    marked = [ast.literal_eval(arg) for d in test.decorator_list if isinstance(d, ast.Call)
              and ast.unparse(d.func) == "pytest.mark.case" for arg in d.args]
    named = re.match(r"test_case_(\d+)_", test.name)
    return sorted({*marked, *([int(named[1])] if named else [])})


def page() -> str:
    return HEAD + "".join(f"| {number} {TITLES[number]} | {', '.join(tests) or 'none yet'} |\n"
                          for number, tests in found().items())


if __name__ == "__main__":
    PAGE.write_text(page())
