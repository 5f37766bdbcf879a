"""The engine `fused`: one backward pass yields every record's gradient of the trained weights, for LoRA at little cost.

While a batch runs, the layers that hold trained weights run the forward passes of `fused_layers`; afterwards the module is
as it was. What a backward pass leaves lies in an object of that pass alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from privacy.dpsgd import ClippedGradients, Losses, uncovered

if TYPE_CHECKING:
    import torch

    from privacy.fused_layers import Forward, Put


class FusedGradients(ClippedGradients):
    """As `ClippedGradients`. Refuses, by name, what isn't a weight of a linear layer, of plain LoRA on one, or of a norm."""

    def __init__(self, module: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], losses: Losses) -> None:
        from privacy.fused_layers import forwards

        super().__init__(module, parameters, losses)
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
            yield
        finally:
            for layer, _, _ in self._layers:
                layer.__dict__.pop("forward", None)

    def _clear(self) -> None:
        for p in self.parameters.values():
            p.grad = None


def _add(kept: dict[str, torch.Tensor], name: str, gradient: Callable[[], torch.Tensor]) -> None:
    kept[name] = kept[name] + gradient() if name in kept else gradient()
