"""What other trainers call what is called otherwise here, because it means something else, or more."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FAMILIAR: Mapping[str, tuple[str, str]] = MappingProxyType({  # name -> key, and what to know
    # transformers.TrainingArguments
    "per_device_train_batch_size": ("site.physical_batch", "memory only: privacy.q decides how many records a step samples"),
    "gradient_checkpointing": ("site.checkpointing", ""),
    "learning_rate": ("rule.server_lr", "the step on the noisy mean; rule.local_lr scales it at the site"),
    "max_grad_norm": ("privacy.clip", "of each record's gradient, not of the batch's"),
    "max_steps": ("privacy.rounds", "each of privacy.local_steps steps"),
    "num_train_epochs": ("privacy.rounds", "a round samples a share privacy.q of the records"),
    "eval_steps": ("server.evaluate_every", "in rounds"),
    "output_dir": ("server.out", ""),
    "bf16": ("site.precision", "bfloat16"),
    "use_cpu": ("site.device", "cpu"),
    "optim": ("rule.optimizer", "the server's"),
    # trl.SFTConfig
    "max_seq_length": ("model.max_length", ""),
    "dataset_text_field": ("site.text", ""),
    "chat_template_path": ("model.path", "the template is the model folder's own"),
    # peft.LoraConfig
    "lora_alpha": ("lora.alpha", ""),
    "target_modules": ("lora.targets", ""),
    "layers_to_transform": ("lora.layers", "negative ones count from the last"),
    # opacus.PrivacyEngine
    "noise_multiplier": ("privacy.sigma", "null: calibrated to privacy.epsilon"),
    "target_epsilon": ("privacy.epsilon", "of all rounds and retries together"),
    "target_delta": ("privacy.delta", ""),
    "sample_rate": ("privacy.q", ""),
    "max_physical_batch_size": ("site.physical_batch", ""),
})


def hint(name: str) -> str:
    """Such as "Here it is lora.alpha.", or "" for a name that isn't known from elsewhere."""
    if name not in FAMILIAR:
        return ""
    key, note = FAMILIAR[name]
    return f"Here it is {key}{f' ({note})' if note else ''}."
