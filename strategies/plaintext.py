"""Rules that need every single update: for simulations, or where each site's policy sets reveal_update with trust=local.

flora and flexlora average products from the factors (exact does so under a secure sum). krum, trimmed_mean and median
survive f = rule.byzantine sites that send anything; A is frozen for them, so distances and coordinates of B are those of the
products. None of them outvotes a majority, sees a poisoned update that looks like the others', or says who was wrong; on
skewed sites they also leave out honest ones (docs/strategies.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privacy.errors import UsageError
from strategies.adapter import Tensors, orthonormal
from strategies.base import A, B, Named, PlaintextRule, Round, flatten, unflatten
from strategies.merge import without_residual
from strategies.product import PRODUCT, Matrix, ProductRule, best_rank


class Flora(ProductRule, PlaintextRule):
    """FLoRA (arXiv 2409.05976): the factors stacked, [p_k B_k] and [A_k], join the residual; training starts afresh."""

    name, instead = "flora", "exact"

    def combine(self, round_: Round, sent: Sequence[Tensors], weights: Sequence[float]) -> Named:
        out = mean([{n: s[n] for n, _ in self.others(round_)} for s in sent], weights)
        for m in round_.setup.modules:
            left, right = stacked([(round_.old[m + B] + s[m + B], round_.old[m + A] + s[m + A]) for s in sent], weights)
            out[m + PRODUCT] = (left @ right - without_residual(round_.old, m)).astype(np.float32)
        return out

    def split(self, round_: Round, module: str, total: Matrix) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        setup = round_.setup
        fresh = orthonormal(setup.shape(module + A), setup.seed, setup.modules.index(module), round_.no)
        return np.zeros(setup.shape(module + B), np.float32), fresh


class FlexLora(Flora):
    """FlexLoRA (arXiv 2402.11505): the best product of rank r of the same mean; what doesn't fit is lost."""

    name, exact, residual = "flexlora", False, False

    def split(self, round_: Round, module: str, total: Matrix) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return best_rank(total, round_.setup.rank)


class Robust(PlaintextRule):
    """Weights are ignored: with them one site could outvote the others. `pick` gets float64 (sites, values)."""

    exact, weighted, instead = False, False, "ffa"

    def trains(self, tensor: str, round_no: int | None = None) -> bool:
        return not tensor.endswith(A)

    def least(self, byzantine: int) -> int:
        """Fewest sites with which so many can be wrong."""
        return 2 * byzantine + 1

    def pick(self, updates: Matrix, byzantine: int) -> Matrix:
        raise NotImplementedError

    def combine(self, round_: Round, sent: Sequence[Tensors], weights: Sequence[float]) -> Named:
        """Raises UsageError `rule.too_few_sites`."""
        order, f = self.trained(round_), round_.setup.byzantine
        if len(sent) < self.least(f):
            raise UsageError("rule.too_few_sites", f"{self.name} needs {self.least(f)} sites or more, not {len(sent)}.",
                             "Add sites, or lower rule.byzantine.")
        updates = np.stack([flatten(s, order) for s in sent]).astype(np.float64)
        return unflatten(self.pick(updates, f).astype(np.float32), order)


class Krum(Robust):
    """Krum (Blanchard et al., NeurIPS 2017): the one update closest to its n - f - 2 nearest, by squared distance."""

    name = "krum"

    def least(self, byzantine: int) -> int:
        return 2 * byzantine + 3

    def pick(self, updates: Matrix, byzantine: int) -> Matrix:
        n = len(updates)
        far = np.stack([np.square(updates - one).sum(axis=1) for one in updates])
        near = np.sort(far, axis=1)[:, :n - byzantine - 1]  # and itself, at 0
        best = min(range(n), key=lambda i: (float(near[i].sum()), updates[i].tobytes()))  # ties: whoever comes first
        return np.asarray(updates[best])


class TrimmedMean(Robust):
    """Coordinate-wise mean without the f largest and f smallest values (Yin et al., ICML 2018)."""

    name = "trimmed_mean"

    def pick(self, updates: Matrix, byzantine: int) -> Matrix:
        return np.asarray(np.sort(updates, axis=0)[byzantine:len(updates) - byzantine].mean(axis=0))


class Median(Robust):
    """Coordinate-wise median (Yin et al., ICML 2018)."""

    name = "median"

    def pick(self, updates: Matrix, byzantine: int) -> Matrix:
        return np.asarray(np.median(updates, axis=0))


def mean(sent: Sequence[Tensors], weights: Sequence[float]) -> Named:
    """Weighted mean by name, in float64, rounded once."""
    shares = np.asarray(weights, np.float64) / sum(weights)
    return {n: np.tensordot(shares, np.stack([s[n] for s in sent]).astype(np.float64), 1).astype(np.float32)
            for n in sent[0]}


def stacked(factors: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]], weights: Sequence[float]
            ) -> tuple[Matrix, Matrix]:
    """[p_1 B_1, p_2 B_2, ...] (m, K r) and [A_1; A_2; ...] (K r, n): p on ONE factor; their product is the mean."""
    shares = np.asarray(weights, np.float64) / sum(weights)
    left = np.concatenate([p * b for p, (b, _) in zip(shares, factors, strict=True)], axis=1)
    return left, np.concatenate([a for _, a in factors], dtype=np.float64)
