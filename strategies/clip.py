"""A limit on the L2 norm of a site's update, kept by the site after its noise: post-processing, so DP is untouched.

It bounds what an honest site's mistake, or a poisoned data set, can move the mean: weight * limit / sum of weights. A site
that lies about its update keeps no limit under secure aggregation; the encoding's range per coordinate still holds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from privacy.mechanism import DpMechanism

TAIL = 6.0  # standard deviations that the noise's norm may lie above its mean: P < 1e-8


def clip_norm(tensors: Mapping[str, NDArray[np.float32]], limit: float) -> dict[str, NDArray[np.float32]]:
    """All tensors scaled by one factor, so that their joint L2 norm is at most `limit`; the very same where it is."""
    factor = scale(norm(tensors), limit)
    return dict(tensors) if factor == 1.0 else {n: (v * np.float64(factor)).astype(np.float32) for n, v in tensors.items()}


def norm(tensors: Mapping[str, NDArray[np.float32]]) -> float:
    """Joint L2 norm."""
    return math.sqrt(sum(float(np.square(v, dtype=np.float64).sum()) for v in tensors.values()))


def scale(size: float, limit: float) -> float:
    """Factor for an update of that norm. A hair below 1 more, so that float32 rounding stays inside."""
    return 1.0 if size <= limit else limit / size * (1 - 2.0**-20)


def honest_norm(mechanism: DpMechanism, dim: int, local_lr: float) -> float:
    """The default limit, from public terms alone: no honest site's update is longer, but with probability below 1e-8.

    A step moves by at most local_lr * (2 clip + noise): twice the clip covers a sample twice as large as q * n_decl, and
    Gaussian noise of standard deviation sigma * clip / denominator in `dim` coordinates is no longer than that times
    sqrt(dim) + TAIL.
    """
    noise = mechanism.sigma * mechanism.clip / mechanism.denominator * (math.sqrt(dim) + TAIL)
    return local_lr * mechanism.steps * (2 * mechanism.clip + noise)
