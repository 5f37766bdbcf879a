"""Takes each check of the state machines away in turn (mutants.py), and expects a test to notice: `make mutate`.

    python tests/secagg/mutate.py [module ...] [-v]

The tests run once as they are, traced, so that it is known which of them reach which line. Then each mutant gets a forked
process, in which its code takes the original's place and the tests that reach it run until one fails, first those in
which the check has its effect. Exit code 1 if a mutant survives. Tests with random input don't count here.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process with threads must not fork

import pytest
from _pytest.runner import runtestprotocol
from mutants import MODULES, PACKAGE, Mutant, mutants

HERE = Path(__file__).parent
TESTS = ("stage_m1_m2", "stage_m3_m4", "stage_m5", "stage_m6_m7", "stage_m8_m9", "abort", "transcript", "plain",
         "attacks_views", "attacks_sites", "attacks", "messages")
PARALLEL = 2
LIMIT_S = 120  # of one mutant: most take less than one second
Line = tuple[str, int]


class Mutation:
    """A pytest plugin that takes the place of its loop over the tests."""

    def __init__(self, chosen: Sequence[str], verbose: bool) -> None:
        self.chosen, self.verbose = chosen, verbose
        self.reached = dict[pytest.Item, set[Line]]()
        self.seconds = dict[pytest.Item, float]()
        self.survived = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        start = time.monotonic()
        for item, following in zip(session.items, [*session.items[1:], session.items[0]], strict=True):
            if name := self.traced(item, following):
                raise pytest.UsageError(f"The tests fail without any change: {name}")
        print(f"{len(session.items)} tests as they are: {time.monotonic() - start:.0f} s", flush=True)
        found = [mutant for module in self.chosen for mutant in mutants(module)]
        for mutant, noticed in self.outcomes(found.copy()):
            self.survived += not noticed
            if self.verbose or not noticed:
                print(f"{'killed  ' if noticed else 'SURVIVED'}  {mutant}  {noticed and '<- ' + noticed}", flush=True)
        print(f"{len(found)} mutants, {self.survived} survived, {time.monotonic() - start:.0f} s")
        return True

    def traced(self, item: pytest.Item, following: pytest.Item) -> str:
        """Run a test; fixtures that the following one needs stay. Returns its name if it failed."""
        lines = self.reached[item] = set()
        modules = {str(PACKAGE / f"{name}.py"): name for name in MODULES}

        def called(frame: FrameType, event: str, argument: object) -> Any:
            return passed if frame.f_code.co_filename in modules else None

        def passed(frame: FrameType, event: str, argument: object) -> Any:
            lines.add((modules[frame.f_code.co_filename], frame.f_lineno))
            return passed

        start = time.monotonic()
        sys.settrace(called)
        try:
            return failed(item, following)
        finally:
            sys.settrace(None)
            self.seconds[item] = time.monotonic() - start

    def order(self, mutant: Mutant) -> list[pytest.Item]:
        """The tests that reach a mutant: where it has its effect first, then the quick ones."""
        effect = (mutant.module, mutant.lines[-1])
        reach = [item for item, lines in self.reached.items() if any((mutant.module, n) in lines for n in mutant.lines)]
        return sorted(reach, key=lambda item: (effect not in self.reached[item], self.seconds[item]))

    def outcomes(self, todo: list[Mutant]) -> Iterator[tuple[Mutant, str]]:
        """(mutant, the test that failed or ""), `PARALLEL` at a time."""
        running = dict[int, tuple[Mutant, Path]]()
        with tempfile.TemporaryDirectory() as folder:
            while todo or running:
                while todo and len(running) < PARALLEL:
                    mutant, result = todo.pop(0), Path(folder) / str(len(todo))
                    if pid := os.fork():
                        running[pid] = mutant, result
                        continue
                    try:
                        signal.alarm(LIMIT_S)
                        install(mutant)
                        tests = self.order(mutant)
                        names = map(failed, tests, [*tests[1:], None])
                        result.write_text(next(filter(None, names), ""))
                    finally:
                        os._exit(0)
                pid, status = os.wait()
                mutant, result = running.pop(pid)
                if not os.WIFSIGNALED(status) and not result.exists():
                    raise pytest.UsageError(f"This mutant could not be made: {mutant}")
                yield mutant, result.read_text() if result.exists() else ""


def failed(item: pytest.Item, following: pytest.Item | None) -> str:
    """Run a test; its name if it failed."""
    reports = runtestprotocol(item, log=False, nextitem=following)
    return item.nodeid.rpartition("/")[2] if any(report.failed for report in reports) else ""


def install(mutant: Mutant) -> None:
    """Every function of the module gets the mutant's code, so that whoever imported it has it too."""
    module = import_module(f"privacy.secagg.{mutant.module}")
    new = dict(codes(compile(mutant.source, str(PACKAGE / f"{mutant.module}.py"), "exec")))
    for holder in [module, *(value for value in vars(module).values() if isinstance(value, type))]:
        for value in vars(holder).values():
            function = getattr(value, "fget", value.func if isinstance(value, cached_property) else value)
            if isinstance(function, FunctionType) and function.__module__ == module.__name__ and (
                    function.__qualname__ in new):
                function.__code__ = new[function.__qualname__]


def codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant.co_qualname, constant
            yield from codes(constant)


def main(arguments: list[str]) -> int:
    plugin = Mutation([a for a in arguments if a != "-v"] or MODULES, "-v" in arguments)
    code = pytest.main(["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", "-s",
                        *(str(HERE / f"test_{name}.py") for name in TESTS)], plugins=[plugin])
    return int(code) or plugin.survived > 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
