"""What a rule's adapter has beside PEFT's A and B, in a torch model: a core between them, a residual on the base weight.

Both give what strategies/merge.py writes down: W0 + s (residual + B R A).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.base import CORE, RESIDUAL, A
from strategies.merge import folded


def add_cores(peft: Any) -> None:
    """Put an r x r linear layer between lora_A and lora_B of each adapted layer; per-sample gradients cover it."""
    import torch

    for layer in peft.modules():
        if getattr(layer, "lora_A", None):
            b = layer.lora_B["default"]
            layer.lora_B["default"] = torch.nn.Sequential(torch.nn.Linear(b.in_features, b.in_features, bias=False), b)


def saved_name(parameter: str) -> str:
    """PEFT's saved name of a parameter of a PeftModel, perhaps with cores."""
    return parameter.replace(".lora_B.default.0.", ".lora_R.").replace(".lora_B.default.1.", ".lora_B.").replace(
        ".default.", ".")


class Residuals:
    """Adds s * residual to the float32 base weights of the named modules; each load starts from the first weights."""

    def __init__(self, peft: Any, modules: list[str]) -> None:
        self._layers = {module: peft.get_submodule(module) for module in modules}
        self._base = {module: layer.base_layer.weight.detach().clone() for module, layer in self._layers.items()}

    def load(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        import torch

        with torch.no_grad():
            for module, layer in self._layers.items():
                residual = torch.from_numpy(np.ascontiguousarray(tensors[module + RESIDUAL]))
                layer.base_layer.weight.copy_(self._base[module] + layer.scaling["default"] * residual)


def as_plain_lora(tensors: Mapping[str, NDArray[np.float32]], config: Mapping[str, Any]
                  ) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """The same function for PEFT alone: tensors without core and residual, and the configuration with their ranks."""
    if not any(name.endswith((CORE, RESIDUAL)) for name in tensors):
        return dict(tensors), dict(config)
    plain, scale = folded(tensors), config["lora_alpha"] / config["r"]
    ranks = {n.removesuffix(A).removeprefix("base_model.model."): v.shape[0] for n, v in plain.items() if n.endswith(A)}
    return plain, {**config, "rank_pattern": ranks, "alpha_pattern": {m: scale * r for m, r in ranks.items()}}
