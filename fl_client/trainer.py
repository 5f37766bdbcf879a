"""The warm trainer process: enters its sandbox, loads model and data once, then trains on request until its pipe closes.

`python -P -m fl_client.trainer`; requests on stdin, replies on what was stdout. It holds no key, knows no coordinator
and opens no connection; its parent holds the link. Until it is inside, it imports what starts no thread: no numpy.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fl_client.frames import Peer
from fl_client.sandbox import Sandbox, enter
from privacy.errors import ConsiloError, Refused, Unreachable

if TYPE_CHECKING:
    from fl_client.training import LocalTrainer
    from strategies.adapter import AdapterSpec

T = TypeVar("T")
Reply = tuple[dict[str, Any], bytes]


def main() -> None:
    """Serve one agent: enter, load, then train again and again. Ends when the agent does."""
    agent = Peer(0, os.dup(1))
    os.dup2(2, 1)  # whatever a library prints goes to the log, not into a frame
    warnings.simplefilter("ignore")
    try:
        if _answer(agent, _enter):
            trainer = _answer(agent, _load)
            while trainer is not None:
                _answer(agent, partial(_train, trainer))
    except Unreachable:
        return


def _answer(agent: Peer, work: Callable[[dict[str, Any], bytes], tuple[T, Reply]]) -> T | None:
    """Do one request. What it failed with goes back instead; then the result is None."""
    request, payload = agent.receive()
    result = None
    try:
        result, reply = work(request, payload)
    except ConsiloError as e:
        reply = {**e.as_dict(), "kind": type(e).__name__}, b""
    except Exception as e:  # noqa: BLE001 - the text of it may hold a record, so it goes no further
        where = traceback.extract_tb(e.__traceback__)[-1]
        sys.stderr.write(f"trainer: {type(e).__name__} at {where.name}:{where.lineno}\n")
        reply = {"error": {"code": "trainer.failed", "cause": "Training failed.",
                           "mend": "See the agent's log on this machine."}}, b""
    agent.send(*reply)
    return result


def _enter(request: dict[str, Any], _: bytes) -> tuple[bool, Reply]:
    wanted: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in request["sandbox"].items()}
    return True, ({"walls": enter(Sandbox(**wanted), scratch=request["scratch"], parent=request["parent"])}, b"")


def _load(request: dict[str, Any], _: bytes) -> tuple[LocalTrainer, Reply]:
    try:  # before a record is read, so the text of a failure holds none
        import opacus  # noqa: F401
        import peft  # noqa: F401
        import torch

        from fl_client.training import LocalTrainer
        from privacy.compute import Compute
        from privacy.contract import load_contract
    except (ImportError, OSError) as e:
        raise Refused("sandbox.unreadable", f"The trainer can't load its libraries ({' '.join(str(e).split())[:300]}).",
                      "Let the sandbox read the folder that the message names, or repair the installation.") from e
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    trainer = LocalTrainer(load_contract(request["contract"].encode()), request["site"], model=Path(request["model"]),
                           data=Path(request["data"]), text=request["text"], label=request["label"],
                           person=request["person"] or None, lineage=request["lineage"],
                           compute=Compute(**request["compute"]))
    trainer.probe()
    return trainer, (spec_to_json(trainer.spec), b"")


def _train(trainer: LocalTrainer, request: dict[str, Any], payload: bytes) -> tuple[None, Reply]:
    import numpy as np

    adapter = trainer.spec.unpack(np.frombuffer(payload, "<f4").astype(np.float32))
    return None, ({}, trainer.train(adapter, request["round"]).astype("<f4").tobytes())


def spec_to_json(spec: AdapterSpec) -> dict[str, Any]:
    return {"shapes": [[name, list(shape)] for name, shape in spec.shapes], "trained": sorted(spec.trained)}


def spec_from_json(value: dict[str, Any]) -> AdapterSpec:
    from strategies.adapter import AdapterSpec

    return AdapterSpec(tuple((name, tuple(shape)) for name, shape in value["shapes"]), frozenset(value["trained"]))


if __name__ == "__main__":
    main()
