"""What runs inside NVFlare's processes for `fl-simulate bench nvflare`; copied into its job, so it imports nothing of ours.

NVFlare's own FedAvg controller, aggregation, persistor and transport are untouched: a component of the server takes the
time and memory of its process, and sites draw their update where they would train.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.executor import Executor
from nvflare.apis.fl_component import FLComponent
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

TENSOR = "numpy_key"  # what NVFlare's persistor of arrays calls it
SEEN = {AppEventType.ROUND_STARTED: "started", AppEventType.AFTER_AGGREGATION: "aggregated"}


class Meter(FLComponent):  # type: ignore[misc]
    """Appends a JSON line to `out` when a round begins and when its mean is there. truth: a file of means for each round."""

    def __init__(self, out: str, truth: str) -> None:
        super().__init__()
        self._out, self._truth = out, truth

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type not in SEEN:
            return
        line: dict[str, Any] = {"event": SEEN[event_type], "cpu_s": time.process_time(), "wall_s": time.perf_counter(),
                                "peak_bytes": _status("VmHWM")}
        if event_type == AppEventType.AFTER_AGGREGATION:
            result = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT)
            mean = np.asarray(result.params[TENSOR], np.float64)
            with np.load(self._truth, allow_pickle=False) as truth:  # noqa: TID251 - no pickle
                line["error"] = float(np.abs(mean - truth[str(result.current_round)]).max())
        with Path(self._out).open("a") as f:
            f.write(json.dumps(line) + "\n")


class Drawn(Executor):  # type: ignore[misc]
    """A site: its update is a function of (site, round)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._dim = dim

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        asked = FLModelUtils.from_shareable(shareable)
        site = int(fl_ctx.get_identity_name().removeprefix("site-"))
        return FLModelUtils.to_shareable(FLModel(params_type=ParamsType.FULL, meta={"NUM_STEPS_CURRENT_ROUND": 1},
                                                 params={TENSOR: drawn(site, asked.current_round, self._dim)}))


def drawn(site: int, round_no: int, dim: int) -> Any:
    """float32 (dim,), uniform in [-1, 1]; the same as in simulations/bench_nvflare.py."""
    return np.random.default_rng((site, round_no)).random(dim, np.float32) * 2 - 1


def _status(name: str) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024
    except (OSError, KeyError):
        return None
