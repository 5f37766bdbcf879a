"""Removes each check of the secure-aggregation state machines in turn, and expects a test to notice (`make mutate`).

    python tests/secagg/mutate.py [module ...] [-v]

A mutant is one module without one thing: an `if` that raises or returns, a call made only for its effect, a clause of
and/or, a side of a chained comparison, a part of compared tuples, a condition of a comprehension, an assignment of None,
the handling of an exception, a final `raise`; or with a check's bound off by one. The tests of this folder run on it in a
forked process until the first failure. Exit code 1 if a mutant survives.
"""

from __future__ import annotations

import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
PACKAGE = HERE.parent.parent / "privacy" / "secagg"
MODULES = ("peers", "hybrid", "plain", "messages", "transcript", "site", "coordinator")
TESTS = ("stage_m1_m2", "stage_m3_m4", "stage_m5", "stage_m6_m7", "stage_m8_m9", "abort", "transcript", "plain",
         "attacks_views", "attacks_sites", "attacks", "messages", "properties")  # quick ones first
PARALLEL = 2
OFF_BY_ONE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
Change = Callable[[Any], None]  # to a node of a copy of the tree


@dataclass(frozen=True)
class Mutant:
    module: str
    line: int
    what: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}: {self.what}"


def mutants(module: str) -> Iterator[Mutant]:
    """All of one module, in the order of its lines."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = []
    for place, node in enumerate(ast.walk(tree)):
        for line, what, change in changes(node):
            changed = copy.deepcopy(tree)
            change(list(ast.walk(changed))[place])
            found.append(Mutant(module, line, what, ast.unparse(ast.fix_missing_locations(changed))))
    return iter(sorted(found, key=lambda m: m.line))


def changes(node: ast.AST) -> Iterator[tuple[int, str, Change]]:
    """(line, description, change) of a node's own mutants."""
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        for k, statement in enumerate(block if isinstance(block, list) else ()):
            if goes(node, statement, k):
                yield statement.lineno, f"without {short(statement)}", without(name, k)
            if isinstance(statement, ast.Assign) and ast.unparse(statement.value) == "None":
                for t, target in enumerate(statement.targets):
                    yield statement.lineno, f"without {short(target)} = None", untargeted(name, k, t)
    if isinstance(node, ast.BoolOp):
        for k, clause in enumerate(node.values):
            yield clause.lineno, f"without clause {short(clause)}", drop("values", k)
    if isinstance(node, ast.Compare):
        yield from comparisons(node)
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
        for place, part in enumerate(ast.walk(node.test)):
            if isinstance(part, ast.Compare) and part in skeleton(node.test):
                for k, op in enumerate(part.ops):
                    if type(op) in OFF_BY_ONE:
                        yield part.lineno, f"off by one: {short(part)} at {k + 1}", off_by_one(place, k)
    if isinstance(node, ast.comprehension) and node.ifs:
        yield node.ifs[0].lineno, f"without condition {short(node.ifs[0])}", drop("ifs", 0)
    if isinstance(node, ast.ExceptHandler):
        yield node.lineno, f"without handling {short(node.type)}", passed_on


def goes(parent: ast.AST, statement: ast.stmt, k: int) -> bool:
    """Whether a statement may be left out by itself."""
    if isinstance(statement, ast.If):
        return isinstance(statement.body[-1], ast.Raise | ast.Return) and not statement.orelse
    if isinstance(statement, ast.Raise):
        return isinstance(parent, ast.FunctionDef) and k > 0
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)


def comparisons(node: ast.Compare) -> Iterator[tuple[int, str, Change]]:
    parts = [node.left, *node.comparators]
    if len(node.ops) > 1:
        equal = all(isinstance(op, ast.Eq) for op in node.ops)
        for k in range(len(parts)) if equal else (0, len(parts) - 1):
            yield node.lineno, f"without part {short(parts[k])}", unchained(k)
    elif all(isinstance(part, ast.Tuple) for part in parts):
        for k, part in enumerate(parts[0].elts):  # type: ignore[attr-defined]
            yield node.lineno, f"without part {short(part)}", untupled(k)


def skeleton(test: ast.expr) -> list[ast.expr]:
    """What and, or and not join in a condition."""
    inner = test.values if isinstance(test, ast.BoolOp) else [test.operand] if isinstance(test, ast.UnaryOp) else []
    return [test, *(part for one in inner for part in skeleton(one))]


