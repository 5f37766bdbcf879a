"""A base model that is stored in 4 or 8 bits: which kinds may train under DP. The kind is part of the folder's config.json,
so the contract's digest of the model pins it for all sites.

Proven by a test against per-record autograd on the same base: NF4 of bitsandbytes, and LLM.int8 with threshold 0. With its
default threshold LLM.int8 picks outlier columns by the whole batch, so that one record changes another's gradient.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from privacy.errors import Refused, UsageError

EXTRA = "bitsandbytes"


def check_quantisation(folder: Path) -> str | None:
    """The kind of quantisation of a model folder with a config.json: nf4, int8, or None where it has none.

    Raises Refused `model.quantised` for a kind that isn't proven, UsageError `model.extra` where its package is missing.
    """
    config = json.loads((folder / "config.json").read_bytes()).get("quantization_config")
    if not config:
        return None
    kind = _kind(config) if isinstance(config, Mapping) else None
    if kind is None:
        method = config.get("quant_method", "unknown") if isinstance(config, Mapping) else "unknown"
        raise Refused("model.quantised", f"A base quantised by {str(method)[:40]!r} in this way can't train under DP: "
                      "nothing proves its per-sample gradients.", "Use NF4 of bitsandbytes, its LLM.int8 with "
                      "llm_int8_threshold 0, or the model in full precision.")
    if find_spec(EXTRA) is None:
        raise UsageError("model.extra", f"A base in {kind} is computed with {EXTRA}, which isn't installed.",
                         "pip install 'consilo[quantised]', or use the model in full precision.")
    return kind


def refuse_residual(config: Any) -> None:
    """For a rule that adds a residual to base weights. config: the base model's. Raises Refused `model.quantised`."""
    if getattr(config, "quantization_config", None):
        raise Refused("model.quantised", "A quantised base can't absorb the residual of this rule.",
                      "Use rule=ffa or another one without a residual, or the model in full precision.")


def _kind(config: Mapping[str, Any]) -> str | None:
    if config.get("quant_method") != "bitsandbytes":
        return None
    if config.get("load_in_4bit") is True and config.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    if config.get("load_in_8bit") is True and config.get("llm_int8_threshold") == 0:
        return "int8"
    return None
