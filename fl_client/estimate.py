"""`fl-client estimate`: what a contract's training would take on this machine, before anything is approved or spent.

Measured with the product's model and engine on a synthetic record, in batches that double until they reach the one asked
for, or the next would not fit. No record of the site is read; no key, ledger or network is used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from privacy.compute import Compute
from privacy.contract import Contract
from privacy.dpsgd import ClippedGradients
from privacy.engine import gradients
from privacy.errors import Refused
from privacy.fused import FusedGradients
from privacy.noise import lattice_noise
from privacy.population import Draw
from strategies.adapter import AdapterSpec
from strategies.base import Round, Rule, ranks, setup, widened
from strategies.cache import flat
from strategies.model import build
from strategies.rules import rule
from strategies.table import Owners

SAFE = 0.8  # of the free memory: the rest is for what else runs
MIB = 2**20
STATUS, PEAK, MEMORY, GROUP = (Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo"),
                               Path("/sys/fs/cgroup"))


@dataclass(frozen=True)
class Estimate:
    """batch: records at a time that were asked for; fits: whether they do; proposed: the most that did, of the sizes tried.

    model_mib: the process with the loaded model. step_mib: what a batch of `proposed` adds. records_mib: for what frozen
    layers make of the declared records, of which `kept` (0..1) are. free_mib: before the model was loaded. first_s: loading
    and encoding what is kept. step_s: one local step of the expected number of records. round_s: a round's local steps.
    job_s: all rounds and first_s. up_bytes, down_bytes: of one round, without the protocol's own few kB.
    """

    engine: str
    device: str
    precision: str
    dim: int
    batch: int
    fits: bool
    proposed: int
    model_mib: float
    step_mib: float
    records_mib: float
    free_mib: float
    kept: float
    records_per_step: int
    first_s: float
    step_s: float
    round_s: float
    job_s: float
    up_bytes: int
    down_bytes: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def render(self) -> str:
        """For people."""
        need = self.model_mib + self.step_mib + self.records_mib
        return "\n".join([
            f"engine   {self.engine} on {self.device} in {self.precision}, {self.dim} trained values",
            f"memory   {need:.0f} MiB: model {self.model_mib:.0f}, step {self.step_mib:.0f}, records {self.records_mib:.0f} "
            f"({self.kept:.0%} of them kept); {self.free_mib:.0f} MiB were free",
            f"batch    {self.batch} records at a time " + ("fit" if self.fits else
                                                           f"DON'T fit: set site.physical_batch={self.proposed}"),
            f"time     {self.first_s:.1f} s at the start, {self.step_s:.2f} s a step of about {self.records_per_step} "
            f"records, {self.round_s:.2f} s a round, {self.job_s:.0f} s for all rounds",
            f"network  {self.up_bytes} bytes up and {self.down_bytes} down in each round"])


class NoRecords:
    """An empty file of examples: `LoraModel.losses` then has its synthetic record only."""

    def __init__(self) -> None:
        self.owners: Owners | None = None
        self.contents: Any = ()

    def __len__(self) -> int:
        return 0

    def take(self, _rows: Iterable[int]) -> Any:
        raise IndexError

    def load(self) -> Any:
        raise IndexError

    def require_unchanged(self) -> None:
        """There is nothing to change."""


def estimate(contract: Contract, site: str, folder: Path, compute: Compute) -> Estimate:
    """site: of the contract; its declared size, rank and schedule count. folder: the base model's.

    Raises Refused `model.digest`, `device.absent`, `dp.memory` where not even one record fits; UsageError as the model and
    the engine do.
    """
    compute.require_device()
    free, start = free_bytes(compute.device), time.monotonic()
    own_rule = rule(contract.rule.name, secure=contract.secagg.enabled)
    rank = ranks(own_rule, contract)[[s.name for s in contract.sites].index(site)]
    model = build(folder, contract, rank)
    model.to(compute.device)
    own = model.spec(own_rule.trains)
    grads = gradients(compute.engine, model.module, {n: model.parameters[n] for n, _ in own.sizes},
                      model.losses(NoRecords(), compute), precision=compute.precision, checkpointing=compute.checkpointing)
    grads.check(0)
    load_s, resident = time.monotonic() - start, _peak(compute.device, lambda: None)
    encode_s, prepared = _timed(lambda: model.prepare(model.synthetic))
    mechanism, privacy = contract.mechanism(site), contract.privacy
    asked = compute.physical_batch or privacy.physical_batch
    proposed, grown, batch_s = _largest(grads, asked, mechanism.clip, compute.device, SAFE * free - resident)
    records = math.ceil(mechanism.q * mechanism.n_decl * mechanism.draws)
    row = sum(part.element_size() * part[0].numel() for part in flat(prepared))
    kept = min(1.0, compute.cache_mib * MIB / (row * mechanism.n_decl))
    encodings_s = encode_s / model.encode_batch
    noise_s, _ = _timed(lambda: lattice_noise(own.dim, sigma=mechanism.sigma, clip=mechanism.clip))
    step_s = batch_s * math.ceil(records / proposed) + records * (1 - kept) * encodings_s + noise_s
    first_s = load_s + (mechanism.n_decl * encodings_s if kept == 1 else 0.0)
    up, down = traffic(own_rule, contract, AdapterSpec(widened(own.shapes, contract.lora.r), own.trained))
    return Estimate(
        engine="fused" if isinstance(grads, FusedGradients) else "opacus", device=compute.device,
        precision=compute.precision, dim=own.dim, batch=asked, fits=proposed == asked, proposed=proposed,
        model_mib=resident / MIB, step_mib=grown / MIB, records_mib=kept * row * mechanism.n_decl / MIB,
        free_mib=free / MIB, kept=kept, records_per_step=records,
        first_s=first_s, step_s=step_s, round_s=step_s * mechanism.steps,
        job_s=first_s + step_s * mechanism.steps * privacy.rounds, up_bytes=up, down_bytes=down)


def traffic(own_rule: Rule, contract: Contract, spec: AdapterSpec) -> tuple[int, int]:
    """Bytes of a site's vectors in the costliest of two rounds (a rule may alternate): up, and down."""
    made, word = setup(own_rule, contract, spec), contract.secagg.ring // 8
    passes = range(1, own_rule.passes(made) + 1)
    up = max(sum(math.prod(part.shape) for number in passes for part in own_rule.plan(Round(made, no, {}), number))
             for no in (1, 2))
    return word * up, 4 * (spec.size + sum(math.prod(shape) for _, shape in own_rule.shares(made)))


