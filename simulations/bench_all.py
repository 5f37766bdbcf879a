"""`fl-simulate bench all`: every bench, each in a process of its own, into one results file and one page.

A bench that fails, or that a quick run leaves out, is a part without a result that says why; nothing is filled in.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privacy import __version__
from privacy.files import FileLayer
from simulations.bench import environment, rounded
from simulations.bench_page import page

FORMAT = "consilo/bench/v1"
LEFT_OUT = "left out of a quick run"
PACKAGES = ("numpy", "torch", "flwr", "cryptography", "opacus", "peft", "transformers", "tenseal", "nvflare", "protobuf")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """arguments: after `fl-simulate bench`. quick: those of a quick run, None where it leaves the part out."""

    name: str
    title: str
    arguments: str
    quick: str | None = None


PARTS = (
    Part("secagg", "Secure aggregation", "secagg --sites 16 --dim 1000000 --drop 2",
         "secagg --sites 4 --dim 1000 --drop 1 --repeats 1"),
    Part("round", "A whole round over mutual TLS", "round --sites 4 --dim 1000000 --rounds 5"),
    Part("dp-step minilm", "A private step: MiniLM", "dp-step --model minilm --repeats 7"),
    Part("dp-step llama-like", "A private step: four Llama layers", "dp-step --model llama-like --repeats 15"),
    Part("dp-step smollm2", "A private step: SmolLM2-135M", "dp-step --model smollm2 --repeats 3"),
    Part("strategies", "Aggregation rules on skewed silos",
         "strategies --rule fedit --rule ffa --rule exact --rule flora --seeds 3"),
    Part("scale", "Coordinator with 64 sites", "scale --sites 64 --dim 1000000", "scale --sites 3 --dim 100"),
    Part("scale network", "The same over mutual TLS", "scale --sites 64 --dim 100000 --network"),
    Part("nvflare", "NVFlare's simulator", "nvflare --sites 8 --dim 100000", "nvflare --sites 2 --dim 100 --rounds 1"),
    Part("growth", "Growth with sites, parameters and rounds", "growth", "growth --quick"),
)


def run(out: Path, *, quick: bool = False, only: Collection[str] = (), nvflare: str | None = None,
        say: Say = lambda line: None) -> dict[str, Any]:
    """Fills `out` with results.json and index.html, anew after each part. only: names of parts; all by default."""
    out.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = {"format": FORMAT, "version": __version__, "quick": quick, "parts": [],
                            "began": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(*PACKAGES)}
    for part in PARTS:
        if only and part.name not in only:
            continue
        say(f"{part.name} ...")
        done["parts"].append(rounded(_run(part, quick, nvflare)))
        FileLayer().write_atomic(out / "results.json", json.dumps(done, indent=1, allow_nan=False).encode() + b"\n")
        FileLayer().write_atomic(out / "index.html", page(done).encode())
        say(f"{part.name}: {done['parts'][-1]['why'] or 'done'} after {done['parts'][-1]['seconds']:.0f} s")
    return done


def failed(done: dict[str, Any]) -> list[str]:
    """Names of the parts that ran and aren't right."""
    return [part["name"] for part in done["parts"] if part["code"]]


def _run(part: Part, quick: bool, nvflare: str | None) -> dict[str, Any]:
    """Its command, exit code (None if it didn't run), wall seconds, and the result or why there is none."""
    arguments = part.quick if quick else part.arguments
    found: dict[str, Any] = {"name": part.name, "title": part.title, "command": None, "code": None, "seconds": 0.0,
                             "result": None, "why": LEFT_OUT}
    if arguments is None:
        return found
    words = ["bench", *shlex.split(arguments), "--json"]
    start = time.perf_counter()
    code, last = _last_line(words, {"NVFLARE_PYTHON": nvflare} if nvflare else {})
    found |= {"command": shlex.join(["fl-simulate", *words]), "code": code, "seconds": time.perf_counter() - start}
    if last is None or "error" in last:
        return found | {"code": code or 1, "why": last["error"]["cause"] if last else f"failed with exit code {code}"}
    return found | {"result": last, "why": last.get("why")}


def _last_line(words: Sequence[str], variables: dict[str, str]) -> tuple[int, dict[str, Any] | None]:
    done = subprocess.run([sys.executable, "-P", "-m", "simulations.cli", *words], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONWARNINGS": "ignore", **variables}, check=False)
    lines = done.stdout.splitlines()
    try:
        last = json.loads(lines[-1])
    except (IndexError, ValueError):
        return done.returncode, None
    return done.returncode, last if isinstance(last, dict) else None
