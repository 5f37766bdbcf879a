"""DP-SGD (Abadi et al., CCS 2016): per-sample gradients by Opacus hooks, one clip over all trainables, lattice sum.

Guarantees: a record changes the sum by at most `clip` (plus the lattice's rounding) in L2; a record whose gradient isn't
finite, or whose forward pass raises, contributes zero and changes nothing else; the physical batch doesn't change the
result; nothing of one call is left in the model for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privacy.errors import UsageError
from privacy.mechanism import DpMechanism
from privacy.noise import LATTICE_BITS, lattice_noise, pitch, poisson_sample

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

        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                raise _uncovered(name, "batch norm couples the records of a batch")
        for p in module.parameters():
            p.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)
        self.parameters, self._losses = dict(parameters), losses
        self.dim = sum(p.numel() for p in self.parameters.values())
        try:
            self._module = GradSampleModule(module, batch_first=True, loss_reduction="sum", strict=True)
        except (NotImplementedError, ValueError) as e:
            raise _uncovered("a layer of the model", "it has no per-sample gradient") from e
        module.eval()
        for layer in module.modules():  # the hooks work in training mode only; dropout stays off
            layer.training = any(p.requires_grad for p in layer.parameters(recurse=False))

    def check(self, record: int) -> None:
        """Run one record. Raises UsageError `dp.no_per_sample_gradient`, and `dp.frozen` if nothing can move."""
        rows = self._chunk(np.array([record], np.int64))
        if not np.any(rows):
            raise UsageError("dp.frozen", "A probe record gives a zero gradient: the adapter can't move.",
                             "Check lora.targets, lora.layers and the learning rate.")

    def clipped(self, indices: NDArray[np.int64], clip: float, physical_batch: int) -> Iterator[NDArray[np.int64]]:
        """Per-record gradients clipped to `clip`, on the lattice: int64 (b, dim) for each physical batch."""
        for start in range(0, len(indices), physical_batch):
            grads = self._rows(indices[start:start + physical_batch]).astype(np.float64)
            grads[~np.isfinite(grads).all(axis=1)] = 0.0
            norms = np.linalg.norm(grads, axis=1)
            grads *= np.minimum(1.0, clip / np.maximum(norms, clip * 1e-12))[:, None]
            yield np.rint(grads / pitch(clip)).astype(np.int64)

    def _rows(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        try:
            return self._chunk(indices)
        except Exception:  # noqa: BLE001 - a record may raise anything; it must change nothing that leaves
            self._clear()
        if len(indices) == 1:
            return np.zeros((1, self.dim), np.float32)
        return np.concatenate([self._rows(indices[i:i + 1]) for i in range(len(indices))])

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
        """Drop every gradient, so that an aborted batch can't leak into the next (Opacus keeps them otherwise)."""
        for p in self.parameters.values():
            p.grad, p.grad_sample = None, None  # type: ignore[attr-defined]
        self._module.forbid_grad_accumulation()


def noisy_mean(grads: PerSampleGradients, units: int, mechanism: DpMechanism, physical_batch: int) -> NDArray[np.float64]:
    """One release: Poisson sample, clipped lattice sum, noise, divided by the public q * n_decl. Shape (dim,).

    An empty sample is a noise-only step with the same denominator.
    """
    total = np.zeros(grads.dim, np.int64)
    for part in grads.clipped(poisson_sample(units, mechanism.q), mechanism.clip, physical_batch):
        total += part.sum(axis=0)
    total += lattice_noise(grads.dim, sigma=mechanism.sigma, clip=mechanism.clip)
    return np.asarray(total * (pitch(mechanism.clip) / mechanism.denominator), np.float64)


def _uncovered(name: str, why: str) -> UsageError:
    return UsageError("dp.no_per_sample_gradient", f"Under DP {name!r} can't be trained: {why}.",
                      "Freeze it, or use a model and adapter of plain linear layers.")


__all__ = ["LATTICE_BITS", "PerSampleGradients", "noisy_mean"]
