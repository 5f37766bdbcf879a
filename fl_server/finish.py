"""What is left to do when a coordinator was killed after its evidence was sealed: the journal's end, metrics, the report.

Everything is read from the sealed evidence; nothing of the run is done again.
"""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path
from typing import Any

from fl_server.attempt import void
from fl_server.journal import RunJournal, read_events
from privacy.canonical import canonical, parse
from privacy.contract import Contract
from privacy.errors import Refused
from privacy.files import FileLayer, read_file
from privacy.report import write_report

METRICS, REPORT = "metrics.json", "report.html"


def sealed(folder: Path) -> bool:
    return (folder / "evidence" / "manifest.json").is_file()


def finish(contract: Contract, folder: Path, *, ca: str) -> dict[str, Any]:
    """The run's metrics. ca: the root's fingerprint. Raises Refused `run.ended` where nothing is left to do, `run.other`;
    RoundVoid with the reason of the last attempt where the run had ended before all rounds were done."""
    events = read_events(folder / "journal.jsonl")
    if not events or events[0].get("run") != contract.run:
        raise Refused("run.other", "The folder holds another run.", "Give the contract that it was started with.")
    attempts = _said(folder, "round")
    done = sum(a["outcome"] == "done" for a in attempts)
    whole, ended = done == contract.privacy.rounds, any(e["event"] == "end" for e in events)
    if ended and not (whole and not (folder / REPORT).is_file()):
        raise Refused("run.ended", "This run has ended.", "Another run needs a new folder and a contract of its own.")
    outcome = "done" if whole else next((a["reason"] for a in reversed(attempts)), "run.interrupted")
    if not ended:
        journal = RunJournal(folder / "journal.jsonl")
        journal.write("end", outcome=outcome)
        journal.close()
    if not whole:
        raise void(outcome, {})
    if not (folder / METRICS).is_file():
        FileLayer().write_atomic(folder / METRICS, canonical(_metrics(contract, folder, attempts)) + b"\n")
    write_report(folder / "evidence", folder, ca=ca)
    return dict(parse(read_file(folder / METRICS)))


def _metrics(contract: Contract, folder: Path, attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """As `fl-server run` writes them, without its seconds."""
    measured = _said(folder, "evaluation")
    rounds = [m["round"] for m in measured]
    values = {f"{m['metric_name']}_{when}": float(m["metric"]) for when, no in (("before", 0), ("after", max(rounds)))
              for m in measured if m["round"] == no}
    done = sum(a["outcome"] == "done" for a in attempts)
    return {"run": contract.run, "contract": contract.digest, **values, "units": measured[-1]["units"], "rounds": done,
            "void": len(attempts) - done, "epsilon": {c["site"]: float(c["epsilon"]) for c in _said(folder, "closing")},
            "epsilon_budget": contract.privacy.epsilon}


def _said(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Predicates of this coordinator's own sealed bundle, in order."""
    files = sorted((folder / "evidence" / "statements").glob(f"*-{kind}-*.json"))
    found = [parse(b64decode(parse(file.read_bytes())["payload"])) for file in files]
    return [said["predicate"] for said in found if said["predicateType"].split(":")[2] == kind]
