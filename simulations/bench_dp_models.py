"""Models and steps of `fl-simulate bench dp-step`, built in code: random weights take as long as trained ones.

Each `Task` has its own LoRA weights and shares the frozen ones. A step is a callable without arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from privacy.compute import Engine
from privacy.dpsgd import ClippedGradients, noisy_mean
from privacy.engine import gradients
from privacy.mechanism import DpMechanism
from privacy.population import Population

RATE, CLIP, SIGMA, CLASSES = 0.1, 1.0, 1.0, 11
Step = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """How a step is measured by default: records, tokens of each, and the modules with LoRA."""

    batch: int
    length: int
    targets: tuple[str, ...]


SHAPES = {"minilm": Shape(32, 64, ("query", "value")), "llama-like": Shape(16, 64, ("q_proj", "v_proj")),
          "smollm2": Shape(8, 64, ("q_proj", "v_proj"))}


@dataclass
class Task:
    """A model with LoRA and its batch. parameters: the trained ones. losses: as `ClippedGradients` wants them."""

    module: Any
    parameters: dict[str, torch.nn.Parameter]
    records: int
    ids: torch.Tensor
    targets: torch.Tensor

    def losses(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Classes: cross-entropy of a record. Tokens: the mean over a record's."""
        return torch.nn.functional.cross_entropy(self.module(self.ids[rows]), self.targets[rows],
                                                 reduction="none").reshape(len(rows), -1).mean(1)

    def first(self, records: int) -> Task:
        return Task(self.module, self.parameters, records, self.ids[:records], self.targets[:records])

    def copy(self) -> Task:
        frozen = {id(p): p for p in self.module.parameters() if not p.requires_grad}
        module = copy.deepcopy(self.module, frozen)
        return Task(module, {n: p for n, p in module.named_parameters() if p.requires_grad}, self.records, self.ids,
                    self.targets)


class _Classifier(torch.nn.Module):
    def __init__(self, encoder: Any, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, torch.nn.Linear(width, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.encoder(input_ids=ids).last_hidden_state.mean(1))
        return out


class _Causal(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits.transpose(1, 2)
        return out


def build(model: str, batch: int, length: int, rank: int, seed: int) -> Task:
    """minilm: all-MiniLM-L6-v2's sizes. smollm2: SmolLM2-135M's. llama-like: 4 layers of width 256."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(SHAPES[model].targets), lora_dropout=0.0)
    module: Any
    if model == "minilm":
        base = BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
                                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), add_pooling_layer=False)
        vocab, module = base.config.vocab_size, _Classifier(get_peft_model(base, lora), 384)
        targets = torch.randint(CLASSES, (batch,))
    else:
        sizes = {"llama-like": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
                                "num_key_value_heads": 2, "intermediate_size": 688, "vocab_size": 4096},
                 "smollm2": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
                             "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152}}[model]
        causal = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes))
        vocab, module = causal.config.vocab_size, _Causal(get_peft_model(causal, lora))
        targets = torch.randint(vocab, (batch, length))
    trained = {n: p for n, p in module.named_parameters() if ".lora_" in n or n.startswith("head.")}
    module.requires_grad_(False)
    for p in trained.values():
        p.requires_grad_(True)
        torch.nn.init.normal_(p, std=0.02)
    return Task(module.eval(), trained, batch, torch.randint(vocab, (batch, length)), targets)


def plain(task: Task) -> Step:
    """LoRA without privacy: one backward pass of the mean loss, SGD."""
    everyone, optimizer = np.arange(task.records), torch.optim.SGD(task.parameters.values(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(task.losses(everyone).mean())
        optimizer.step()

    return step


def engine(name: Engine, task: Task) -> Step:
    """The product's step: draw with q = 1, clip, sum on the lattice, noise, divide, SGD."""
    mechanism = DpMechanism(trust="local", unit="record", adjacency="add_remove", sampler="poisson", q=1.0, clip=CLIP,
                            sigma=SIGMA, steps=1, delta=1e-6, n_decl=task.records)
    grads: ClippedGradients = gradients(name, task.module, task.parameters, task.losses)
    population, ends = Population(task.records, mechanism), np.cumsum([p.numel() for p in grads.parameters.values()])

    def step() -> None:
        mean = noisy_mean(grads, population, mechanism, task.records).astype(np.float32)
        with torch.no_grad():
            for p, part in zip(grads.parameters.values(), np.split(mean, ends[:-1]), strict=True):
                p.sub_(torch.from_numpy(part).view_as(p), alpha=RATE)

    return step


def opacus(task: Task, *, ghost: bool) -> Step:
    """Stock Opacus: per-sample gradients by hooks, or ghost clipping (two backward passes); float noise, no lattice."""
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    everyone = np.arange(task.records)
    task.module.train()
    optimizer: Any = torch.optim.SGD(task.parameters.values(), lr=RATE)
    terms = {"noise_multiplier": SIGMA, "max_grad_norm": CLIP, "expected_batch_size": task.records}
    if not ghost:
        GradSampleModule(task.module, loss_reduction="mean")
        optimizer = DPOptimizer(optimizer, **terms)

        def hooks() -> None:
            optimizer.zero_grad()
            torch.autograd.backward(task.losses(everyone).mean())
            optimizer.step()

        return hooks
    wrapped = GradSampleModuleFastGradientClipping(task.module, max_grad_norm=CLIP, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(optimizer, **terms)

    def step() -> None:
        optimizer.zero_grad()
        DPTensorFastGradientClipping(wrapped, optimizer, task.losses(everyone), "mean").backward()
        optimizer.step()

    return step
