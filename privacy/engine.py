"""Which code computes per-record gradients, and how. The release is the same mechanism with each: they differ in float
rounding, time and memory, so they are a site's own choice.

`opacus` and `fused` are held to one conformance suite; `device` and `checkpointing` change no bit of what is meant,
`bfloat16` changes the gradients as it does in training without privacy, before each record's is clipped in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from privacy.dpsgd import ClippedGradients, Losses, PerSampleGradients, Precision
from privacy.errors import Refused, UsageError
from privacy.fused import FusedGradients

if TYPE_CHECKING:
    import torch

Engine = Literal["opacus", "fused", "auto"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """A site's own choices. physical_batch: records in memory at a time; None for the contract's proposal. cache_mib: most
    memory for what frozen layers make of records."""

    engine: Engine = "auto"
    device: Device = "cpu"
    precision: Precision = "float32"
    checkpointing: bool = False
    physical_batch: int | None = None
    cache_mib: int = 1024

    def require_device(self) -> None:
        """Raises Refused `device.absent`."""
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise Refused("device.absent", "No CUDA device can be used here.",
                          "Set site.device=cpu, or install a driver and a torch build with CUDA.")


def gradients(engine: Engine, module: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], losses: Losses, *,
              precision: Precision = "float32", checkpointing: bool = False) -> ClippedGradients:
    """auto: fused, and Opacus where fused doesn't cover a layer. Raises UsageError `dp.no_per_sample_gradient`, and
    `dp.checkpointing` where activations would be computed twice under Opacus' hooks, which count them as two uses."""
    if engine != "opacus":
        try:
            return FusedGradients(module, parameters, losses, precision=precision, checkpointing=checkpointing)
        except UsageError as e:
            if engine == "fused" or e.code != "dp.no_per_sample_gradient":
                raise
    if checkpointing:
        raise UsageError("dp.checkpointing", "Gradient checkpointing goes with the fused engine only.",
                         "Set site.checkpointing=false and a smaller site.physical_batch, or site.engine=fused.")
    return PerSampleGradients(module, parameters, losses, precision=precision)
