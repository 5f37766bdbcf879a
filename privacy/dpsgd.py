"""DP-SGD (Abadi et al., CCS 2016): per-sample gradients, one clip over all trainables, sum on a lattice, noise.

Guarantees, whichever engine computes the gradients (`privacy.engine`): an item (a record, or a person) changes the sum by
at most `clip` (plus the lattice's rounding) in L2; a record whose gradient isn't finite, or whose forward pass raises,
contributes zero and changes no bit of another's contribution; the physical batch changes the result by float rounding
only; nothing of one call is left in the model for the next.

Gradients may be computed in bfloat16 (autocast) and with activations computed twice: what is clipped is each record's own
float32 vector, in float64, so the bound on an item holds for any of them. A batch that doesn't fit in memory though it
holds nothing but copies of a synthetic record is an error of this machine, and no record's.

Dropout is off but for lora_dropout, which is on where an adapter has one. Its masks are drawn anew for each batch, so then
"no bit" and "rounding only" hold in distribution: masks are independent of all records.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privacy.compute import Precision
from privacy.errors import Refused, UsageError
from privacy.mechanism import DpMechanism
from privacy.noise import lattice_noise, pitch
from privacy.population import Draw, Population

if TYPE_CHECKING:
    import torch

Losses = Callable[[NDArray[np.int64]], "torch.Tensor"]
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # relative, of two copies of a record against one
BLOCK = 2**17  # gradients at a time in float64: 1 MiB stays in cache


class ClippedGradients(ABC):
    """What engines share. parameters: name -> trainable parameter, in the order of the flat gradient; others are frozen.

    losses: indices of records, int64 (b,) -> per-record losses (b,), each the mean over that record alone. precision: of
    the products in it; weights and what is returned are float32.
    Raises UsageError `dp.no_per_sample_gradient`, naming a trainable parameter or a layer that couples records.
    """

    def __init__(self, module: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], losses: Losses, *,
                 precision: Precision = "float32") -> None:
        import torch

        self._precision: Precision = precision
        self._synthetic: int | None = None
        for p in module.parameters():
            p.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                raise uncovered(name, "batch norm couples the records of a batch")
            if any(p.requires_grad for p in layer.parameters(recurse=False)) and any(True for _ in layer.buffers()):
                raise uncovered(name, "it has buffers, which records may change")
            for variant in getattr(layer, "lora_variant", {}).values():
                if trained := [n for n, p in layer.named_parameters() if p.requires_grad]:
                    raise uncovered(f"{name}.{trained[0]}", f"{type(variant).__name__} isn't plain LoRA")
        self.parameters, self._losses = dict(parameters), losses
        self.dim = sum(p.numel() for p in self.parameters.values())
        self._dropouts = [dropout for layer in module.modules() if any(p.requires_grad for p in layer.parameters())
                          for dropout in getattr(layer, "lora_dropout", torch.nn.ModuleDict()).values()]
        module.eval()

    @abstractmethod
    def _backward(self, indices: NDArray[np.int64]) -> list[torch.Tensor]:
        """One backward pass. Per-record gradients (b, *shape) of each parameter, in order."""

    @abstractmethod
    def _clear(self) -> None:
        """Drop all that is kept of a batch, so that an aborted one can't leak into the next or silence it."""

    def check(self, record: int) -> None:
        """Compare two copies of a synthetic record with autograd of it alone, at random values; dropout off.

        Raises UsageError `dp.no_per_sample_gradient`, and `dp.frozen` naming a tensor that gets no gradient.
        """
        import torch

        self._synthetic = record
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        generator, twice = torch.Generator().manual_seed(0), np.array([record, record], np.int64)
        try:
            with torch.no_grad():  # at the zeros of a fresh adapter most gradients are zero
                for p in self.parameters.values():
                    p.copy_(torch.empty(p.shape).normal_(std=0.1, generator=generator))
            alone = self._alone(twice[:1])
            for name, part in zip(self.parameters, alone, strict=True):
                if part is None or not part.any():
                    raise UsageError("dp.frozen", f"{name!r} gets no gradient: the adapter can't move.",
                                     "Check lora.targets and lora.layers.")
            whole, limit = sum(float(part.square().sum()) for part in alone) ** 0.5, TOLERANCE[self._precision]
            for name, part, rows in zip(self.parameters, alone, self._backward(twice), strict=True):
                if float((rows - part).norm(dim=tuple(range(1, rows.dim()))).max()) > limit * (part.norm() + 1e-2 * whole):
                    raise uncovered(name, "its per-sample gradient isn't that of the record alone")
        finally:
            self._clear()
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(before[name])

    def _alone(self, record: NDArray[np.int64]) -> Sequence[torch.Tensor]:
        """Autograd of one record's loss, without the engine; None for a parameter that isn't used."""
        import torch

        with torch.enable_grad():
            return torch.autograd.grad(self._one_each(record).sum(), list(self.parameters.values()), allow_unused=True)

    def clipped(self, draw: Draw, clip: float, physical_batch: int,
                columns: NDArray[np.int64] | slice = slice(None)) -> Iterator[NDArray[np.int64]]:
        """Each item's gradient (the mean over its records) clipped to `clip`, on the lattice: int64 (some, dim) at a time.

        columns: of the flat gradient, those that are released; the others count for nothing, in the norm either.

        An item is never split: a physical batch holds physical_batch // draws of them, at least one. A record whose
        gradient isn't finite contributes zero to its item's mean; the number of records that it is a mean of stays.
        """
        slots = draw.rows.shape[1]
        size = max(1, physical_batch // slots)
        block = max(1, BLOCK // (self.dim * slots))
        for start in range(0, len(draw), size):
            rows, count = draw.rows[start:start + size], draw.count[start:start + size]
            each = self._rows(rows.ravel(), size * slots).reshape(len(rows), slots, self.dim)[..., columns]
            for i in range(0, len(rows), block):
                yield _on_lattice(each[i:i + block], count[i:i + block], clip)

    def _rows(self, indices: NDArray[np.int64], size: int) -> NDArray[np.float32]:
        """Gradients of up to `size` records, filled up to `size` by repetition: float sums depend on a batch's shape."""
        try:
            return self._chunk(np.resize(indices, size))[:len(indices)]
        except Exception as e:  # noqa: BLE001 - a record may raise anything; it must change nothing that leaves
            self._clear()
            memory = out_of_memory(e)
        if memory:
            self.require_fit(size)
        if len(indices) == 1:
            return np.zeros((1, self.dim), np.float32)
        half = len(indices) // 2  # by halves: log2(size) batches find one bad record
        return np.concatenate([self._rows(indices[:half], size), self._rows(indices[half:], size)])

    def require_fit(self, size: int) -> None:
        """Run a batch of `size` copies of the synthetic record of `check`. Raises Refused `dp.memory` with a size that
        fits, if this one doesn't."""
        if self._synthetic is None or self._fits(size):
            return
        smaller = size // 2
        while smaller and not self._fits(smaller):
            smaller //= 2
        raise Refused("dp.memory", f"A step with {size} records at a time doesn't fit in this machine's memory.",
                      f"Set site.physical_batch={smaller}; the result is the same." if smaller else
                      "Set site.checkpointing=true, or use a machine with more memory: not even one record fits.")

    def _fits(self, size: int) -> bool:
        try:
            self._chunk(np.full(size, self._synthetic, np.int64))
        except (MemoryError, RuntimeError) as e:
            self._clear()
            if not out_of_memory(e):
                raise
            return False
        return True

    def _chunk(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Raw per-record gradients, float32 (b, dim), with lora_dropout on."""
        import torch

        for dropout in self._dropouts:
            dropout.training = True
        try:
            rows = [grad.reshape(len(indices), -1).float() for grad in self._backward(indices)]
            return np.asarray(torch.cat(rows, dim=1).cpu().numpy(), np.float32)
        finally:
            self._clear()
            for dropout in self._dropouts:
                dropout.training = False

    def _one_each(self, indices: NDArray[np.int64]) -> torch.Tensor:
        with autocast(next(iter(self.parameters.values())).device.type, self._precision):
            each = self._losses(indices).float()
        if each.shape != (len(indices),):
            raise UsageError("dp.no_per_sample_gradient", f"The loss of {len(indices)} records has the shape "
                             f"{tuple(each.shape)}, so it couples them.", "Return one loss for each record.")
        return each


class PerSampleGradients(ClippedGradients):
    """The engine `opacus`: its hooks on a module, the reference."""

    def __init__(self, module: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], losses: Losses, *,
                 precision: Precision = "float32") -> None:
        from opacus import GradSampleModule

        super().__init__(module, parameters, losses, precision=precision)
        self._module = GradSampleModule(module, batch_first=True, loss_reduction="sum", strict=True)
        for layer in module.modules():  # the hooks work in training mode only
            layer.training = any(p.requires_grad for p in layer.parameters(recurse=False))

    def _backward(self, indices: NDArray[np.int64]) -> list[torch.Tensor]:
        import torch

        self._clear()
        with torch.enable_grad():
            torch.autograd.backward(self._one_each(indices).sum())
        rows = []
        for name, p in self.parameters.items():
            grad: Any = getattr(p, "grad_sample", None)
            if grad is None or isinstance(grad, list) or len(grad) != len(indices):
                raise uncovered(name, "it has no per-sample gradient")
            rows.append(grad.detach())
        return rows

    def _alone(self, record: NDArray[np.int64]) -> Sequence[torch.Tensor]:
        self._module.disable_hooks()
        try:
            return super()._alone(record)
        finally:
            self._module.enable_hooks()

    def _clear(self) -> None:
        for layer in self._module.modules():
            for kept in ("activations", "max_batch_len"):
                layer.__dict__.pop(kept, None)
        for p in self.parameters.values():
            p.grad, p.grad_sample, p._forward_counter = None, None, 0  # type: ignore[attr-defined]
            p.__dict__.pop("_current_grad_sample", None)
        self._module.forbid_grad_accumulation()


def noisy_mean(grads: ClippedGradients, population: Population, mechanism: DpMechanism, physical_batch: int,
               columns: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """One release: Poisson sample, clipped lattice sum, noise, divided by the public q * n_decl. Shape (dim,), or that of
    columns: int64, those of the flat gradient that are meant.

    An empty sample is a noise-only step with the same denominator.
    """
    dim = grads.dim if columns is None else len(columns)
    total = np.zeros(dim, np.int64)
    for part in grads.clipped(population.draw(mechanism.q), mechanism.clip, physical_batch,
                              slice(None) if columns is None else columns):
        total += part.sum(axis=0)
    total += lattice_noise(dim, sigma=mechanism.sigma, clip=mechanism.clip)
    return np.asarray(total * (pitch(mechanism.clip) / mechanism.denominator), np.float64)


def autocast(device: str, precision: Precision) -> torch.autocast:
    """Products in this precision, whatever surrounds them."""
    import torch

    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def out_of_memory(error: Exception) -> bool:
    """Whether that is what torch, numpy or Python says where memory is at its end."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and (
        "out of memory" in said or "can't allocate memory" in said or "not enough memory" in said))


def uncovered(name: str, why: str) -> UsageError:
    return UsageError("dp.no_per_sample_gradient", f"Under DP {name!r} can't be trained: {why}.",
                      "Freeze it, or use a model and adapter of plain linear layers.")


def _on_lattice(each: NDArray[np.float32], count: NDArray[np.int64], clip: float) -> NDArray[np.int64]:
    """Gradients (items, slots, dim), of which `count` are meant, to clipped means in units of gamma, int64 (items, dim)."""
    slots = each.shape[1]
    grads = each.astype(np.float64)
    grads[~np.isfinite(each).all(axis=2)] = 0.0
    grads[np.arange(slots)[None, :] >= count[:, None]] = 0.0  # filled up, not drawn
    means = grads[:, 0] if slots == 1 else grads.sum(axis=1) / count[:, None]
    norms = np.sqrt(np.einsum("ij,ij->i", means, means))
    means *= (np.minimum(1.0, clip / np.maximum(norms, clip * 1e-12)) / pitch(clip))[:, None]
    return np.asarray(np.rint(means, out=means), np.int64)
