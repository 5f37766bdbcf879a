"""The warm trainer process: loads model and data once, then trains on request until its pipe closes.

`python -P -m fl_client.trainer`; requests on stdin, replies on what was stdout. It holds no key, knows no coordinator
and opens no connection; its parent holds the link.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from fl_client.frames import NO_VECTOR, read_frame, write_frame
from fl_client.training import LocalTrainer
from privacy.contract import load_contract
from privacy.errors import ConsiloError, Unreachable
from strategies.adapter import AdapterSpec


def main() -> None:
    """Serve one agent. Ends when the agent does."""
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints goes to the log, not into a frame
    warnings.simplefilter("ignore")
    trainer: LocalTrainer | None = None
    while True:
        try:
            request, vector = read_frame(0)
        except Unreachable:
            return
        try:
            if request["op"] == "load":
                trainer = _load(request)
                write_frame(replies, spec_to_json(trainer.spec))
            elif trainer is not None:
                write_frame(replies, {"ok": True}, trainer.train(trainer.spec.unpack(vector), request["round"]))
        except ConsiloError as e:
            write_frame(replies, e.as_dict(), NO_VECTOR)
        except Exception as e:  # noqa: BLE001 - the text of it may hold a record, so it goes no further
            where = traceback.extract_tb(e.__traceback__)[-1]
            sys.stderr.write(f"trainer: {type(e).__name__} at {where.name}:{where.lineno}\n")
            write_frame(replies, {"error": {"code": "trainer.failed", "cause": "Training failed.",
                                            "mend": "See the agent's log on this machine."}}, NO_VECTOR)


def _load(request: dict[str, Any]) -> LocalTrainer:
    import torch

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    trainer = LocalTrainer(load_contract(request["contract"].encode()), request["site"], model=Path(request["model"]),
                           data=Path(request["data"]), text=request["text"], label=request["label"],
                           person=request["person"] or None, lineage=request["lineage"])
    trainer.probe()
    return trainer


def spec_to_json(spec: AdapterSpec) -> dict[str, Any]:
    return {"shapes": [[name, list(shape)] for name, shape in spec.shapes], "trained": sorted(spec.trained)}


def spec_from_json(value: dict[str, Any]) -> AdapterSpec:
    return AdapterSpec(tuple((name, tuple(shape)) for name, shape in value["shapes"]), frozenset(value["trained"]))


if __name__ == "__main__":
    main()
