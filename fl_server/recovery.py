"""What a coordinator that was killed goes on from: the journal, the statements in the bundle, and the last adapter.

The statement on a done round is the point from which the round counts: what was under way without one is void, and what
has one counts, whatever the journal says. Nothing is decided from memory, so a round is applied once or not at all.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from fl_server.evaluation import Score
from privacy.bundle import BundleWriter
from privacy.canonical import parse
from privacy.contract import Contract
from privacy.errors import CheckFailed, Refused
from privacy.files import FileLayer
from strategies.adapter import AdapterSpec, Tensors, adapter_digest, initial

STATE, ADAPTER, OPTIMIZER = "state.safetensors", "adapter/", "optimizer/"


@dataclass
class Position:
    """Where a run stands. done: rounds; attempt: the next one of the next round; state: the server optimiser's
    by tensor, float32; scores: by round, of those that were evaluated; lineages: by site, none before all have accepted."""

    adapter: Tensors
    state: Mapping[str, NDArray[np.float32]]
    done: int = 0
    attempt: int = 0
    voids: int = 0
    scores: dict[int, Score] = field(default_factory=dict)
    lineages: dict[str, str] = field(default_factory=dict)
    torn: bool = False  # the attempt before the next one was under way
    stated: list[dict[str, Any]] = field(default_factory=list)  # on attempts, in order


def save_state(folder: Path, adapter: Tensors, state: Tensors) -> None:
    """All that the next round starts from, durably, in the folder of the round that is over."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}{name}": np.ascontiguousarray(value) for part, values in ((ADAPTER, adapter), (OPTIMIZER, state))
               for name, value in values.items()}
    FileLayer().write_atomic(folder / STATE, save(tensors))


def recover(contract: Contract, spec: AdapterSpec, folder: Path, events: list[dict[str, Any]],
            bundle: BundleWriter) -> Position:
    """events: of the journal, [] for a new run. Raises Refused `run.ended`, `run.other`; CheckFailed `run.state`."""
    start = Position(initial(spec, contract.lora.seed), {})
    if not events:
        return start
    if events[0].get("run") != contract.run:
        raise Refused("run.other", "The folder holds another run.", "Give the contract that it was started with.")
    if any(e["event"] == "end" for e in events):
        raise Refused("run.ended", "This run has ended.", "Another run needs a new folder and a contract of its own.")
    attempts = _said(bundle, "round")
    rounds = [said for said in attempts if said["outcome"] == "done"]
    scores = _scores(contract, _said(bundle, "evaluation"))
    lineages = {s["site"]: s["lineage"] for s in _said(bundle, "acceptance")}
    at = Position(start.adapter, start.state, len(rounds), 0, len(attempts) - len(rounds), scores,
                  lineages if len(lineages) == len(contract.sites) else {}, stated=attempts)
    if rounds:
        at.adapter, at.state = _load_state(folder / "rounds" / f"{at.done:04d}" / STATE, spec, rounds[-1]["adapter_out"])
    begun = [(e["round"], e["attempt"]) for e in events if e["event"] == "round"]
    at.attempt = 1 + max((a for r, a in begun if r == at.done + 1), default=-1)
    at.torn = bool(begun) and begun[-1] not in {(s["round"], s["attempt"]) for s in attempts}
    return at


def _scores(contract: Contract, said: list[dict[str, Any]]) -> dict[int, Score]:
    """By round, where every metric was stated: a crash in between has it measured again."""
    found: dict[int, Score] = {}
    for s in said:
        before = found.get(s["round"], Score({}, s["units"]))
        found[s["round"]] = Score({**before.values, s["metric_name"]: float(s["metric"])}, s["units"])
    return {no: score for no, score in found.items() if score.values.keys() == set(contract.metrics)}


def _load_state(path: Path, spec: AdapterSpec, digest: str) -> tuple[Tensors, Tensors]:
    try:
        tensors = load_file(path)
        adapter = spec.check({n.removeprefix(ADAPTER): v for n, v in tensors.items() if n.startswith(ADAPTER)})
        state = {n.removeprefix(OPTIMIZER): v for n, v in tensors.items() if n.startswith(OPTIMIZER)}
        if adapter_digest(adapter) != digest or any(v.dtype != np.float32 for v in state.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, Refused) as e:
        raise CheckFailed("run.state", "The last round's adapter isn't the one that was stated, or can't be read.",
                          "Restore the run's folder; without it a new run is needed.") from e
    return adapter, state


def _said(bundle: BundleWriter, kind: str) -> list[dict[str, Any]]:
    """Predicates of this coordinator's own bundle, in order."""
    return [parse(b64decode(parse(data)["payload"]))["predicate"] for name, _, data in bundle.statements() if name == kind]
