"""The state machines of secure aggregation without one thing each, by abstract syntax.

A mutant lacks an `if` that raises or returns, a call made only for its effect, a clause of and/or, a side of a chained
comparison, a part of compared tuples, a condition of a comprehension, an assignment of None, the handling of an exception
or a final `raise`; or a check's bound is off by one.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent.parent / "privacy" / "secagg"
MODULES = ("peers", "hybrid", "plain", "messages", "transcript", "site", "coordinator")
OFF_BY_ONE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
Change = Callable[[Any], object]  # to the node of a copy of the tree


@dataclass(frozen=True)
class Mutant:
    """lines: of the original statement; the last of them is what it does where it matters (its raise)."""

    module: str
    what: str
    lines: range
    source: str

    def __str__(self) -> str:
        return f"{self.module}.py:{self.lines.start}: {self.what}"


def mutants(module: str) -> list[Mutant]:
    """All of one module, in the order of its lines."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = []
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.ExceptHandler)]
    for place, node in enumerate(ast.walk(tree)):
        for at, what, change in changes(node):
            changed = copy.deepcopy(tree)
            change(next(n for i, n in enumerate(ast.walk(changed)) if i == place))
            around = min((s for s in statements if s.lineno <= at.lineno and at.end_lineno <= s.end_lineno),
                         key=lambda s: s.end_lineno - s.lineno)
            found.append(Mutant(module, what, range(around.lineno, around.end_lineno + 1),
                                ast.unparse(ast.fix_missing_locations(changed))))
    return sorted(found, key=lambda m: m.lines.start)


def changes(node: ast.AST) -> Iterator[tuple[Any, str, Change]]:
    """(what is changed, description, change) of a node's own mutants."""
    for k, statement in enumerate(getattr(node, "body", ()) if isinstance(node, ast.stmt | ast.ExceptHandler) else ()):
        if optional(node, statement, k):
            yield statement, f"without {short(statement)}", put("body", k, ast.Pass())
        if isinstance(statement, ast.Assign) and short(statement.value) == "None":
            for t, target in enumerate(statement.targets):
                yield statement, f"without {short(target)} = None", lambda n, k=k, t=t: put(
                    "targets", t, ast.Name("_", ast.Store()))(n.body[k])
    if isinstance(node, ast.BoolOp):
        for k, clause in enumerate(node.values):
            yield node, f"without clause {short(clause)}", lambda n, k=k: n.values.pop(k)
    if isinstance(node, ast.Compare):
        yield from parts(node)
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
        yield from bounds(node)
    if isinstance(node, ast.comprehension) and node.ifs:
        yield node.ifs[0], f"without condition {short(node.ifs[0])}", lambda n: n.ifs.clear()
    if isinstance(node, ast.ExceptHandler):
        yield node, f"without handling {short(node.type)}", lambda n: n.body.__setitem__(slice(None), [ast.Raise()])


def optional(parent: ast.AST, statement: ast.stmt, k: int) -> bool:
    """Whether a statement may be left out by itself."""
    if isinstance(statement, ast.If):
        return isinstance(statement.body[-1], ast.Raise | ast.Return) and not statement.orelse
    if isinstance(statement, ast.Raise):
        return isinstance(parent, ast.FunctionDef) and k > 0
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)


def parts(node: ast.Compare) -> Iterator[tuple[Any, str, Change]]:
    """Of a == b == c and of (a, b) == (c, d) any, of a <= b <= c the first or the last."""
    sides = [node.left, *node.comparators]
    if len(node.ops) > 1:
        equal = all(isinstance(op, ast.Eq) for op in node.ops)
        for k in range(len(sides)) if equal else (0, len(sides) - 1):
            yield node, f"without part {short(sides[k])}", lambda n, k=k: unchain(n, k)
    elif all(isinstance(side, ast.Tuple) for side in sides):
        for k, part in enumerate(sides[0].elts):  # type: ignore[attr-defined]
            yield node, f"without part {short(part)}", lambda n, k=k: [s.elts.pop(k) for s in (n.left, n.comparators[0])]


def unchain(node: ast.Compare, k: int) -> None:
    sides = [node.left, *node.comparators]
    del sides[k], node.ops[min(k, len(node.ops) - 1)]
    node.left, node.comparators = sides[0], sides[1:]


def bounds(node: ast.If) -> Iterator[tuple[Any, str, Change]]:
    """Each < <= > >= that a check's condition joins by and, or and not."""
    joined, compared = [node.test], []
    while joined:
        part = joined.pop()
        joined += getattr(part, "values", [part.operand] if isinstance(part, ast.UnaryOp) else [])
        compared += [part] if isinstance(part, ast.Compare) else []
    for place, part in enumerate(ast.walk(node.test)):
        for k, op in enumerate(part.ops if part in compared else ()):  # type: ignore[attr-defined]
            if type(op) in OFF_BY_ONE:
                yield node, f"off by one: {short(part)} at {k + 1}", lambda n, place=place, k=k, op=op: put(
                    "ops", k, OFF_BY_ONE[type(op)]())(list(ast.walk(n.test))[place])


def put(name: str, k: int, new: ast.AST) -> Change:
    return lambda node: getattr(node, name).__setitem__(k, new)


def short(node: ast.AST | None) -> str:
    text = " ".join(ast.unparse(node).split()) if node else ""
    return text if len(text) <= 78 else text[:75] + "..."
