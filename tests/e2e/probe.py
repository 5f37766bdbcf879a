"""Real processes for test_dropouts.py: the product's own commands, forked from one process that has loaded the libraries.

`python -P probe.py` reads one JSON request a line from stdin and answers each with one line; when stdin ends, it kills
what still runs. A site trains on nothing (its update is random), writes down each encoded update and how it answered
each message, and falls out where it is told to; the coordinator writes down each sum that it unmasked.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpcore  # noqa: F401 - loaded here once
import numpy as np
import peft  # noqa: F401
from numpy.typing import NDArray
from transformers import AutoTokenizer, BertModel  # noqa: F401

import fl_client.agent
import fl_client.cli
import fl_client.link
import fl_server.cli
import fl_server.serve
from conf import load_settings
from fl_client.app import Handler, Reply, StageRefused, Vector
from fl_client.round import SiteRound
from fl_server.round import RoundDriver
from privacy import guard
from privacy.canonical import parse
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.encoding import Encoding
from strategies.adapter import AdapterSpec, Tensors

GATHER_S = 240.0


def site(job: dict[str, Any]) -> int:
    """`fl-client run`. job: overrides, spec, dump; fall: {stage, when: asked | answered, signal} or nothing; trains: with
    its real trainer."""
    plan, encoded = dict(job["fall"]), list[list[int]]()
    encode, handlers = Encoding.encode, SiteRound.handlers

    class RandomUpdate:
        def __init__(self, *_: Any, **__: Any) -> None:
            shapes, trained = job["spec"]
            self.spec = AdapterSpec(tuple((name, tuple(shape)) for name, shape in shapes), frozenset(trained))

        def train(self, adapter: Tensors, round_no: int) -> NDArray[np.float32]:
            _note(job["dump"], stage="drawn", code="", round=round_no)
            return np.random.default_rng().standard_normal(self.spec.dim, np.float32)

        def close(self) -> None:
            pass

    def kept(encoding: Encoding, update: NDArray[np.float32], weight: float, **how: bool) -> Any:
        words = encode(encoding, update, weight, **how)
        encoded.append(words.tolist())  # before it is masked, in place
        return words

    def fall(stage: str, when: str) -> None:
        if (plan.get("stage"), plan.get("when")) == (stage, when):
            number = plan["signal"]
            plan.clear()
            os.kill(os.getpid(), number)

    def watched(stage: str, handler: Handler) -> Handler:
        def run(body: bytes, arrays: dict[str, Vector]) -> Reply:
            fall(stage, "asked")
            try:
                reply = handler(body, arrays)
            except StageRefused as e:
                _note(job["dump"], stage=stage, code=e.code.value)
                raise
            offer = parse(body) if stage == "update" else {}
            _note(job["dump"], stage=stage, code="", round=offer.get("round"), attempt=offer.get("attempt"),
                  words=encoded[-1] if offer else [])
            fall(stage, "answered")
            return reply

        return run

    if not job.get("trains"):
        fl_client.agent.TrainerProcess = RandomUpdate
    Encoding.encode = kept
    SiteRound.handlers = lambda self: {
        name: watched(name.partition(".")[2], handler) for name, handler in handlers(self).items()}
    sys.argv = ["fl-client", "run", *job["overrides"]]
    return fl_client.cli.main()


def coordinator(job: dict[str, Any]) -> int:
    """`fl-server run`, or another command of it. job: overrides, dump, command; gather: each attempt begins once all sites
    are connected; gate: path of a file of JSON, {rounds: no later one begins yet, gather}, which is read before each."""
    unmask, attempt = CoordinatorSession.unmask, RoundDriver.attempt

    def unmasked(session: CoordinatorSession) -> Any:
        total = unmask(session)
        _note(job["dump"], round=session.offer.round, attempt=session.offer.attempt, words=total.tolist())
        return total

    def gathered(driver: RoundDriver, round_no: int, *args: Any) -> Any:
        while (said := _gate(job)).get("rounds", round_no) < round_no:
            time.sleep(0.05)
        if job["gather"] or said.get("gather"):
            driver._exchange.wait_online(driver._names, GATHER_S)
        return attempt(driver, round_no, *args)

    CoordinatorSession.unmask = unmasked
    RoundDriver.attempt = gathered
    sys.argv = ["fl-server", job.get("command", "run"), *job["overrides"]]
    return fl_server.cli.main()


def _gate(job: dict[str, Any]) -> dict[str, Any]:
    gate = Path(job.get("gate", ""))
    return dict(json.loads(gate.read_text())) if gate.is_file() else {}


def _note(path: str, **what: Any) -> None:
    with Path(path).open("a") as f:
        f.write(json.dumps(what) + "\n")


def _start(main: Callable[[dict[str, Any]], int], job: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    code = 70
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for fd, target in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(target, fd)
        code = main(job)
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, timeout_s: float) -> int | None:
    """The exit code, below zero for a signal; None if it still runs."""
    end = time.monotonic() + timeout_s
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            return None
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(found[1])


def main() -> None:
    alive: set[int] = set()
    load_settings([])
    guard.check()
    guard.check = lambda: None  # once for all that is forked from here
    gc.freeze()  # what is loaded stays shared; no child looks through it again
    try:
        for line in sys.stdin:
            request = json.loads(line)
            pid, result = request.get("pid", 0), None
            if request["do"] == "start":
                pid = result = _start({"site": site, "coordinator": coordinator}[request["role"]], request["job"])
                alive.add(pid)
            elif pid in alive and request["do"] == "signal":
                os.kill(pid, request["signal"])
            elif pid in alive and (result := _wait(pid, request["timeout_s"])) is not None:
                alive.remove(pid)
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
    finally:
        for pid in alive:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
