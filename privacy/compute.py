"""A site's own choices about how a step is computed. None of them changes what is released but by float rounding.

`device`, `checkpointing` and `physical_batch` change nothing that is meant; `bfloat16` changes gradients as it does in
training without privacy, before each record's is clipped in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from privacy.errors import Refused

Engine = Literal["auto", "fused", "opacus"]
Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """engine: of per-record gradients. physical_batch: records in memory at a time; None for the contract's proposal.
    cache_mib: most memory for what frozen layers make of records."""

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
