"""Rules whose mean is that of the products B A, not of the factors: the server's side, shared by exact, flora, flexlora.

The new product T = B A + change is written as an adapter again: `split` says how, and what doesn't fit into rank r goes
into the residual, a tensor of its own beside the base (m x n by module), where the rule has one.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies.adapter import Tensors
from strategies.base import RESIDUAL, A, B, Named, Round, Rule, Shapes
from strategies.merge import without_residual

PRODUCT = ".product"  # change of B A of a module, (m, n)
Matrix = NDArray[np.float64]


class ProductRule(Rule):
    """Trains A, B and the head; `change` is by module. residual: whether the adapter has one."""

    residual: ClassVar[bool] = True

    def tensors(self, shapes: Shapes) -> Shapes:
        if not self.residual:
            return shapes
        width = {name.removesuffix(A): shape[1] for name, shape in shapes if name.endswith(A)}
        out: list[tuple[str, tuple[int, ...]]] = []
        for name, shape in shapes:
            out.append((name, shape))
            if name.endswith(B):
                module = name.removesuffix(B)
                out.append((module + RESIDUAL, (shape[0], width[module])))
        return tuple(out)

    def trains(self, tensor: str, round_no: int | None = None) -> bool:
        return not tensor.endswith(RESIDUAL)

    def changes(self, tensor: str) -> bool:
        return True

    def space(self, round_: Round) -> Shapes:
        s = round_.setup
        products = tuple((m + PRODUCT, (s.shape(m + B)[0], s.shape(m + A)[1])) for m in s.modules)
        return (*products, *self.others(round_))

    def others(self, round_: Round) -> Shapes:
        """What is trained beside A and B: its changes are averaged as they are."""
        return tuple((name, shape) for name, shape in self.trained(round_) if not name.endswith((A, B)))

    def apply(self, round_: Round, change: Tensors) -> Named:
        out = super().apply(round_, {name: change[name] for name, _ in self.others(round_)})
        for module in round_.setup.modules:
            total = without_residual(round_.old, module) + change[module + PRODUCT]
            left, right = self.split(round_, module, total)
            out[module + A], out[module + B] = right, left
            if self.residual:  # after the factors were rounded to float32, so that their rounding isn't lost
                rest = total - left.astype(np.float64) @ right.astype(np.float64)
                out[module + RESIDUAL] = (round_.old[module + RESIDUAL] + rest).astype(np.float32)
        return out

    @abstractmethod
    def split(self, round_: Round, module: str, total: Matrix) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The next B (m, r) and A (r, n) for a product of any rank."""


def best_rank(total: Matrix, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """B (m, r) and A (r, n), the closest product of that rank (Eckart-Young). A has orthonormal rows, as at the start;
    the sign of each row makes its largest entry positive. Components beyond min(m, n) are zero."""
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    sign = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)])
    left, right = np.zeros((len(u), rank), np.float32), np.zeros((rank, vt.shape[1]), np.float32)
    left[:, :len(s)], right[:len(s)] = u * (s * sign), vt * sign[:, None]
    return left, right
