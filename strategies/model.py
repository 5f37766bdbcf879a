"""The model: a Hugging Face encoder folder with PEFT LoRA, pooling and a linear head; lower layers computed once.

Layers below the first adapter are frozen, so their output for a record never changes: `encode` computes it once and
`forward` starts from it. Dropout is off: the base is frozen and DP noise regularises enough.
torch, transformers and peft are imported when a model is built, not before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privacy.canonical import digest, labelled_hash
from privacy.contract import Contract, LoraTerms, ModelTerms
from privacy.errors import Refused, UsageError
from strategies.adapter import HEAD, AdapterSpec
from strategies.attention import attention
from strategies.base import CORE, RESIDUAL, Rule
from strategies.forms import Residuals, add_cores, as_plain_lora, saved_name
from strategies.linear import Ffa
from strategies.rules import rule as find
from strategies.variants import check_layers, check_variant

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
                   "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "added_tokens.json",
                   "chat_template.jinja")
ENCODE_BATCH = 128
PLAIN = Ffa()  # its adapter is PEFT's tensors and the head
TARGETS_MEND = "Set lora.targets to names of its linear layers (query, value; q_proj, v_proj)."


@dataclass(frozen=True)
class Batch:
    """input_ids, mask: int64 (n, length). hidden: float32 (n, length, width), input of the first adapted layer."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    hidden: torch.Tensor

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Batch:
        return Batch(self.input_ids[rows], self.mask[rows], self.hidden[rows])


class FolderDigests(NamedTuple):
    """Lowercase hex hashes of a model folder, under the names that they have in a contract."""

    weights: str
    tokenizer: str
    chat_template: str | None


def folder_digests(folder: Path) -> FolderDigests:
    """Over config.json + *.safetensors, over the tokenizer's files, and over its chat template's text, if it has one.

    Raises UsageError `model.missing`, and Refused `model.pickle` for a folder that brings pickled weights only.
    """
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not weights or not (folder / "config.json").is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise Refused("model.pickle", "The model folder holds pickled weights, which are never opened.",
                          "Convert the weights to safetensors.")
        raise UsageError("model.missing", f"{folder.name} is no Hugging Face folder with safetensors weights.",
                         "Give the folder with config.json and *.safetensors.")
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return FolderDigests(_digest([folder / "config.json", *weights]), _digest(tokenizer), _chat_template(folder))


def check_folder(folder: Path, terms: ModelTerms) -> None:
    """Raises Refused `model.digest` when the folder isn't the contract's base model; also as `folder_digests`."""
    if folder_digests(folder) != (terms.weights, terms.tokenizer, terms.chat_template):
        raise Refused("model.digest", "The base model, its tokenizer or chat template differs from the contract's.",
                      "Install the model that the contract names, unchanged.")