def without(name: str, k: int) -> Change:
    return lambda node: getattr(node, name).__setitem__(k, ast.Pass())


def drop(name: str, k: int) -> Change:
    return lambda node: getattr(node, name).pop(k)


def untargeted(name: str, k: int, t: int) -> Change:
    def change(node: Any) -> None:
        targets = getattr(node, name)[k].targets
        targets[t] = ast.Name("_", ast.Store())

    return change


def off_by_one(place: int, k: int) -> Change:
    def change(node: Any) -> None:
        compare: Any = list(ast.walk(node.test))[place]
        compare.ops[k] = OFF_BY_ONE[type(compare.ops[k])]()

    return change


def unchained(k: int) -> Change:
    def change(node: Any) -> None:
        parts = [node.left, *node.comparators]
        parts.pop(k)
        node.ops.pop(min(k, len(node.ops) - 1))
        node.left, node.comparators = parts[0], parts[1:]

    return change


def untupled(k: int) -> Change:
    def change(node: Any) -> None:
        for part in (node.left, *node.comparators):
            part.elts.pop(k)

    return change


def passed_on(node: Any) -> None:
    node.body = [ast.Raise()]


def short(node: ast.AST | None) -> str:
    text = " ".join(ast.unparse(node).split()) if node else ""
    return text if len(text) <= 78 else text[:75] + "..."


class Replaced(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant, self.name = mutant, f"privacy.secagg.{mutant.module}"

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def get_source(self, name: str) -> str:
        return self.mutant.source


class Killer:
    """The first test that failed, as pytest tells."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.rpartition("/")[2]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = f"import of {report.nodeid}"


def tested(mutant: Mutant | None, tests: Sequence[str], result: Path) -> None:
    """In a forked child: run the tests, write (exit code, killer), and end."""
    import pytest

    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if mutant:
        sys.meta_path.insert(0, Replaced(mutant))
    killer = Killer()
    code = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--timeout=120",
                        *(str(HERE / f"test_{name}.py") for name in tests)], plugins=[killer])
    result.write_text(json.dumps([int(code), killer.name]))
    os._exit(0)


def run_all(queue: list[Mutant | None], report: Callable[[Mutant | None, int, str], None]) -> None:
    """`PARALLEL` at a time. The files that killed the module's last mutants come first."""
    running, tests = dict[int, tuple[Mutant | None, Path]](), list(TESTS)
    with tempfile.TemporaryDirectory() as folder:
        while queue or running:
            if queue and len(running) < PARALLEL:
                mutant, result = queue.pop(0), Path(folder) / str(len(queue))
                if pid := os.fork():
                    running[pid] = mutant, result
                else:
                    tested(mutant, tests, result)
                continue
            pid, _ = os.wait()
            mutant, result = running.pop(pid)
            code, killer = json.loads(result.read_text()) if result.exists() else (-1, "a crash")
            name = killer.partition(".py")[0].removeprefix("test_")
            if mutant and name in tests[1:-2]:
                tests.remove(name)
                tests.insert(0, name)
            report(mutant, code, killer)


def main(arguments: list[str]) -> int:
    start, verbose = time.monotonic(), "-v" in arguments
    chosen = [a for a in arguments if a != "-v"] or list(MODULES)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process with threads must not fork
    import numpy as np  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401

    from privacy import ca  # noqa: F401

    if any(name.startswith("privacy.secagg.") for name in sys.modules):
        raise SystemExit("The package under test was imported before it could be changed.")
    killed, survived = 0, list[Mutant]()

    def report(mutant: Mutant | None, code: int, killer: str) -> None:
        nonlocal killed
        if mutant is None:
            if code:
                raise SystemExit(f"The tests fail without any change: {killer}")
        elif code:
            killed += 1
            if verbose:
                print(f"killed    {mutant}  <- {killer}", flush=True)
        else:
            survived.append(mutant)
            print(f"SURVIVED  {mutant}", flush=True)

    run_all([None], report)
    for module in chosen:
        before = killed, len(survived)
        run_all(list(mutants(module)), report)
        print(f"{module:<12} {killed - before[0]:4} killed {len(survived) - before[1]:3} survived", flush=True)
    print(f"{'all':<12} {killed:4} killed {len(survived):3} survived in {time.monotonic() - start:.0f} s")
    return bool(survived)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
