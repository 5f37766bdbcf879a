"""FedProx (Li et al., arXiv 1812.06127): a pull of strength mu towards the adapter that the round began with.

It is added AFTER the noise. What it pulls is the sum of steps that were noisy already, so it is post-processing and costs
no budget; inside the loss it would be clipped with each record's gradient and take up part of the clip norm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def local_step(moved: NDArray[np.float32], mean: NDArray[np.float64], *, local_lr: float, mu: float) -> NDArray[np.float32]:
    """The change so far, float32 (dim,), after one more SGD step: moved - local_lr * (mean + mu * moved).

    mean: the noisy mean gradient, float64 (dim,). mu = 0 is plain SGD, bit by bit. local_lr * mu stays below 1, or the
    pull overshoots.
    """
    return moved - (local_lr * (mean + mu * moved)).astype(np.float32)