def _chat_template(folder: Path) -> str | None:
    """As transformers finds it: a file of its own comes before the tokenizer's configuration."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template: Any = None
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    elif settings.is_file():
        template = json.loads(settings.read_bytes()).get("chat_template")
    return None if template is None else digest(template)


def _digest(files: Sequence[Path]) -> str:
    parts: list[bytes | str | int] = []
    for file in files:
        with file.open("rb") as f:
            parts += [file.name, hashlib.file_digest(f, "sha256").digest()]
    return labelled_hash("consilo files", *parts).hex()


class TextClassifier:
    """Encoder + LoRA + pooling + head, built from a contract. `module` is the torch module that trains.

    rule: its adapter may have a core or a residual beside PEFT's tensors. Raises UsageError `lora.targets`, `lora.layers`,
    `lora.rank` when the contract's terms don't fit the model; Refused `adapter.variant`.
    """

    def __init__(self, folder: Path, model: ModelTerms, lora: LoraTerms, classes: int, rule: Rule = PLAIN) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.terms = model
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        base = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                                         dtype=torch.float32, attn_implementation=attention())
        base.eval().requires_grad_(False)
        self._find_layers(base)
        self.adapted = sorted({self._layer_index(i) for i in lora.layers})
        self.peft = _with_lora(base, lora, self.adapted)
        self.head = torch.nn.Linear(base.config.hidden_size, classes)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self._tail = _tail(self._full, self.adapted[0])
        self.module = _module(self.peft, self.head, self._tail[0], model)
        self._shapes = rule.tensors(tuple((n, tuple(p.shape)) for n, p in self._named_parameters().items()))
        if any(name.endswith(CORE) for name, _ in self._shapes):
            add_cores(self.peft)
        self._residuals = Residuals(self.peft, [n.removesuffix(RESIDUAL) for n, _ in self._shapes if n.endswith(RESIDUAL)])
        self.parameters = self._named_parameters()
        if any(lora.r > p.shape[1] for name, p in self.parameters.items() if ".lora_A." in name):
            raise UsageError("lora.rank", f"Rank {lora.r} is above the width of an adapted layer.", "Lower lora.r.")

    def _find_layers(self, base: Any) -> None:
        """The list of transformer layers: the ModuleList as long as config.num_hidden_layers."""
        import torch

        for parent in base.modules():
            for name, child in parent.named_children():
                if isinstance(child, torch.nn.ModuleList) and len(child) == base.config.num_hidden_layers:
                    self._parent, self._attribute, self._full = parent, name, child
                    return
        raise UsageError("model.layers", "The model has no list of transformer layers.", "Use an encoder like BERT.")

    def _layer_index(self, layer: int) -> int:
        n = len(self._full)
        if not -n <= layer < n:
            raise UsageError("lora.layers", f"Layer {layer} does not exist in a model of {n} layers.",
                             f"Use -{n}..{n - 1}.")
        return layer % n

    def _named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """LoRA tensors under PEFT's saved names, then the head; sorted, head last."""
        lora = {saved_name(name): p for name, p in self.peft.named_parameters() if ".lora_" in name}
        return {**dict(sorted(lora.items())), HEAD[0]: self.head.weight, HEAD[1]: self.head.bias}

    def spec(self, trains: Any) -> AdapterSpec:
        """trains: predicate on tensor names (a Rule's)."""
        return AdapterSpec(self._shapes, frozenset(name for name, _ in self._shapes if trains(name)))

    def load(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        import torch

        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))
        self._residuals.load(tensors)

    def encode(self, texts: Sequence[str]) -> Batch:
        """Tokenise at least one text to the contract's length and run the frozen lower layers once.

        Batches have one fixed shape, so no bit of a record's `hidden` depends on how many others there are.
        """
        import torch

        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.terms.max_length,
                                return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        setattr(self._parent, self._attribute, self._full)
        first, caught = self._full[self.adapted[0]], []

        def catch(_module: Any, args: Any, kwargs: Any) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Caught

        handle = first.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with torch.inference_mode():
                for start in range(0, len(ids), ENCODE_BATCH):
                    rows = np.resize(np.arange(start, min(start + ENCODE_BATCH, len(ids))), ENCODE_BATCH)
                    try:
                        self.peft(input_ids=ids[rows], attention_mask=mask[rows])
                    except _Caught:
                        continue
        finally:
            handle.remove()
            setattr(self._parent, self._attribute, self._tail)
        return Batch(ids, mask, torch.cat(caught)[:len(ids)].clone())

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """float32 (n, classes), without gradients."""
        import torch

        with torch.no_grad():
            parts = [self.module(batch.take(slice(i, i + ENCODE_BATCH)))  # type: ignore[arg-type]
                     for i in range(0, len(batch.input_ids), ENCODE_BATCH)]
            return np.asarray(torch.cat(parts).numpy(), np.float32)

    def save(self, folder: Path, tensors: Mapping[str, NDArray[np.float32]], base_name: str) -> None:
        """Write a PEFT folder (adapter_config.json, adapter_model.safetensors) and head.safetensors. A core or residual
        becomes part of plain LoRA tensors, so that PEFT alone computes the same function."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors, config = as_plain_lora(tensors, self.peft.peft_config["default"].to_dict())
        config |= {"base_model_name_or_path": base_name, "inference_mode": True,
                   "target_modules": sorted(config["target_modules"])}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
        lora = {n: np.ascontiguousarray(v) for n, v in tensors.items() if n not in HEAD}
        save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        save_file({n.removeprefix("head."): np.ascontiguousarray(tensors[n]) for n in HEAD},
                  folder / "head.safetensors", metadata={"format": "pt"})


class _Caught(Exception):
    """Ends a forward pass once the input of the first adapted layer is known."""


def build(folder: Path, contract: Contract, rank: int | None = None) -> TextClassifier:
    """The contract's model. rank: of a site's own LoRA, with the contract's scale alpha / lora.r; null: lora.r.

    Raises Refused `model.digest` when the folder isn't the contract's base model; also as `rules.rule`.
    """
    check_folder(folder, contract.model)
    rule, lora = find(contract.rule.name, secure=contract.secagg.enabled), contract.lora
    if rank is not None and rank != lora.r:
        lora = lora.model_copy(update={"r": rank, "alpha": lora.alpha * rank / lora.r})
    return TextClassifier(folder, contract.model, lora, len(contract.data.labels), rule)


def _with_lora(base: Any, lora: LoraTerms, layers: Sequence[int]) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0, bias="none",
                        layers_to_transform=list(layers), task_type=TaskType.FEATURE_EXTRACTION)
    for target in lora.targets:  # PEFT is content when one of them fits
        if not any(f".{name}".endswith(f".{target}") for name, _ in base.named_modules()):
            raise UsageError("lora.targets", f"No layer of the model is called {target!r}.", TARGETS_MEND)
    check_variant(config.to_dict())
    try:
        made = get_peft_model(base, config).eval()
    except ValueError as e:
        raise UsageError("lora.targets", f"LoRA does not fit {' or '.join(lora.targets)}.", TARGETS_MEND) from e
    check_layers(made)
    return made


def _tail(full: Any, first: int) -> Any:
    """The layer list with everything below `first` replaced: layer 0 injects the cached input, the others pass it on."""
    import torch

    class Inject(torch.nn.Module):
        hidden: torch.Tensor

        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return self.hidden

    class Pass(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states

    if first == 0:
        return torch.nn.ModuleList(list(full))
    return torch.nn.ModuleList([Inject(), *[Pass() for _ in range(first - 1)], *list(full)[first:]])


def _module(peft: Any, head: Any, entry: Any, terms: ModelTerms) -> Any:
    import torch

    class Classifier(torch.nn.Module):
        """Batch -> logits, float32 (n, classes)."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = peft, head

        def forward(self, batch: Batch) -> torch.Tensor:
            entry.hidden = batch.hidden
            out = self.encoder(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
            if terms.pooling == "cls":
                pooled = out[:, 0]
            else:
                weight = batch.mask[..., None].to(out.dtype)
                pooled = (out * weight).sum(1) / weight.sum(1).clamp(min=1)
            logits: torch.Tensor = self.head(torch.nn.functional.normalize(pooled, dim=-1) * terms.scale)
            return logits

    return Classifier()
