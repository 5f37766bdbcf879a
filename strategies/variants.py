"""Which PEFT variants may train under DP: an allow-list, each proven by a test against per-example autograd.

Proven: LoRA on linear layers, rsLoRA, PiSSA, OLoRA, lora_bias, ranks and alphas by pattern. All else is refused by name:
one without per-sample gradients would fail at the first batch at best, and train with wrong ones at worst (VB-LoRA does).
`check_variant` looks at a configuration, `check_layers` at the model that was made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from privacy.errors import Refused

STARTS = (True, False, "gaussian", "olora", "pissa")  # of init_lora_weights; pissa_niter_16 and the like as well
FREE = frozenset({  # options of LoraConfig that change neither which gradients exist nor what they are
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "lora_bias", "megatron_core",
    "qalora_group_size", "runtime_config"})
PLAIN = "Use plain LoRA or rsLoRA on linear layers."
NO_GRADIENT = "its parameters have no per-sample gradients"
PUBLIC = "it reads data to start: a record must not steer what is shared"
TYPES = {  # of peft_type, beside LORA
    "ADALORA": f"{NO_GRADIENT}, and ranks would follow the records", "IA3": NO_GRADIENT, "LOHA": NO_GRADIENT,
    "LOKR": NO_GRADIENT, "OFT": "it fails under the hooks of per-sample gradients", "VERA": NO_GRADIENT,
    "VBLORA": "it has none under hooks, and silently wrong ones under vmap", "BOFT": NO_GRADIENT}
OPTIONS = {  # of LoraConfig: what it is called, and why not
    "use_dora": ("DoRA", "its magnitudes fail under the hooks of per-sample gradients", PLAIN),
    "modules_to_save": ("modules_to_save", "whole modules would be trained", "Train the head that the task brings."),
    "trainable_token_indices": ("trainable tokens", "embeddings have no per-sample gradients here", PLAIN),
    "target_parameters": ("LoRA on bare parameters", "fused experts have no per-sample gradients", PLAIN),
    "bias": ("bias", "biases of the base model would be trained and not sent", "Set bias to none; lora_bias is proven.")}
INITIAL = {
    "eva": ("EVA", PUBLIC, "Compute it from public data, and broadcast the tensors as the start."),
    "corda": ("CorDA", PUBLIC, "Compute it from public data, and broadcast the tensors as the start."),
    "lora_ga": ("LoRA-GA", PUBLIC, "Compute it from public data, and broadcast the tensors as the start."),
    "orthogonal": ("init_lora_weights=orthogonal", "its rows aren't orthonormal", "Leave it: the start is drawn by QR."),
    "loftq": ("LoftQ", "it changes the quantised base, which must be the contract's", PLAIN)}
PER_SAMPLE = ("Linear", "Linear4bit", "Linear8bitLt")  # kinds of layers that LoRA is proven on


def check_variant(config: Mapping[str, Any]) -> None:
    """config: as in adapter_config.json, or LoraConfig.to_dict(). Raises Refused `adapter.variant`."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        raise _refuse(kind, TYPES.get(kind, "nothing proves its per-sample gradients"), PLAIN)
    start = config.get("init_lora_weights", True)
    name = start.lower() if isinstance(start, str) else start
    if name not in STARTS and not (isinstance(name, str) and name.startswith("pissa_niter_")):
        raise _refuse(*INITIAL.get(str(name), (f"init_lora_weights={start}", "nothing proves that start", PLAIN)))
    for option, value in config.items():
        if option in FREE or value in (None, False, {}, [], "none"):
            continue
        raise _refuse(*OPTIONS.get(option, (option, "nothing proves its per-sample gradients", PLAIN)))


def check_layers(model: Any) -> None:
    """model: a PeftModel. Raises Refused `adapter.variant` for LoRA on anything but a linear layer, for more than one
    adapter, and for an 8-bit base whose outlier columns couple the records of a batch."""
    if len(model.peft_config) != 1:
        raise _refuse("several adapters", "only one is trained and sent", "Give a model with one adapter.")
    for name, layer in model.named_modules():
        if getattr(layer, "lora_embedding_A", None):
            raise _refuse(f"LoRA on the embedding {name!r}", "embeddings have no per-sample gradients here", PLAIN)
        base = getattr(layer, "base_layer", None)
        if base is not None and getattr(layer, "lora_A", None) and type(base).__name__ not in PER_SAMPLE:
            raise _refuse(f"LoRA on the {type(base).__name__} {name!r}", "nothing proves its per-sample gradients", PLAIN)
        state = getattr(layer, "state", None)  # PEFT's wrapper has the name of what it wraps, and none
        if type(layer).__name__ == "Linear8bitLt" and getattr(state, "threshold", 0.0) != 0.0:
            raise _refuse("LLM.int8 with a threshold", "its outlier columns couple the records of a batch",
                          "Load the base with llm_int8_threshold=0, or in 4 bits.")


def _refuse(name: str, why: str, mend: str) -> Refused:
    return Refused("adapter.variant", f"{name} can't train under DP: {why}.", mend)
