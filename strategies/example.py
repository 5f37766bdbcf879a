"""An example of a new rule, in 40 lines: FFA-LoRA, sent as ONE rotated tensor (docs/strategies.md goes through it).

Rounding to few bits wastes them where one tensor's values are large and another's small. A public random rotation (signs,
then an orthonormal cosine transform, as in arXiv 1611.00429) spreads them evenly. It is linear and keeps lengths, so the
mean of the rotated is the rotated mean, and the limit on the norm still bounds every coordinate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct, idct

from strategies.adapter import Tensors
from strategies.base import Named, Part, Round, flatten, unflatten
from strategies.linear import Ffa


class Rotated(Ffa):
    """Trains what ffa trains; sends `rotated`, float32 (dim,)."""

    name = "rotated"

    def plan(self, round_: Round, pass_no: int) -> tuple[Part, ...]:
        return (Part("rotated", signs(round_).shape, round_.setup.bound("rotated")),)

    def parts(self, round_: Round, pass_no: int, new: Tensors, shared: Tensors) -> Named:
        change = super().parts(round_, pass_no, new, shared)  # checked, and clipped in norm
        vector = flatten(change, self.space(round_)).astype(np.float64)
        return {"rotated": dct(signs(round_) * vector, norm="ortho").astype(np.float32)}

    def change(self, round_: Round, means: Tensors) -> Named:
        vector = signs(round_) * idct(means["rotated"].astype(np.float64), norm="ortho")
        return unflatten(vector.astype(np.float32), self.space(round_))


def signs(round_: Round) -> NDArray[np.float64]:
    """Public, from the contract's seed and the round: both sides draw the same."""
    stream = np.random.Generator(np.random.PCG64([round_.setup.seed, round_.no]))
    return np.where(stream.random(round_.setup.spec.dim) < 0.5, -1.0, 1.0)
