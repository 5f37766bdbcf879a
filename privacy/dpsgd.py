"""DP-SGD (Abadi et al., CCS 2016): per-sample gradients by Opacus hooks, one clip over all trainables, lattice sum.

Guarantees: an item (a record, or a person) changes the sum by at most `clip` (plus the lattice's rounding) in L2; a
record whose gradient isn't finite, or whose forward pass raises, contributes zero and changes no bit of another's
contribution; the physical batch changes the result by float rounding only; nothing of one call is left in the model
for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privacy.errors import UsageError
from privacy.mechanism import DpMechanism
from privacy.noise import lattice_noise, pitch
from privacy.population import Draw, Population

if TYPE_CHECKING:
    import torch

Losses = Callable[[NDArray[np.int64]], "torch.Tensor"]


class PerSampleGradients:
    """Opacus hooks on a module. parameters: name -> trainable parameter, in the order of the flat gradient.

    losses: indices of records, int64 (b,) -> per-record losses (b,), each the mean over that record alone.
    Raises UsageError `dp.no_per_sample_gradient`, naming a trainable parameter or a layer that couples records.
    """

    def __init__(self, module: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], losses: Losses) -> None:
        import torch
        from opacus import GradSampleModule

        for p in module.parameters():
            p.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                raise _uncovered(name, "batch norm couples the records of a batch")
            if any(p.requires_grad for p in layer.parameters(recurse=False)) and any(True for _ in layer.buffers()):
                raise _uncovered(name, "it has buffers, which records may change")
        self.parameters, self._losses = dict(parameters), losses
        self.dim = sum(p.numel() for p in self.parameters.values())
        self._module = GradSampleModule(module, batch_first=True, loss_reduction="sum", strict=True)
        module.eval()
        for layer in module.modules():  # the hooks work in training mode only; dropout stays off
            layer.training = any(p.requires_grad for p in layer.parameters(recurse=False))

    def check(self, record: int) -> None:
        """Run one synthetic record at random values of the parameters, which are put back.

        Raises UsageError `dp.no_per_sample_gradient`, and `dp.frozen` naming a tensor that gets no gradient.
        """
        import torch

        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        generator = torch.Generator().manual_seed(0)
        try:
            with torch.no_grad():  # at the zeros of a fresh adapter most gradients are zero
                for p in self.parameters.values():
                    p.normal_(std=0.1, generator=generator)
            gradient = self._chunk(np.array([record], np.int64))[0]
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(before[name])
        ends = np.cumsum([p.numel() for p in self.parameters.values()])
        for name, part in zip(self.parameters, np.split(gradient, ends[:-1]), strict=True):
            if not part.any():
                raise UsageError("dp.frozen", f"{name!r} gets no gradient: the adapter can't move.",
                                 "Check lora.targets and lora.layers.")

    def clipped(self, draw: Draw, clip: float, physical_batch: int) -> Iterator[NDArray[np.int64]]:
        """Each item's gradient (the mean over its records) clipped to `clip`, on the lattice: int64 (b, dim) a batch.

        An item is never split: a physical batch holds physical_batch // draws of them, at least one. A record whose
        gradient isn't finite contributes zero to its item's mean; the number of records that it is a mean of stays.
        """
        slots = draw.rows.shape[1]
        size = max(1, physical_batch // slots)
        for start in range(0, len(draw), size):
            rows, count = draw.rows[start:start + size], draw.count[start:start + size]
            each = self._rows(rows.ravel(), size * slots).astype(np.float64).reshape(len(rows), slots, self.dim)
            each[~np.isfinite(each).all(axis=2)] = 0.0
            each[np.arange(slots)[None, :] >= count[:, None]] = 0.0  # filled up, not drawn
            grads = each.sum(axis=1) / count[:, None]
            norms = np.linalg.norm(grads, axis=1)
            grads *= np.minimum(1.0, clip / np.maximum(norms, clip * 1e-12))[:, None]
            yield np.rint(grads / pitch(clip)).astype(np.int64)

    def _rows(self, indices: NDArray[np.int64], size: int) -> NDArray[np.float32]:
        """Gradients of up to `size` records, filled up to `size` by repetition: float sums depend on a batch's shape."""
        try:
            return self._chunk(np.resize(indices, size))[:len(indices)]
        except Exception:  # noqa: BLE001 - a record may raise anything; it must change nothing that leaves
            self._clear()
        if len(indices) == 1:
            return np.zeros((1, self.dim), np.float32)
        half = len(indices) // 2  # by halves: log2(size) batches find one bad record
        return np.concatenate([self._rows(indices[:half], size), self._rows(indices[half:], size)])

    def _chunk(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Raw per-record gradients, float32 (b, dim)."""
        import torch

        self._clear()
        with torch.enable_grad():
            torch.autograd.backward(self._losses(indices).sum())
        rows = []
        for name, p in self.parameters.items():
            grad: Any = getattr(p, "grad_sample", None)
            if grad is None or isinstance(grad, list) or len(grad) != len(indices):
                self._clear()
                raise _uncovered(name, "it has no per-sample gradient")
            rows.append(grad.detach().reshape(len(indices), -1))
        out = np.asarray(torch.cat(rows, dim=1).numpy(), np.float32)
        self._clear()
        return out

    def _clear(self) -> None:
        """Drop all that Opacus keeps of a batch, so that an aborted one can't leak into the next or silence it."""
        for layer in self._module.modules():
            for kept in ("activations", "max_batch_len"):
                layer.__dict__.pop(kept, None)
        for p in self.parameters.values():
            p.grad, p.grad_sample, p._forward_counter = None, None, 0  # type: ignore[attr-defined]
            p.__dict__.pop("_current_grad_sample", None)
        self._module.forbid_grad_accumulation()


def noisy_mean(grads: PerSampleGradients, population: Population, mechanism: DpMechanism,
               physical_batch: int) -> NDArray[np.float64]:
    """One release: Poisson sample, clipped lattice sum, noise, divided by the public q * n_decl. Shape (dim,).

    An empty sample is a noise-only step with the same denominator.
    """
    total = np.zeros(grads.dim, np.int64)
    for part in grads.clipped(population.draw(mechanism.q), mechanism.clip, physical_batch):
        total += part.sum(axis=0)
    total += lattice_noise(grads.dim, sigma=mechanism.sigma, clip=mechanism.clip)
    return np.asarray(total * (pitch(mechanism.clip) / mechanism.denominator), np.float64)


def _uncovered(name: str, why: str) -> UsageError:
    return UsageError("dp.no_per_sample_gradient", f"Under DP {name!r} can't be trained: {why}.",
                      "Freeze it, or use a model and adapter of plain linear layers.")
