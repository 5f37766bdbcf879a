"""Which code computes per-record gradients. The release is the same mechanism with each: it differs in float rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from privacy.compute import Engine, Precision
from privacy.dpsgd import ClippedGradients, Losses, PerSampleGradients
from privacy.errors import UsageError
from privacy.fused import FusedGradients

if TYPE_CHECKING:
    import torch


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
