"""Server optimisers on the mean delta (Reddi et al., arXiv 2003.00295). Post-processing of a released sum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privacy.contract import RuleTerms
from privacy.errors import UsageError, nearest

Vector = NDArray[np.float32]
Step = Callable[[RuleTerms, Vector, Vector], tuple[Vector, Vector]]


def fedavg(terms: RuleTerms, delta: Vector, state: Vector) -> tuple[Vector, Vector]:
    """update = lr * delta."""
    return (terms.server_lr * delta).astype(np.float32), state


def fedavgm(terms: RuleTerms, delta: Vector, state: Vector) -> tuple[Vector, Vector]:
    """FedAvgM (arXiv 1909.06335): state = momentum * state + delta; update = lr * state. momentum 0 is fedavg."""
    state = (terms.momentum * state + delta).astype(np.float32)
    return (terms.server_lr * state).astype(np.float32), state


OPTIMIZERS: dict[str, Step] = {"fedavg": fedavg, "fedavgm": fedavgm}


def optimizer(name: str) -> Step:
    """Look an optimiser up. Raises UsageError `optimizer.unknown`."""
    try:
        return OPTIMIZERS[name]
    except KeyError:
        raise UsageError("optimizer.unknown", f"There is no server optimiser {name!r}.",
                         nearest(name, OPTIMIZERS)) from None
