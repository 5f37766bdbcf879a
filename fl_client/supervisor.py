"""Keeps one warm trainer process: starts it, hands it work, kills it when it hangs, starts it again for the next round."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_client.frames import NO_VECTOR, read_frame, write_frame
from fl_client.trainer import spec_from_json
from privacy.errors import ConsiloError, Refused, Unreachable, UsageError
from strategies.adapter import AdapterSpec, Tensors

LOAD_S = 600.0
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH",
                    "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
           "TOKENIZERS_PARALLELISM": "false"}


class TrainerProcess:
    """`Trainer` in a child process. request: what `LocalTrainer` needs, as JSON values; limit_s: of one round.

    The constructor raises what loading raised there: Refused `model.digest`, `data.floor`; UsageError `data.*`, `dp.*`.
    """

    spec: AdapterSpec

    def __init__(self, request: dict[str, Any], *, limit_s: float) -> None:
        self._request, self._limit_s = {"op": "load", **request}, limit_s
        self._child: subprocess.Popen[bytes] | None = None
        self._start()

    def train(self, adapter: Tensors, round_no: int) -> NDArray[np.float32]:
        """Raises Unreachable `trainer.timeout`, `trainer.gone`; the child is then gone, the next call starts another."""
        if self._child is None or self._child.poll() is not None:
            self._start()
        _, vector = self._call({"op": "train", "round": round_no}, self.spec.pack(adapter), self._limit_s)
        return vector

    def close(self) -> None:
        """End the child: its pipe closes, and it is killed if that doesn't help within 2 s."""
        child, self._child = self._child, None
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        try:
            child.wait(2)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k in KEPT_ENVIRONMENT} | OFFLINE
        self._child = subprocess.Popen([sys.executable, "-P", "-m", "fl_client.trainer"], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, env=environment, bufsize=0)
        header, _ = self._call(self._request, NO_VECTOR, LOAD_S)
        self.spec = spec_from_json(header)

    def _call(self, header: dict[str, Any], vector: NDArray[np.float32],
              limit_s: float) -> tuple[dict[str, Any], NDArray[np.float32]]:
        child = self._child
        if child is None or child.stdin is None or child.stdout is None:
            raise Unreachable("trainer.gone", "There is no trainer process.", "Restart the agent.")
        try:
            write_frame(child.stdin.fileno(), header, vector)
            reply, result = read_frame(child.stdout.fileno(), timeout_s=limit_s)
        except BrokenPipeError as e:
            self._kill()
            raise Unreachable("trainer.gone", "The trainer process ended.", "See the agent's log.") from e
        except BaseException:  # a reply may still come: it must not be read as the next one's
            self._kill()
            raise
        if "error" in reply:
            error = reply["error"]
            kinds: dict[str, type[ConsiloError]] = {"data": UsageError, "dp": UsageError, "model": Refused}
            raise kinds.get(error["code"].split(".")[0], Refused)(error["code"], error["cause"], error["mend"])
        return reply, result

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
