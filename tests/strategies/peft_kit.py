"""Real PEFT models, tiny and random: a BERT and a Llama (grouped keys, so that v_proj isn't square), and silos that train.

Modules are 64 wide: wide enough for the double sketch of three or four sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from strategies.adapter import AdapterSpec, initial
from strategies.base import A, Rule, Setup, adapter_spec

RANK, ALPHA = 2, 8.0
SCALE = ALPHA / RANK
KINDS = ("bert", "llama")
Tensors = dict[str, NDArray[np.float32]]


def peft_model(kind: str, *, r: int = RANK, **config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "intermediate_size": 96, "max_position_embeddings": 32}
        base: Any = BertModel(BertConfig(**sizes)) if kind == "bert" else LlamaModel(
            LlamaConfig(**sizes, num_key_value_heads=2))
        targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
        settings = {"r": r, "lora_alpha": ALPHA * r / RANK, "target_modules": targets} | config
        return get_peft_model(base, LoraConfig(**settings)).eval()


def peft_spec(model: Any, adapter: str = "default") -> AdapterSpec:
    """Names, as PEFT saves them, and shapes of the LoRA tensors; all are trained."""
    shapes = tuple((name, value.shape) for name, value in read(model, adapter).items())
    return AdapterSpec(shapes, frozenset(name for name, _ in shapes))


def read(model: Any, adapter: str = "default") -> Tensors:
    """Copies, sorted by name."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: state[name].detach().numpy().copy() for name in sorted(state)}


def write(model: Any, tensors: Tensors, adapter: str = "default") -> None:
    """PEFT loads wrong keys in silence, so what was loaded is read back."""
    checked = peft_spec(model, adapter).check(tensors)
    set_peft_model_state_dict(model, {n: torch.from_numpy(v.copy()) for n, v in checked.items()}, adapter)
    assert all(v.tobytes() == checked[n].tobytes() for n, v in read(model, adapter).items())


@dataclass(frozen=True)
class Silo:
    """Token ids int64 (n, 8) and targets float32 (n, 64)."""

    ids: torch.Tensor
    targets: torch.Tensor

    def loss(self, model: Any) -> torch.Tensor:
        """Mean over records of the squared error of the mean hidden state."""
        hidden = model(input_ids=self.ids).last_hidden_state.mean(dim=1)
        return (hidden - self.targets).square().sum(dim=1).mean()


def silos(sizes: Sequence[int], seed: int = 0) -> list[Silo]:
    generator = torch.Generator().manual_seed(seed)
    return [Silo(torch.randint(0, 50, (n, 8), generator=generator), torch.randn(n, 64, generator=generator)) for n in sizes]


def pooled(parts: Sequence[Silo]) -> Silo:
    return Silo(torch.cat([p.ids for p in parts]), torch.cat([p.targets for p in parts]))


def setup_of(rule: Rule, model: Any, sites: int, *, ranks: tuple[int, ...] = ()) -> Setup:
    spec = adapter_spec(rule, peft_spec(model).shapes)
    return Setup(spec=spec, ranks=ranks or (RANK,) * sites, seed=3, max_norm=100.0, range=100.0)


def begin(setup: Setup) -> Tensors:
    return initial(setup.spec, setup.seed)


def train(model: Any, silo: Silo, start: Tensors, rule: Rule, round_no: int, *, steps: int = 3, lr: float = 0.05,
          optimizer: Any = torch.optim.SGD) -> Tensors:
    """LoRA tensors after `steps` of what the rule trains; a residual or core in `start` isn't in PEFT, and stays."""
    lora = {n: v for n, v in start.items() if n in dict(peft_spec(model).shapes)}
    write(model, lora)
    trained = []
    for name, p in model.named_parameters():
        own = name.replace(".default.", ".")
        p.requires_grad_(own in lora and rule.trains(own, round_no))
        trained += [p] if p.requires_grad else []
    step = optimizer(trained, lr=lr)
    for _ in range(steps):
        step.zero_grad()
        silo.loss(model).backward()
        step.step()
    return {**start, **read(model)}


def full_weights(model: Any, tensors: Tensors) -> dict[str, NDArray[np.float64]]:
    """W0 + PEFT's own delta weight (s B A, as PEFT scales it), float64 (m, n) by module, for plain LoRA tensors."""
    write(model, {n: v for n, v in tensors.items() if ".lora_" in n})
    out = {}
    for name in (n.removesuffix(A) for n in tensors if n.endswith(A)):
        layer = model.get_submodule(name)
        out[name] = base_weight(model, name) + layer.get_delta_weight("default").detach().numpy().astype(np.float64)
    return out


def base_weight(model: Any, module: str) -> NDArray[np.float64]:
    return np.asarray(model.get_submodule(module).base_layer.weight.detach().numpy(), np.float64)


def distance(got: dict[str, Any], want: dict[str, Any]) -> float:
    """Largest relative Frobenius distance of any tensor."""
    return max(float(np.linalg.norm(got[n] - want[n]) / max(np.linalg.norm(want[n]), 1e-30)) for n in want)


def average(values: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    return {n: sum(w * v[n] for w, v in zip(weights, values, strict=True)) / sum(weights) for n in values[0]}
