"""A coordinator that was killed after sealing its evidence: what is left is made good, and nothing twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf import load_settings
from fl_server.finish import finish, sealed
from fl_server.journal import status
from privacy.errors import Refused, RoundVoid
from simulations.local import Outcome, federate


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: dict[str, Path]) -> Callable[..., Any]:
    """ended(rounds) -> (outcome, folder): a whole run of two rounds, or one that was given up in its second."""
    made: dict[bool, tuple[Outcome, Path]] = {}

    def get(whole: bool) -> tuple[Outcome, Path]:
        if whole not in made:
            out = tmp_path_factory.mktemp("run") / "out"
            sites = ",".join(f"{n}:{{file:{p}}}" for n, p in tiny_data.items() if n != "public")
            settings = load_settings([
                "model=local", "model.name=tiny", f"model.path={tiny_model}", "model.max_length=16", "data=files",
                "data.name=tiny", f"data.sites={{{sites}}}", f"data.evaluation.file={tiny_data['public']}",
                "privacy.rounds=2", "privacy.retries=0", f"server.out={out}", f"server.log={out}/log"])

            def drop(node: int, message: Any, k: int) -> str | None:
                first = json.loads(next(iter(message.content.config_records.values()))["body"])
                return "reply" if not whole and first.get("round") == 2 else None

            try:
                outcome = federate(settings, drop=drop)
            except RoundVoid:
                from privacy.contract import load_contract

                outcome = SimpleNamespace(contract=load_contract((out / "contract.json").read_bytes()),  # type: ignore[assignment]
                                          root=(out / "evidence" / "certificates" / "root.pem").read_text(), result=None)
            made[whole] = outcome, out
        return made[whole]

    return get


def cut(out: Path, to: Path, *, end: bool) -> Path:
    """A copy of the run's folder as a kill leaves it; end: whether the journal's last event was written."""
    shutil.copytree(out, to)
    lines = (to / "journal.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["event"] == "end"
    if not end:
        (to / "journal.jsonl").write_text("".join(lines[:-1]))
    return to


@pytest.mark.case(23)
@pytest.mark.parametrize("end", [False, True])
def test_case_23_killed_after_sealing_the_run_is_finished(end: bool, ended: Callable[..., Any], tmp_path: Path) -> None:
    outcome, out = ended(True)
    left = cut(out, tmp_path / "left", end=end)
    assert sealed(left)
    evidence = {p: p.read_bytes() for p in (left / "evidence").rglob("*") if p.is_file()}
    metrics = finish(outcome.contract, left, ca=outcome.root)
    assert status(left / "journal.jsonl")["state"] == "done"
    assert (left / "report.html").is_file() and json.loads((left / "metrics.json").read_bytes()) == metrics
    want = outcome.result
    assert {k: metrics[k] for k in want.metrics} == pytest.approx(want.metrics, abs=1e-6)
    assert (metrics["rounds"], metrics["void"], metrics["units"]) == (2, 0, want.after.units)
    assert metrics["epsilon"] == {name: float(e) for name, e in want.epsilon.items()}
    assert {p: p.read_bytes() for p in (left / "evidence").rglob("*") if p.is_file()} == evidence, "sealed is sealed"
    with pytest.raises(Refused, match=r"run\.ended"):
        finish(outcome.contract, left, ca=outcome.root)


@pytest.mark.case(23)
def test_case_23_killed_after_sealing_a_run_that_was_given_up(ended: Callable[..., Any], tmp_path: Path) -> None:
    outcome, out = ended(False)
    left = cut(out, tmp_path / "left", end=False)
    with pytest.raises(RoundVoid, match=r"secagg\.too_few"):
        finish(outcome.contract, left, ca="0" * 64)
    assert status(left / "journal.jsonl")["state"] == "secagg.too_few"
    with pytest.raises(Refused, match=r"run\.ended"):
        finish(outcome.contract, left, ca="0" * 64)


def test_another_contracts_folder(ended: Callable[..., Any]) -> None:
    outcome, out = ended(True)
    other = outcome.contract.model_copy(update={"run": "f" * 32})
    with pytest.raises(Refused, match=r"run\.other"):
        finish(other, out, ca=outcome.root)
