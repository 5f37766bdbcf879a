"""The adapter: named float32 tensors in a fixed order, their digest, and the flat vector of those that are trained.

`AdapterSpec` is what both sides derive from the contract; tensors that come over the wire are checked against it by name,
shape and dtype before anything else uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.canonical import labelled_hash
from privacy.errors import Refused, UsageError

Tensors = Mapping[str, NDArray[np.float32]]
HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class AdapterSpec:
    """shapes: (name, shape) in canonical order. trained: names whose values a site changes and sends."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    trained: frozenset[str]

    @property
    def sizes(self) -> tuple[tuple[str, int], ...]:
        """(name, number of values) of what is trained, in the order of the update vector."""
        return tuple((name, int(np.prod(shape))) for name, shape in self.shapes if name in self.trained)

    @property
    def dim(self) -> int:
        """Length of the update vector."""
        return sum(count for _, count in self.sizes)

    def check(self, tensors: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.float32]]:
        """The tensors in order. Raises Refused `adapter.tensor`, naming the tensor that is missing, extra or wrong."""
        known = dict(self.shapes)
        for name in sorted(tensors.keys() ^ known.keys()):
            raise _refuse(name, "missing" if name in known else "not part of the adapter")
        out = {}
        for name, shape in self.shapes:
            value = tensors[name]
            if value.dtype != np.float32:
                raise _refuse(name, f"of type {value.dtype}, not float32")
            if value.shape != shape:
                raise _refuse(name, f"of shape {value.shape}, not {shape}")
            if not np.isfinite(value).all():
                raise _refuse(name, "not finite")
            out[name] = value.view(np.float32)
        return out

    @property
    def size(self) -> int:
        """Number of values of all tensors, trained or not."""
        return sum(int(np.prod(shape)) for _, shape in self.shapes)

    def pack(self, tensors: Tensors) -> NDArray[np.float32]:
        """All tensors in order as one vector, shape (size,): what travels."""
        return np.concatenate([tensors[name].ravel() for name, _ in self.shapes])

    def unpack(self, vector: NDArray[np.generic]) -> dict[str, NDArray[np.float32]]:
        """Inverse of `pack`, checked. Raises Refused `adapter.tensor`."""
        if vector.shape != (self.size,):
            raise _refuse("adapter", f"of shape {vector.shape}, not {(self.size,)}")
        out, at = {}, 0
        for name, shape in self.shapes:
            size = int(np.prod(shape))
            out[name] = vector[at:at + size].reshape(shape)
            at += size
        return self.check(out)

    def flatten(self, tensors: Tensors) -> NDArray[np.float32]:
        """Trained tensors as one vector, shape (dim,)."""
        return np.concatenate([tensors[name].ravel() for name, _ in self.shapes if name in self.trained])

    def add(self, tensors: Tensors, delta: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """New tensors: the trained ones moved by `delta`, shape (dim,); the others as they are."""
        if delta.shape != (self.dim,):
            raise _refuse("update", f"of shape {delta.shape}, not {(self.dim,)}")
        out, at = {}, 0
        for name, shape in self.shapes:
            value = tensors[name]
            if name in self.trained:
                size = int(np.prod(shape))
                value = value + delta[at:at + size].reshape(shape).astype(np.float32)
                at += size
            out[name] = value
        return out


def adapter_digest(tensors: Tensors) -> str:
    """Lowercase hex hash over names, shapes and little-endian float32 bytes, in order of names."""
    parts: list[bytes | str | int] = []
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name], "<f4")
        parts += [name, value.ndim, *value.shape, value.tobytes()]
    return labelled_hash("consilo adapter", *parts).hex()


def initial(spec: AdapterSpec, seed: int) -> dict[str, NDArray[np.float32]]:
    """The public start, an update of nothing: every lora_A has orthonormal rows (QR) drawn from the seed; lora_B and all
    else is zero. Where a core lora_R stands between A and B, the core is zero and lora_B has orthonormal columns."""
    names = {name for name, _ in spec.shapes}
    out = {}
    for index, (name, shape) in enumerate(spec.shapes):
        if ".lora_A." in name:
            out[name] = orthonormal(shape, seed, index)
        elif ".lora_B." in name and name.replace(".lora_B.", ".lora_R.") in names:
            out[name] = np.ascontiguousarray(orthonormal(shape[::-1], seed, index).T)
        else:
            out[name] = np.zeros(shape, np.float32)
    return out


def orthonormal(shape: tuple[int, ...], *seed: int) -> NDArray[np.float32]:
    """Random orthonormal rows, float32 (rows, columns) with rows <= columns: the QR factor of a Gaussian matrix with a
    positive diagonal, drawn uniformly, and the same everywhere up to rounding. Raises UsageError `lora.rank`."""
    rows, columns = shape
    if rows > columns:
        raise UsageError("lora.rank", f"{rows} rows of {columns} values can't be orthonormal.", "Lower lora.r.")
    gauss = np.random.Generator(np.random.PCG64(list(seed))).standard_normal((columns, rows))
    q, r = np.linalg.qr(gauss)
    return np.ascontiguousarray((q * np.sign(np.diag(r))).T.astype(np.float32))


def _refuse(name: str, what: str) -> Refused:
    return Refused("adapter.tensor", f"Tensor {name!r} is {what}.",
                   "Both sides must build the adapter from the same contract and model.")
