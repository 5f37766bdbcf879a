"""`fl-simulate bench nvflare`: FedAvg in NVFlare's own simulator, the baseline of `bench scale --network`.

Its server process is the simulator's; its sites are processes that the simulator starts. Figures are taken inside the
server's process (bench_nvflare_job.py). NVFlare may be installed beside this project or in an environment of its own, whose
Python is given. Without it, the result says so. docs/benchmarks.md documents every field.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from privacy.errors import Unreachable
from simulations.bench import environment

INSTALL = "pip install 'nvflare>=2.9,<2.10'"
WAIT_S = 900.0
TOLERANCE = 1e-6  # of a mean of float32
_JOB = Path(__file__).with_name("bench_nvflare_job.py")
_PATHS = {"fedavg": "nvflare.app_common.workflows.fedavg.FedAvg",
          "persistor": "nvflare.app_common.np.np_model_persistor.NPModelPersistor"}


def run(*, sites: int, dim: int, rounds: int, python: str | None = None) -> dict[str, Any]:
    """All figures of docs/benchmarks.md, `bench nvflare`. python: of an environment that has NVFlare; default: this one.

    Raises Unreachable `bench.process` where its simulator fails.
    """
    found: dict[str, Any] = {"bench": "nvflare", "sites": sites, "dim": dim, "rounds": rounds, "dtype": "float32",
                             "environment": environment("numpy"), "exact": None}
    version = _version(python)
    if version is None:
        return found | {"installed": None, "why": f"NVFlare is not installed: {INSTALL}, here or in an environment of its "
                                                  "own whose Python is given with --python or NVFLARE_PYTHON."}
    with tempfile.TemporaryDirectory(prefix="consilo-") as name:
        lines = _simulate(Path(name), python or sys.executable, sites, dim, rounds)
    spans = [(b["cpu_s"] - a["cpu_s"], b["wall_s"] - a["wall_s"]) for a, b in pairwise(lines) if a["event"] == "started"]
    peak, errors = lines[-1]["peak_bytes"], [line["error"] for line in lines if "error" in line]
    counted = spans[1:] or spans  # the first round loads code
    return found | {"installed": version, "why": None, "exact": len(errors) == rounds and max(errors) <= TOLERANCE,
                    "max_error": max(errors), "peak_rss_mib": None if peak is None else peak / 2**20,
                    "cpu_s_per_site": median(cpu for cpu, _ in counted) / sites,
                    "wall_s": median(wall for _, wall in counted), "samples": spans}


def render(found: dict[str, Any]) -> str:
    """The same for people."""
    if found["installed"] is None:
        return str(found["why"])
    peak = found["peak_rss_mib"]
    return "\n".join((
        f"NVFlare {found['installed']}, simulator, FedAvg: {found['sites']} sites, {found['dim']} values, {found['rounds']} "
        "rounds", f"means right: {'yes' if found['exact'] else 'NO'}",
        f"server process, peak resident memory: {'unknown' if peak is None else f'{peak:.1f} MiB'}",
        f"server process, CPU ms a site and round: {1e3 * found['cpu_s_per_site']:.2f}",
        f"a round: {found['wall_s']:.2f} s"))


def _version(python: str | None) -> str | None:
    """NVFlare's, as that Python has it; None without it. Raises Unreachable `bench.process`."""
    if python is None and find_spec("nvflare") is None:
        return None
    asked = [python or sys.executable, "-c", "from importlib.metadata import version; print(version('nvflare'))"]
    try:
        return subprocess.run(asked, check=True, text=True, capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as e:
        raise Unreachable("bench.process", "The Python that was given has no NVFlare.", f"With its pip: {INSTALL}.") from e


def _simulate(folder: Path, python: str, sites: int, dim: int, rounds: int) -> list[dict[str, Any]]:
    """What the meter wrote."""
    app, out, start, truth = folder / "job" / "app", folder / "out.jsonl", folder / "start.npy", folder / "truth.npz"
    (app / "config").mkdir(parents=True)
    (app / "custom").mkdir()
    shutil.copyfile(_JOB, app / "custom" / _JOB.name)
    np.save(start, np.zeros(dim, np.float32), allow_pickle=False)
    np.savez(truth, **{str(no): np.mean([drawn(site, no, dim) for site in range(1, sites + 1)], 0, np.float64)  # type: ignore[arg-type]
                       for no in range(rounds)})
    server = {"format_version": 2,
              "workflows": [{"id": "fedavg", "path": _PATHS["fedavg"], "args": {
                  "num_clients": sites, "num_rounds": rounds, "persistor_id": "persistor"}}],
              "components": [{"id": "persistor", "path": _PATHS["persistor"],
                              "args": {"source_ckpt_file_full_name": str(start)}},
                             {"id": "meter", "path": f"{_JOB.stem}.Meter", "args": {"out": str(out), "truth": str(truth)}}]}
    client = {"format_version": 2, "components": [], "executors": [
        {"tasks": ["train"], "executor": {"path": f"{_JOB.stem}.Drawn", "args": {"dim": dim}}}]}
    for file, content in ((folder / "job" / "meta.json", {"name": "bench", "min_clients": sites,
                                                          "deploy_map": {"app": ["@ALL"]}}),
                          (app / "config" / "config_fed_server.json", server),
                          (app / "config" / "config_fed_client.json", client)):
        file.write_text(json.dumps(content))
    command = [python, "-m", "nvflare.private.fed.app.simulator.simulator", str(folder / "job"), "-w", str(folder / "work"),
               "-n", str(sites), "-t", str(sites)]
    with (folder / "log").open("wb") as log:
        code = subprocess.run(command, cwd=folder, stdout=log, stderr=log, timeout=WAIT_S, check=False,
                              env={**os.environ, "PYTHONPATH": ""}).returncode
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    if code or len(lines) != 2 * rounds:
        last = (folder / "log").read_text(errors="replace").strip().splitlines()[-3:]
        raise Unreachable("bench.process", f"NVFlare's simulator failed: {' '.join(last)[-300:]}",
                         "Check that environment, or leave NVFlare out.")
    return lines


def drawn(site: int, round_no: int, dim: int) -> Any:
    """float32 (dim,), uniform in [-1, 1]; the same as in simulations/bench_nvflare_job.py."""
    return np.random.default_rng((site, round_no)).random(dim, np.float32) * 2 - 1
