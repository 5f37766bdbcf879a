"""The model card beside a released adapter: what it is, how it was made, what may be said of its privacy."""

from __future__ import annotations

from pathlib import Path

from privacy.contract import Contract

LOADER = '''```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

base = "PATH_OF_{name}"
encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base), ".").eval()
head = load_file("head.safetensors")
tokens = AutoTokenizer.from_pretrained(base)(
    ["text"], padding="max_length", truncation=True, max_length={length}, return_tensors="pt")
with torch.no_grad():
    out, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    pooled = {pooling}
    logits = torch.nn.functional.normalize(pooled, dim=-1) * {scale} @ head["weight"].T + head["bias"]
```'''


def write_card(folder: Path, contract: Contract, base_name: str, rounds: int, before: float, after: float,
               split: str) -> None:
    """Write README.md (a Hugging Face model card) and labels.txt."""
    p, lora, model = contract.privacy, contract.lora, contract.model
    if p.epsilon is None:
        privacy = "NON-PRIVATE: no noise was added, nothing bounds what the adapter tells about a record."
    else:
        delta = max(s.delta for s in contract.sites)
        privacy = (f"Each site's {p.unit}s are protected by its own noise: at most epsilon = {p.epsilon} at delta = "
                   f"{delta} (add/remove of one {p.unit}) for the {p.rounds} planned rounds and {p.retries} retries "
                   "together. The evidence and report of the run say what was spent; `fl-privacy verify` recomputes it.")
    pooling = "out[:, 0]" if model.pooling == "cls" else "(out * mask).sum(1) / mask.sum(1)"
    loader = LOADER.format(name=base_name, length=model.max_length, scale=model.scale, pooling=pooling)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in contract.data.labels), encoding="utf-8")
    (folder / "README.md").write_text(f"""---
library_name: peft
base_model: {base_name}
tags: [lora, federated, differential-privacy]
---
# {contract.data.name}: LoRA adapter

{contract.purpose}.

- Base model: {base_name} (weights digest `{contract.model.weights}`)
- Adapter: LoRA r={lora.r}, alpha={lora.alpha}, {", ".join(lora.targets)} of layers {list(lora.layers)}, and a linear head
- Method: rule `{contract.rule.name}`, {contract.rule.optimizer}, {rounds} of {p.rounds} rounds, {len(contract.sites)} sites,
  secure aggregation {"on" if contract.secagg.enabled else "OFF: INDIVIDUAL UPDATES VISIBLE"}
- Accuracy on {split} (no site trained on it): {before:.4f} before, {after:.4f} after
- Contract: `{contract.digest}`, run `{contract.run}`

## Privacy
{privacy}

## Use
labels.txt names the classes in order of the logits.

{loader}
""", encoding="utf-8")
