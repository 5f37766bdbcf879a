"""Fed-SB (arXiv 2502.15436): A and B fixed and orthonormal, an r x r core R between them is trained; W = W0 + s B R A.

The mean of R is the mean of the products, and a site sends r^2 values a module, whatever the model's width. What R can
reach depends on A and B alone: draw them from PUBLIC data (`public_start`); from a seed they span a random subspace.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from privacy.errors import UsageError
from strategies.adapter import AdapterSpec, initial
from strategies.base import CORE, A, B, Named, Rule, Shapes


class FedSb(Rule):
    """Trains lora_R and the head; lora_A and lora_B stay as they began."""

    name = "fedsb"

    def tensors(self, shapes: Shapes) -> Shapes:
        out: list[tuple[str, tuple[int, ...]]] = []
        for name, shape in shapes:
            out.append((name, shape))
            if name.endswith(B):
                out.append((name.removesuffix(B) + CORE, (shape[1], shape[1])))
        return tuple(out)

    def trains(self, tensor: str, round_no: int | None = None) -> bool:
        return not tensor.endswith((A, B))


def public_start(spec: AdapterSpec, seed: int, gradients: Mapping[str, NDArray[np.float32]]) -> Named:
    """As `adapter.initial`, with A and B from the top singular vectors of each module's gradient on PUBLIC data.

    gradients: float32 (m, n) by module. No private record may have gone into them, unless under DP and charged.
    Raises UsageError `rule.public_start` for a module without a finite gradient of its shape.
    """
    out = initial(spec, seed)
    for name, shape in spec.shapes:
        if not name.endswith(A):
            continue
        module, rank = name.removesuffix(A), shape[0]
        gradient = gradients.get(module)
        want = (out[module + B].shape[0], shape[1])
        if gradient is None or gradient.shape != want or not np.isfinite(gradient).all():
            raise UsageError("rule.public_start", f"{module!r} has no finite gradient of shape {want}.",
                             "Give one for each adapted module, taken on public data.")
        u, _, vt = np.linalg.svd(gradient, full_matrices=False)
        out[module + B] = np.ascontiguousarray(u[:, :rank], np.float32)
        out[name] = np.ascontiguousarray(vt[:rank], np.float32)
    return out
