"""Tiny models of every kind that an engine covers, with ragged records: 12 of 3 to 10 tokens, padded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, OFTConfig, TaskType, get_peft_model
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from strategies.attention import attention

RECORDS, LENGTH, VOCAB, CLASSES = 12, 10, 31, 3


@dataclass
class Case:
    """module: a PEFT model. trains: predicate on names of parameters. losses: of records, each over that record alone."""

    module: Any
    trains: Callable[[str], bool]
    read: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def __post_init__(self) -> None:
        rng = np.random.default_rng(4)
        self.ids = torch.from_numpy(rng.integers(1, VOCAB, (RECORDS, LENGTH)))
        self.lengths = rng.integers(3, LENGTH + 1, RECORDS)
        self.mask = torch.from_numpy((np.arange(LENGTH) < self.lengths[:, None]).astype(np.int64))
        self.targets = torch.from_numpy(rng.integers(0, CLASSES, RECORDS))
        self.parameters = {n: p for n, p in self.module.named_parameters() if self.trains(n)}
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                if name in self.parameters or adapters(name):  # at the zeros of a fresh adapter most gradients are zero
                    p.add_(torch.empty(p.shape).normal_(std=0.2, generator=generator))
        self.module.requires_grad_(False)
        for p in self.parameters.values():
            p.requires_grad_(True)
        self.module.eval()
        self.factors = torch.ones(RECORDS)

    def losses(self, rows: NDArray[np.int64]) -> torch.Tensor:
        return self.read(self.module, self.ids[rows], self.mask[rows], self.targets[rows]) * self.factors[rows]

    def exactly(self) -> Case:
        """A copy in float64, without an engine's hooks: the reference."""
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module).double()
        other.parameters = {n: p for n, p in other.module.named_parameters() if n in self.parameters}
        return other

    def alone(self, record: int) -> NDArray[np.float64]:
        """Autograd of one record's loss, through PEFT's own forward: float64 (dim,)."""
        parts = torch.autograd.grad(self.losses(np.array([record])).sum(), list(self.parameters.values()))
        return torch.cat([part.ravel() for part in parts]).double().numpy()


def _classes(module: Any, ids: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    out = module(input_ids=ids, attention_mask=mask)
    logits = out.logits if "logits" in out else out.last_hidden_state[:, 0, :CLASSES]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def answer_tokens(module: Any, ids: torch.Tensor, mask: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
    """Of each record the mean over its answer: everything after the second token, padding apart."""
    logits = module(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    answer = mask[:, 1:] * (torch.arange(ids.shape[1] - 1) >= 1)
    return (each * answer).sum(1) / answer.sum(1)


def _llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0, "initializer_range": 0.3,
        "attn_implementation": attention(), **changes}))


def _bert() -> Any:
    return BertForSequenceClassification(BertConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_labels=CLASSES, max_position_embeddings=LENGTH, initializer_range=0.3, attn_implementation=attention()))


def _albert() -> Any:
    return AlbertModel(AlbertConfig(vocab_size=VOCAB, embedding_size=8, hidden_size=16, intermediate_size=24,
                                    num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=LENGTH,
                                    initializer_range=0.3, attn_implementation=attention()), add_pooling_layer=False)


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=LENGTH,
                                      initializer_range=0.3, pad_token_id=0, bos_token_id=0, eos_token_id=0,
                                      attn_implementation=attention()))


def _lora(*targets: str, **changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 8, "target_modules": list(targets), **changes})


def adapters(name: str) -> bool:
    return ".lora_" in name


Q_V = ("q_proj", "v_proj")
KINDS: dict[str, Callable[[], Case]] = {
    "llama": lambda: Case(get_peft_model(_llama(), _lora(*Q_V)), adapters, answer_tokens),
    "every linear layer": lambda: Case(get_peft_model(_llama(), _lora("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                                                      "up_proj", "down_proj")), adapters, answer_tokens),
    "rslora": lambda: Case(get_peft_model(_llama(), _lora(*Q_V, use_rslora=True)), adapters, answer_tokens),
    "rank pattern": lambda: Case(
        get_peft_model(_llama(), _lora(*Q_V, rank_pattern={"v_proj": 5}, alpha_pattern={"v_proj": 3})), adapters,
        answer_tokens),
    "A frozen": lambda: Case(get_peft_model(_llama(), _lora(*Q_V)), lambda n: ".lora_B" in n, answer_tokens),
    "B frozen": lambda: Case(get_peft_model(_llama(), _lora(*Q_V)), lambda n: ".lora_A" in n, answer_tokens),
    "bias of the layer": lambda: Case(get_peft_model(_bert(), _lora("query", "value", bias="lora_only")),
                                      lambda n: adapters(n) or n.endswith("base_layer.bias"), _classes),
    "bias of B": lambda: Case(get_peft_model(_bert(), _lora("query", "value", lora_bias=True)), adapters, _classes),
    "layer norm": lambda: Case(get_peft_model(_bert(), _lora("query")), lambda n: adapters(n) or "LayerNorm" in n, _classes),
    "rms norm": lambda: Case(get_peft_model(_llama(), _lora(*Q_V)), lambda n: adapters(n) or "norm" in n, answer_tokens),
    "head": lambda: Case(get_peft_model(_bert(), _lora("query", task_type=TaskType.SEQ_CLS)),
                         lambda n: adapters(n) or "modules_to_save" in n, _classes),
    "pooler and head": lambda: Case(get_peft_model(_bert(), _lora("query")),
                                    lambda n: adapters(n) or "pooler" in n or "classifier" in n, _classes),
    "lm_head": lambda: Case(get_peft_model(_llama(), _lora(*Q_V)), lambda n: adapters(n) or "lm_head" in n, answer_tokens),
    "LoRA on lm_head": lambda: Case(get_peft_model(_llama(), _lora(*Q_V, "lm_head")), adapters, answer_tokens),
    "LoRA on Conv1D": lambda: Case(get_peft_model(_gpt2(), _lora("c_attn", fan_in_fan_out=True)), adapters, answer_tokens),
    "one layer for all depths": lambda: Case(get_peft_model(_albert(), _lora("query", "value")), adapters, _classes),
    "a base that is trained": lambda: Case(get_peft_model(_llama(), _lora(*Q_V)),
                                           lambda n: adapters(n) or "q_proj.base_layer" in n, answer_tokens),
}
REFUSED: dict[str, tuple[Callable[[], Case], str]] = {
    "DoRA": (lambda: Case(get_peft_model(_llama(), _lora(*Q_V, use_dora=True)), adapters, answer_tokens), "lora_"),
    "LoRA on embeddings": (lambda: Case(get_peft_model(_llama(), _lora("embed_tokens")), adapters, answer_tokens),
                           "lora_embedding_"),
    "OFT": (lambda: Case(get_peft_model(_llama(), OFTConfig(r=0, oft_block_size=4, target_modules=list(Q_V))),
                         lambda n: ".oft_" in n, answer_tokens), "oft_"),
}


def dropping() -> Case:
    return Case(get_peft_model(_llama(), _lora(*Q_V, lora_dropout=0.4)), adapters, answer_tokens)


def make(kind: Callable[[], Case]) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return kind()
