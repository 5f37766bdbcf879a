"""Keeps one warm trainer process: starts it in its sandbox, hands it work, kills it when it hangs, starts it again.

Guarantees: no call waits longer than its limit, whatever the trainer does; after a failed one the trainer and its whole
process group are gone, with what they held of a device, and its scratch folder; the trainer ends with the agent.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_client.frames import Peer
from fl_client.sandbox import ENFORCED, MENDS, Sandbox
from fl_client.trainer import spec_from_json
from privacy.errors import CheckFailed, ConsiloError, Refused, Unreachable, UsageError
from strategies.adapter import AdapterSpec, Tensors

log = logging.getLogger("consilo.trainer")

COMMAND = (sys.executable, "-P", "-m", "fl_client.trainer")
ENTER_S, LOAD_S, CLOSE_S, KILL_S = 60.0, 600.0, 2.0, 10.0
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH", "VIRTUAL_ENV",
                    "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
           "TOKENIZERS_PARALLELISM": "false"}
KINDS = {kind.__name__: kind for kind in (CheckFailed, UsageError, Refused, Unreachable)}
DEFAULT = Sandbox()


def walls(sandbox: Sandbox = DEFAULT) -> dict[str, str]:
    """What would hold around a trainer on this machine: wall -> ENFORCED or a key of `sandbox.MENDS`. Found by a process
    that tries, without model or data; nothing is required of it.
    """
    starter = ThreadPoolExecutor(1)
    child = _Child(starter)
    try:
        return child.enter(replace(sandbox, required=()))
    finally:
        child.end()
        starter.shutdown()


class TrainerProcess:
    """`Trainer` in a child process. request: what `LocalTrainer` needs, as JSON values; limit_s: of one round.

    `walls`: what holds around it. The constructor raises what `sandbox.enter` and loading raised there: Refused
    `sandbox.*`, `model.digest`, `data.floor`; UsageError `data.*`, `dp.*`.
    """

    spec: AdapterSpec
    walls: dict[str, str]

    def __init__(self, request: dict[str, Any], *, limit_s: float, sandbox: Sandbox = DEFAULT) -> None:
        self._request, self._limit_s = request, limit_s
        self._sandbox = replace(sandbox, readable=(*sandbox.readable, request["model"], request["data"]))
        self._child: _Child | None = None
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def train(self, adapter: Tensors, round_no: int) -> NDArray[np.float32]:
        """Raises Unreachable `trainer.timeout`, `trainer.gone`; the child is then gone, the next call starts another."""
        child = self._child if self._child is not None and self._child.alive() else self._start()
        payload = self.spec.pack(adapter).astype("<f4").tobytes()
        _, result = child.ask({"round": round_no}, payload, limit_s=self._limit_s, reply=4 * self.spec.dim)
        return np.frombuffer(result, "<f4").astype(np.float32)

    def close(self) -> None:
        """End the child: its pipe closes, and it is killed if that doesn't help within 2 s."""
        self._drop(CLOSE_S)
        self._starter.shutdown()

    def _start(self) -> _Child:
        self._drop()
        child = self._child = _Child(self._starter)
        self.walls = child.enter(self._sandbox)
        for wall, reason in self.walls.items():
            if reason != ENFORCED:
                log.warning("the trainer's wall %s doesn't hold (%s): %s", wall, reason, MENDS[reason])
        try:
            self.spec = spec_from_json(child.ask(self._request, limit_s=LOAD_S)[0])
        except (KeyError, TypeError, ValueError) as e:
            raise _strange() from e
        return child

    def _drop(self, patience_s: float = 0.0) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end(patience_s)


def _error(header: dict[str, Any]) -> ConsiloError:
    """What the trainer says that it raised."""
    try:
        return KINDS.get(header.get("kind", ""), Refused)(**header["error"])
    except (TypeError, AttributeError):  # not in the agreed form
        return _strange()


def _strange() -> Unreachable:
    return Unreachable("trainer.gone", "The trainer answered something else.", "Restart the agent.")


class _Child:
    """One process, its pipes and its scratch folder.

    starter: whose one thread starts it and must outlive it: the kernel ends it with that thread (PR_SET_PDEATHSIG).
    """

    def __init__(self, starter: ThreadPoolExecutor) -> None:
        self._scratch = tempfile.mkdtemp(prefix="consilo-trainer-")
        environment = {k: v for k, v in os.environ.items() if k in KEPT_ENVIRONMENT} | OFFLINE
        self._process = starter.submit(
            subprocess.Popen, COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0,
            start_new_session=True).result()
        self._exited = os.pidfd_open(self._process.pid)
        source, sink = self._pipes = [pipe for pipe in (self._process.stdout, self._process.stdin) if pipe is not None]
        self._peer = Peer(source.fileno(), sink.fileno(), self._exited)
        self._ended = False

    def enter(self, sandbox: Sandbox) -> dict[str, str]:
        request = {"sandbox": asdict(sandbox), "scratch": self._scratch, "parent": os.getpid()}
        held: dict[str, str] = self.ask(request, limit_s=ENTER_S)[0]["walls"]
        return held

    def ask(self, request: dict[str, Any], payload: bytes = b"", *, limit_s: float,
            reply: int = 0) -> tuple[dict[str, Any], bytes]:
        """One request and its reply of `reply` bytes. An error reply is raised; any other failure ends the child."""
        end = time.monotonic() + limit_s
        try:
            self._peer.send(request, payload, end=end)
            header, result = self._peer.receive(limit=reply, end=end)
            if "error" not in header and len(result) != reply:
                raise _strange()
        except BaseException:  # a reply may still come: it must not be read as the next one's
            self.end()
            raise
        if "error" in header:
            raise _error(header)
        return header, result

    def alive(self) -> bool:
        return not self._ended and not self._has_exited(0.0)

    def end(self, patience_s: float = 0.0) -> None:
        """Close the pipes, wait, then kill what is left of its process group. Raises Unreachable `trainer.stuck`."""
        if self._ended:
            return
        self._ended = True
        for pipe in self._pipes:
            pipe.close()
        self._has_exited(patience_s)
        try:
            with suppress(ProcessLookupError):  # not waited for yet, so the number is still its own
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(KILL_S)
        except subprocess.TimeoutExpired as e:
            raise Unreachable("trainer.stuck", "The trainer was killed, but its device driver doesn't let it end.",
                              "Restart this machine, or reset the device.") from e
        finally:
            os.close(self._exited)
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _has_exited(self, patience_s: float) -> bool:
        poll = select.poll()
        poll.register(self._exited, select.POLLIN)
        return bool(poll.poll(1000 * patience_s))
