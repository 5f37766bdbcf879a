"""The model card beside a released adapter: what it is, how it was made, what may be said of its privacy."""

from __future__ import annotations

from pathlib import Path

from fl_server.evaluation import Score
from privacy.contract import ChatTerms, Contract

CLASSIFIER = '''labels.txt names the classes in order of the logits.

```python
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
GENERATOR = '''{asked}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "PATH_OF_{name}"
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".").eval()
tokenizer = AutoTokenizer.from_pretrained(base)
prompt = {prompt}
tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens={special})
answer = model.generate(**tokens, max_new_tokens={answer}, do_sample=False)
print(tokenizer.decode(answer[0, tokens["input_ids"].shape[1]:], skip_special_tokens=True))
```'''


def write_card(folder: Path, contract: Contract, base_name: str, rounds: int, before: Score, after: Score,
               split: str) -> None:
    """Write README.md (a Hugging Face model card), and labels.txt for a classifier."""
    p, lora, chat = contract.privacy, contract.lora, contract.model.chat
    if p.epsilon is None:
        privacy = "NON-PRIVATE: no noise was added, nothing bounds what the adapter tells about a record."
    else:
        delta = max(s.delta for s in contract.sites)
        privacy = (f"Each site's {p.unit}s are protected by its own noise: at most epsilon = {p.epsilon} at delta = "
                   f"{delta} (add/remove of one {p.unit}) for the {p.rounds} planned rounds and {p.retries} retries "
                   "together. The evidence and report of the run say what was spent; `fl-privacy verify` recomputes it.")
    if chat is None:
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in contract.data.labels), encoding="utf-8")
    scores = ", ".join(f"{name} {before.values[name]:.4f} before, {after.values[name]:.4f} after" for name in after.values)
    (folder / "README.md").write_text(f"""---
library_name: peft
base_model: {base_name}
tags: [lora, federated, differential-privacy]
---
# {contract.data.name}: LoRA adapter

{contract.purpose}.

- Base model: {base_name} (weights digest `{contract.model.weights}`)
- Adapter: LoRA r={lora.r}, alpha={lora.alpha}, {", ".join(lora.targets)} of layers {list(lora.layers)}{
    ", and a linear head" if chat is None else ""}
- Method: rule `{contract.rule.name}`, {contract.rule.optimizer}, {rounds} of {p.rounds} rounds, {len(contract.sites)} sites,
  secure aggregation {"on" if contract.secagg.enabled else "OFF: INDIVIDUAL UPDATES VISIBLE"}
- On {split} (no site trained on it): {scores}
- Contract: `{contract.digest}`, run `{contract.run}`

## Privacy
{privacy}

## Use
{_classifier(contract, base_name) if chat is None else _generator(chat, base_name)}
""", encoding="utf-8")


def _classifier(contract: Contract, base_name: str) -> str:
    model = contract.model
    pooling = "out[:, 0]" if model.pooling == "cls" else "(out * mask).sum(1) / mask.sum(1)"
    return CLASSIFIER.format(name=base_name, length=model.max_length, scale=model.scale, pooling=pooling)


def _generator(chat: ChatTerms, base_name: str) -> str:
    if chat.plain is not None:
        prompt = f'{chat.plain!r}.replace("{{prompt}}", "your prompt")'
        asked = "It was trained on prompts in the plain template below."
    else:
        system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
        messages = ", ".join(map(repr, [*system, {"role": "user", "content": "your prompt"}]))
        prompt = f"tokenizer.apply_chat_template([{messages}], tokenize=False, add_generation_prompt=True)"
        asked = "It was trained on chats of one turn, rendered by the base model's own chat template."
    return GENERATOR.format(name=base_name, asked=asked, prompt=prompt, special=chat.plain is not None,
                            answer=chat.max_answer)
