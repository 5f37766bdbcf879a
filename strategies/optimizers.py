"""Server optimisers on the mean change (Reddi et al., arXiv 2003.00295). Post-processing of a released sum.

They work coordinate by coordinate, so stepping by tensor is stepping on the flat vector. A state is zeros (dim,) at the
start; whoever calls keeps what comes back for the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


def fedadam(terms: RuleTerms, delta: Vector, state: Vector) -> tuple[Vector, Vector]:
    """v = beta2 * v + (1 - beta2) * delta^2. State after the start: (2, ...), m and v."""
    m, v = _moments(terms, state, delta)
    return _adaptive(terms, delta, m, (terms.beta2 * v + (1 - terms.beta2) * np.square(delta)).astype(np.float32))


def fedyogi(terms: RuleTerms, delta: Vector, state: Vector) -> tuple[Vector, Vector]:
    """v = v - (1 - beta2) * delta^2 * sign(v - delta^2): v moves no faster than delta^2 is small. State as fedadam's."""
    (m, v), square = _moments(terms, state, delta), np.square(delta)
    return _adaptive(terms, delta, m, (v - (1 - terms.beta2) * square * np.sign(v - square)).astype(np.float32))


def _moments(terms: RuleTerms, state: Vector, delta: Vector) -> tuple[Vector, Vector]:
    """v starts at tau^2, as in the paper's algorithm 2."""
    return (state[0], state[1]) if state.ndim > delta.ndim else (state, np.full_like(delta, terms.tau**2))


def _adaptive(terms: RuleTerms, delta: Vector, m: Vector, v: Vector) -> tuple[Vector, Vector]:
    """m = momentum * m + (1 - momentum) * delta; update = lr * m / (sqrt(v) + tau). No bias correction, as in the paper."""
    m = terms.momentum * m + (1 - terms.momentum) * delta
    update = terms.server_lr * m / (np.sqrt(v) + terms.tau)
    return update.astype(np.float32), np.stack([m, v]).astype(np.float32)


OPTIMIZERS: dict[str, Step] = {"fedavg": fedavg, "fedavgm": fedavgm, "fedadam": fedadam, "fedyogi": fedyogi}


def optimizer(name: str) -> Step:
    """Look an optimiser up. Raises UsageError `optimizer.unknown`."""
    try:
        return OPTIMIZERS[name]
    except KeyError:
        raise UsageError("optimizer.unknown", f"There is no server optimiser {name!r}.",
                         nearest(name, OPTIMIZERS)) from None


def stepped(terms: RuleTerms, change: Mapping[str, Vector], state: Mapping[str, Vector]
            ) -> tuple[dict[str, Vector], dict[str, Vector]]:
    """One step on each tensor of a rule's change, with the state of its name. A tensor that has no change in this round
    (A or B of rolora) neither moves nor loses its state: momentum must not move a factor that is everyone's."""
    step, after, out = optimizer(terms.optimizer), dict(state), {}
    for name, delta in change.items():
        out[name], after[name] = step(terms, delta, state.get(name, np.zeros_like(delta)))
    return out, after
