"""What an adapter adds to the base model: W0 + s (residual + B R A), with R the identity where there is no core.

s = alpha / r is one number of the contract, and it multiplies the residual too. A quantised base can't absorb a residual
without rounding it away: `folded` keeps it beside the adapter, in one LoRA of larger rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from strategies.adapter import Tensors
from strategies.base import CORE, RESIDUAL, A, B, Named

RANK_TOLERANCE = 1e-6  # singular values of a residual below this share of the product's norm are rounding


def product(tensors: Tensors, module: str) -> NDArray[np.float64]:
    """residual + B R A of one module, float64 (m, n)."""
    out = without_residual(tensors, module)
    residual = tensors.get(module + RESIDUAL)
    return out if residual is None else out + residual


def without_residual(tensors: Tensors, module: str) -> NDArray[np.float64]:
    """B R A of one module, float64 (m, n)."""
    left = tensors[module + B].astype(np.float64)
    core = tensors.get(module + CORE)
    return np.asarray((left if core is None else left @ core) @ tensors[module + A].astype(np.float64))


def effective(tensors: Tensors) -> dict[str, NDArray[np.float64]]:
    """The whole change of the model: `product` by module, and every other tensor by name."""
    modules = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    rest = {n: v.astype(np.float64) for n, v in tensors.items() if not n.endswith((A, B, CORE, RESIDUAL))}
    return {**{module: product(tensors, module) for module in modules}, **rest}


def merged(base: NDArray[np.float32], tensors: Tensors, module: str, scale: float) -> NDArray[np.float64]:
    """The module's full weight, float64 (m, n)."""
    return np.asarray(base + scale * product(tensors, module))


def folded(tensors: Tensors) -> Named:
    """The same function as plain LoRA tensors that PEFT loads: a core goes into B, a residual into more rows and columns.

    Modules may differ in rank then (PEFT's rank_pattern), and each needs lora_alpha = s * its rank (alpha_pattern).
    """
    out: Named = {}
    for name, value in tensors.items():
        if name.endswith((CORE, RESIDUAL, A, B)):
            continue
        out[name] = value
    for module in (name.removesuffix(A) for name in tensors if name.endswith(A)):
        left, right = tensors[module + B].astype(np.float64), tensors[module + A].astype(np.float64)
        core, residual = tensors.get(module + CORE), tensors.get(module + RESIDUAL)
        left = left if core is None else left @ core
        if residual is not None and residual.any():
            u, s, vt = np.linalg.svd(residual.astype(np.float64), full_matrices=False)
            kept = int((s > RANK_TOLERANCE * np.linalg.norm(product(tensors, module))).sum())
            left = np.concatenate([left, u[:, :kept] * s[:kept]], axis=1)
            right = np.concatenate([right, vt[:kept]])
        out[module + A] = np.ascontiguousarray(right, np.float32)
        out[module + B] = np.ascontiguousarray(left, np.float32)
    return out
