"""`make mutate` keeps finding what to take away."""

from __future__ import annotations

import ast

import pytest
from mutants import MODULES, PACKAGE, mutants


@pytest.mark.parametrize("module", MODULES)
def test_mutants_are_code_and_differ_from_the_original(module: str) -> None:
    """Each from the other, too, unless one statement can be taken away in two ways."""
    original = ast.unparse(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))
    found = mutants(module)
    assert all(ast.parse(m.source) and m.source != original for m in found)
    assert len({m.source for m in found}) > 0.9 * len(found)


def test_no_check_is_overlooked() -> None:
    """More than a hundred in all; each verification of a signature, entry of the journal and list of members among them."""
    found = [str(m) for module in MODULES for m in mutants(module)]
    assert len(found) > 100
    for call, least in (("verify_signature", 5), ("check_members", 8), ("self._journal", 5), ("self._drop()", 4),
                        ("self._verify", 4), ("_check_sender", 5), ("check_distinct", 2), ("hybrid.seal", 1),
                        ("self._secrets = None", 2), ("raise", 19), ("without clause", 20), ("off by one", 5)):
        assert sum(call in line for line in found) >= least, call
