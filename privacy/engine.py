"""Which code computes per-record gradients. The release is the same mechanism with each: it differs in float rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from privacy.dpsgd import ClippedGradients, Losses, PerSampleGradients
from privacy.errors import UsageError
from privacy.fused import FusedGradients

if TYPE_CHECKING:
    import torch

Engine = Literal["opacus", "fused", "auto"]


def gradients(engine: Engine, module: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter],
              losses: Losses) -> ClippedGradients:
    """auto: fused, and Opacus where fused doesn't cover a layer. Raises UsageError `dp.no_per_sample_gradient`."""
    if engine == "opacus":
        return PerSampleGradients(module, parameters, losses)
    try:
        return FusedGradients(module, parameters, losses)
    except UsageError as e:
        if engine == "fused" or e.code != "dp.no_per_sample_gradient":
            raise
    return PerSampleGradients(module, parameters, losses)
