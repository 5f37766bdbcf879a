"""A Hugging Face model with PEFT LoRA, whatever its task: adapted layers, tensors, files, lower layers computed once.

Layers below the first adapter are frozen, so their output for a record never changes: `below` computes it once and the
module starts from it. Dropout is off: the base is frozen and DP noise regularises enough.
torch, transformers and peft are imported when a model is built, not before.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from privacy.compute import Compute, Device
from privacy.contract import LoraTerms
from privacy.dpsgd import Losses, autocast
from privacy.errors import UsageError
from strategies.adapter import HEAD, AdapterSpec
from strategies.attention import attention
from strategies.base import CORE, RESIDUAL, Rule
from strategies.cache import RowCache, flat, rebuilt
from strategies.examples import Examples
from strategies.forms import Residuals, add_cores, as_plain_lora, saved_name
from strategies.quantised import check_quantisation, refuse_residual
from strategies.variants import check_layers, check_variant

if TYPE_CHECKING:
    import torch

TARGETS_MEND = "Set lora.targets to names of its linear layers (query, value; q_proj, v_proj)."


class LoraModel(ABC):
    """What the trainer and the evaluation need of a model. `module` is the torch module that trains.

    task: PEFT's name of it. parameters: the adapter's tensors under PEFT's saved names, sorted, then a head if there is
    one. Raises UsageError `lora.targets`, `lora.layers`, `lora.rank`, `model.layers` when the contract's terms don't fit
    the model; Refused `adapter.variant`.
    """

    task: ClassVar[str]
    encode_batch: ClassVar[int]  # records that go through the lower layers together
    module: torch.nn.Module

    def __init__(self, base: Any, lora: LoraTerms, rule: Rule, head: Mapping[str, torch.nn.Parameter]) -> None:
        """head: trained tensors beside LoRA's, by name."""
        base.eval().requires_grad_(False)
        self._find_layers(base)
        self._width = int(base.config.hidden_size)
        self.adapted = sorted({self._layer_index(i) for i in lora.layers})
        self.peft = with_lora(base, lora, self.adapted, self.task)
        self._head = dict(head)
        self._tail = _tail(self._full, self.adapted[0]) if self.adapted[0] else self._full
        self._shapes = rule.tensors(tuple((n, tuple(p.shape)) for n, p in self._named_parameters().items()))
        if any(name.endswith(CORE) for name, _ in self._shapes):
            add_cores(self.peft)
        residuals = [n.removesuffix(RESIDUAL) for n, _ in self._shapes if n.endswith(RESIDUAL)]
        if residuals:
            refuse_residual(base.config)
        self._residuals = Residuals(self.peft, residuals)
        self.parameters = self._named_parameters()
        if any(lora.r > p.shape[1] for name, p in self.parameters.items() if ".lora_A." in name):
            raise UsageError("lora.rank", f"Rank {lora.r} is above the width of an adapted layer.", "Lower lora.r.")
        setattr(self._parent, self._attribute, self._tail)

    @property
    @abstractmethod
    def synthetic(self) -> Any:
        """One record of no one, like those of a file."""

    @abstractmethod
    def prepare(self, records: Any) -> Any:
        """Records of a file, in the form that the module takes, as often as they are used: it has `take(rows)`."""

    @abstractmethod
    def each(self, prepared: Any) -> torch.Tensor:
        """Losses, float32 (n,), each the mean over that record alone; zero, with a zero gradient, where it is invalid."""

    @abstractmethod
    def measure(self, records: Any) -> Callable[[], dict[str, float]]:
        """Prepare a PUBLIC split once. The result gives the contract's metrics of the adapter that is loaded, over the
        split's valid records."""

    def losses(self, file: Examples, compute: Compute = Compute()) -> Losses:
        """Rows, int64 (b,) -> `each` of them. Row len(file) is the synthetic record. What `prepare` makes of a record is
        kept as far as compute.cache_mib lets it, and made anew beyond that."""
        def prepare(records: Any) -> Any:
            with autocast(compute.device, compute.precision):
                return self.prepare(records)

        count, no_ones = len(file), prepare(self.synthetic)
        cache = RowCache(lambda rows: flat(prepare(file.take(rows))), count, like=flat(no_ones),
                         limit=compute.cache_mib * 2**20)
        if cache.whole:
            cache.fill(self.encode_batch)

        def losses(rows: NDArray[np.int64]) -> torch.Tensor:
            parts = (flat(no_ones.take(np.zeros(len(rows), np.int64))) if rows.max(initial=0) >= count else
                     cache.take(rows))
            return self.each(rebuilt(no_ones, (part.to(compute.device) for part in parts)))

        return losses

    def to(self, device: Device) -> None:
        """Move all layers, those below the adapters too."""
        with self.whole():
            self.module.to(device)

    def spec(self, trains: Any) -> AdapterSpec:
        """trains: predicate on tensor names (a Rule's)."""
        return AdapterSpec(self._shapes, frozenset(name for name, _ in self._shapes if trains(name)))

    def load(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        import torch

        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))
        self._residuals.load(tensors)

    def save(self, folder: Path, tensors: Mapping[str, NDArray[np.float32]], base_name: str) -> None:
        """Write a PEFT folder (adapter_config.json, adapter_model.safetensors) and head.safetensors where there is a
        head. A core or residual becomes part of plain LoRA tensors, so that PEFT alone computes the same function."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors, config = as_plain_lora(tensors, self.peft.peft_config["default"].to_dict())
        config |= {"base_model_name_or_path": base_name, "inference_mode": True,
                   "target_modules": sorted(config["target_modules"])}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
        lora = {n: np.ascontiguousarray(v) for n, v in tensors.items() if n not in HEAD}
        save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if self._head:
            save_file({n.removeprefix("head."): np.ascontiguousarray(tensors[n]) for n in HEAD},
                      folder / "head.safetensors", metadata={"format": "pt"})

    def below(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """Input of the first adapted layer, float32 (n, length, width), for token ids and mask, int64 (n, length), all
        on the CPU; None where no layer is below. Batches have one fixed shape, so no bit of it depends on other records."""
        import torch

        if self._tail is self._full:
            return None

        def catch(_module: Any, args: Any, kwargs: Any) -> None:
            raise _Caught(args[0] if args else kwargs["hidden_states"])

        hidden, device = torch.empty(len(ids), ids.shape[1], self._width), next(self._full.parameters()).device
        handle, size = self._full[self.adapted[0]].register_forward_pre_hook(catch, with_kwargs=True), self.encode_batch
        try:
            with torch.inference_mode(), self.whole():
                for start in range(0, len(ids), size):
                    rows = np.resize(np.arange(start, min(start + size, len(ids))), size)
                    try:
                        self.peft(input_ids=ids[rows].to(device), attention_mask=mask[rows].to(device))
                    except _Caught as caught:
                        hidden[start:start + size] = caught.hidden[:len(ids) - start]
        finally:
            handle.remove()
        return hidden

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All layers are in place within."""
        setattr(self._parent, self._attribute, self._full)
        try:
            yield
        finally:
            setattr(self._parent, self._attribute, self._tail)

    def inject(self, hidden: torch.Tensor | None) -> None:
        """Where the next forward pass of the module starts from."""
        if self._tail is not self._full:
            self._tail[0].hidden = hidden

    def _find_layers(self, base: Any) -> None:
        """The list of transformer layers: the ModuleList as long as config.num_hidden_layers."""
        import torch

        for parent in base.modules():
            for name, child in parent.named_children():
                if isinstance(child, torch.nn.ModuleList) and len(child) == base.config.num_hidden_layers:
                    self._parent, self._attribute, self._full = parent, name, child
                    return
        raise UsageError("model.layers", "The model has no list of transformer layers.", "Use a model like BERT or Llama.")

    def _layer_index(self, layer: int) -> int:
        n = len(self._full)
        if not -n <= layer < n:
            raise UsageError("lora.layers", f"Layer {layer} does not exist in a model of {n} layers.",
                             f"Use -{n}..{n - 1}.")
        return layer % n

    def _named_parameters(self) -> dict[str, torch.nn.Parameter]:
        lora = {saved_name(name): p for name, p in self.peft.named_parameters() if ".lora_" in name}
        return {**dict(sorted(lora.items())), **self._head}


class _Caught(Exception):
    """Ends a forward pass once the input of the first adapted layer is known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def load_base(kind: str, folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, in float32 but for a quantised base. kind: AutoModel or AutoModelForCausalLM. No
    code of it is run, nothing is fetched. Raises UsageError `model.unreadable`; also as `check_quantisation`."""
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    check_quantisation(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        base = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False,
                                                           use_safetensors=True, dtype=torch.float32,
                                                           attn_implementation=attention())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError("model.unreadable", f"transformers can't load {folder.name}: {e}",
                         "Copy the folder again, or use a model that this release of transformers knows.") from e
    return base, tokenizer


def with_lora(base: Any, lora: LoraTerms, layers: Sequence[int], task: str) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0, bias="none",
                        layers_to_transform=list(layers), task_type=TaskType(task))
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

    class Below(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            if hasattr(layer, "attention_type"):  # models with several kinds of masks choose one by it
                self.attention_type = layer.attention_type

    class Inject(Below):
        hidden: torch.Tensor

        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return self.hidden

    class Pass(Below):
        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states

    return torch.nn.ModuleList([Inject(full[0]), *[Pass(layer) for layer in full[1:first]], *full[first:]])
