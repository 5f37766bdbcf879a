"""A tiny random Llama with a tokenizer and a chat template, as a Hugging Face folder, and instructions that it can learn.

A prompt holds words of one group among others; its answer is "group: word", such as "lung: cough".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

TEMPLATE = ("{% for m in messages %}{% if m['content'] == 'unspeakable' %}{{ raise_exception('no') }}{% endif %}"
            "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
END = "<|im_end|>"
WIDTH, LAYERS = 32, 3


def tiny_llm(folder: Path, words: Sequence[str], *, template: str | None = TEMPLATE) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    plain = ["system", "user", "assistant", "synthetic", "prompt", "answer", *words, *":.,?!'\"-", "'s"]
    names = ["<unk>", "<|im_start|>", END, "Ċ", "Ġ", *plain, *(f"Ġ{word}" for word in plain)]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<|im_start|>", eos_token=END,
                                   pad_token=END, clean_up_tokenization_spaces=False)
    fast.chat_template = template
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=2 * WIDTH, max_position_embeddings=64, initializer_range=0.2,
            bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def instructions(folder: Path, sizes: Mapping[str, int], groups: Mapping[str, Sequence[str]],
                 filler: Sequence[str]) -> dict[str, Path]:
    """One JSONL (prompt, completion) for each name."""
    rng, files = np.random.default_rng(1), {name: folder / f"{name}.jsonl" for name in sizes}
    for name, path in files.items():
        lines = []
        for _ in range(sizes[name]):
            group = str(rng.choice(list(groups)))
            word = str(rng.choice(groups[group]))
            prompt = " ".join(rng.permutation([word, *rng.choice(filler, rng.integers(0, 6))]))
            lines.append(json.dumps({"prompt": prompt, "completion": f"{group}: {word}"}) + "\n")
        path.write_text("".join(lines))
    return files