def _largest(grads: ClippedGradients, asked: int, clip: float, device: str, room: float) -> tuple[int, float, float]:
    """The largest batch tried that fits, the bytes that it adds, and the seconds that it takes. room: bytes there are."""
    most, grown, took, size = 0, 0.0, math.inf, 1
    while not most or grown * size / most <= room:
        try:
            grads.require_fit(size)
        except Refused:
            if not most:
                raise
            break
        batch = Draw(np.zeros((size, 1), np.int64), np.ones(size, np.int64))
        begun = time.monotonic()
        grown = max(grown, _peak(device, partial(_drain, grads.clipped(batch, clip, size)), added=True))
        most, took = size, time.monotonic() - begun
        if size == asked:
            break
        size = min(2 * size, asked)
    return most, grown, took


def _drain(parts: Iterable[object]) -> None:
    for _ in parts:
        continue


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.monotonic()
    result = work()
    return time.monotonic() - begun, result


def free_bytes(device: str) -> float:
    """Memory that this process may still take: of the device, or of the machine and of the process's control group."""
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    found = [int(_field(MEMORY, "MemAvailable").split()[0]) * 1024]
    with suppress(OSError, ValueError):  # no limit: "max"
        found.append(int((GROUP / "memory.max").read_text()) - int((GROUP / "memory.current").read_text()))
    return float(min(found))


def _peak(device: str, work: Callable[[], object], *, added: bool = False) -> float:
    """Most bytes while `work` runs; added: less those before it. Linux."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return float(torch.cuda.max_memory_allocated() - (before if added else 0))
    PEAK.write_text("5")  # proc(5): VmHWM starts anew
    before = int(_field(STATUS, "VmRSS").split()[0])
    work()
    return 1024.0 * (int(_field(STATUS, "VmHWM").split()[0]) - (before if added else 0))


def _field(file: Path, name: str) -> str:
    return next(line.split(":", 1)[1].strip() for line in file.read_text().splitlines() if line.startswith(name + ":"))
