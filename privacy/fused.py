"""The engine `fused`: one backward pass yields every record's gradient of the trained weights, for LoRA at little cost.

While a batch runs, the layers that hold trained weights run the forward passes of `fused_layers`; afterwards the module is
as it was. What a backward pass leaves lies in an object of that pass alone. With `checkpointing` a transformer layer keeps
its input only and runs again in the backward pass (Chen et al., arXiv 1604.06174): less memory, a forward pass more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privacy.compute import Precision
from privacy.dpsgd import ClippedGradients, Losses, uncovered

if TYPE_CHECKING:
    import torch

    from privacy.fused_layers import Forward, Put


class FusedGradients(ClippedGradients):
    """As `ClippedGradients`. Refuses, by name, what isn't a weight of a linear layer, of plain LoRA on one, or of a norm."""

    def __init__(self, module: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], losses: Losses, *,
                 precision: Precision = "float32", checkpointing: bool = False) -> None:
        from privacy.fused_layers import forwards

        super().__init__(module, parameters, losses, precision=precision)
        self._blocks = list(_blocks(module)) if checkpointing else []
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._layers: list[tuple[torch.nn.Module, Mapping[str, str], Callable[[Put], Forward]]] = []
        covered: set[torch.nn.Module] = set()  # modules whose weights a layer above them takes care of
        for layer in module.modules():
            trained = {n: self._names[id(p)] for n, p in layer.named_parameters() if id(p) in self._names}
            known = forwards(layer) if trained and layer not in covered else None
            if known and trained.keys() <= known[0]:
                self._layers.append((layer, trained, known[1]))
                covered.update(layer.modules())
            elif layer not in covered and (own := [n for n in trained if "." not in n]):
                raise uncovered(trained[own[0]], f"it belongs to a {type(layer).__name__}")

    def _backward(self, indices: NDArray[np.int64]) -> list[torch.Tensor]:
        import torch

        self._clear()
        kept: dict[str, torch.Tensor] = {}
        with self._capturing(kept), torch.enable_grad():
            torch.autograd.backward(self._one_each(indices).sum())
        for name, p in self.parameters.items():
            if p.grad is not None:
                raise uncovered(name, "it is used outside of its layer")
            if name not in kept or kept[name].shape != (len(indices), *p.shape):
                raise uncovered(name, "it has no per-sample gradient")
        return [kept[name] for name in self.parameters]

    @contextmanager
    def _capturing(self, kept: dict[str, torch.Tensor]) -> Iterator[None]:
        """Per-record gradients of what runs inside, by name of the parameter; a layer that runs twice adds up."""

        def putter(trained: Mapping[str, str]) -> Put:
            def put(weight: str, gradient: Callable[[], torch.Tensor]) -> None:
                if (name := trained.get(weight)) is not None:
                    _add(kept, name, gradient)

            return put

        try:
            for layer, trained, forward in self._layers:
                layer.__dict__["forward"] = forward(putter(trained))
            for block in self._blocks:
                block.__dict__["forward"] = _twice(block.forward)
            yield
        finally:
            for layer in (*self._blocks, *(layer for layer, _, _ in self._layers)):
                layer.__dict__.pop("forward", None)

    def _clear(self) -> None:
        for p in self.parameters.values():
            p.grad = None


def _blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The members of module lists that hold trained weights: transformer layers. Not what lies within one of them."""
    import torch

    for child in module.children():
        if not isinstance(child, torch.nn.ModuleList):
            yield from _blocks(child)
            continue
        for member in child:
            if "forward" not in member.__dict__ and any(p.requires_grad for p in member.parameters()):
                yield member


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    return partial(checkpoint, forward, use_reentrant=False)


def _add(kept: dict[str, torch.Tensor], name: str, gradient: Callable[[], torch.Tensor]) -> None:
    kept[name] = kept[name] + gradient().float() if name in kept else gradient().float()
