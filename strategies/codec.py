"""PEFT's state dicts <-> our tensors, with every key checked in both directions.

PEFT loads wrong LoRA keys SILENTLY: they stay where they are and the adapter keeps its zeros. So nothing is loaded before
the keys, shapes and types are the model's own, and what was loaded is read back and compared bit by bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.errors import Refused
from privacy.files import read_file
from strategies.adapter import AdapterSpec, Tensors
from strategies.variants import check_variant

MAX_CONFIG = 2**20  # bytes of an adapter_config.json


def peft_spec(model: Any, adapter: str = "default") -> AdapterSpec:
    """Names, as PEFT saves them, and shapes of a PeftModel's LoRA tensors; all are trained. Sorted by name."""
    shapes = tuple(sorted((name, tuple(value.shape)) for name, value in _state(model, adapter).items()))
    return AdapterSpec(shapes, frozenset(name for name, _ in shapes))


def read(model: Any, adapter: str = "default") -> dict[str, NDArray[np.float32]]:
    """Copies of a PeftModel's LoRA tensors. Raises Refused `adapter.tensor` for one that isn't finite float32."""
    out = {}
    for name, value in _state(model, adapter).items():
        if str(value.dtype) != "torch.float32":  # numpy has no bfloat16
            raise Refused("adapter.tensor", f"Tensor {name!r} is of type {value.dtype}, not float32.",
                          "Load the adapter in float32 (autocast_adapter_dtype of PEFT).")
        out[name] = value.detach().cpu().numpy().copy()
    return peft_spec(model, adapter).check(out)


def write(model: Any, tensors: Tensors, adapter: str = "default") -> None:
    """Into a PeftModel. Raises Refused `adapter.tensor`, naming a key that is missing, extra, mis-shaped or mis-typed, and
    `adapter.load` when PEFT didn't take a tensor over as it is."""
    import torch
    from peft import set_peft_model_state_dict

    checked = peft_spec(model, adapter).check(tensors)
    result = set_peft_model_state_dict(model, {n: torch.from_numpy(v.copy()) for n, v in checked.items()}, adapter)
    lost = [k for k in (*result.unexpected_keys, *result.missing_keys) if "lora_" in k and f".{adapter}." in f".{k}."]
    after = read(model, adapter)
    lost += [n for n, v in checked.items() if after[n].tobytes() != v.tobytes()]
    if lost:
        raise Refused("adapter.load", f"PEFT did not load {lost[0]!r}.", "Use the PEFT release of this version.")


def read_folder(folder: Path, spec: AdapterSpec) -> dict[str, NDArray[np.float32]]:
    """A PEFT folder's tensors, which must be `spec`'s LoRA tensors. Raises Refused `adapter.variant`, `adapter.format`,
    `adapter.tensor`; UsageError `file.missing`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads(read_file(folder / "adapter_config.json", limit=MAX_CONFIG))
        check_variant(config)
        found = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, ValueError, RecursionError, AttributeError, TypeError, OSError) as e:
        # AttributeError: JSON, but no object. TypeError: numpy has no such type, as bfloat16.
        raise Refused("adapter.format", f"{folder.name} is no PEFT folder with safetensors.",
                      "Save the adapter with PEFT's save_pretrained.") from e
    own = tuple((name, shape) for name, shape in spec.shapes if ".lora_" in name)
    return AdapterSpec(own, frozenset(name for name, _ in own)).check(found)


def _state(model: Any, adapter: str) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    return {n: v for n, v in get_peft_model_state_dict(model, adapter_name=adapter).items() if "lora_" in n}
