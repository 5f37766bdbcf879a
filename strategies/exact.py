"""The exact mean of the sites' models under a linear rule, in two passes (double sketch; after FedEx-LoRA, arXiv
2410.09432, and FedASK, 2507.09990).

Site k's model is W0 + s (residual + B_k A_k). The mean of the products has at most the sum of the sites' ranks (plus what
some site doesn't train of B A), so two means of matrices as thin as that, w, give it exactly:

    pass 1   Y = mean of D_k O        D_k = B_k A_k - B A, what the site's training changed; O (n, w) public, drawn
    between  Q = qr(Y + B A O)        (m, w) orthonormal: a basis of the mean product's columns, sent to the sites
    pass 2   Z = mean of Q^T D_k      and the mean product is Q (Z + Q^T B A)

A module where w (m + n) >= m n sends D_k itself in pass 1. The next A and B are the best of rank r, and the rest goes
into the residual. Both sums are over the same sites: with a site in the first and not in the second, their difference
would be its own product. All of this is post-processing of noisy tensors.
The columns of O and Q are no longer than 1, so every coordinate that is sent is within the limit on the norm of D_k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privacy.errors import Refused
from strategies.adapter import Tensors
from strategies.base import A, B, Named, Part, Round, Setup, Shapes, check_still
from strategies.clip import norm, scale
from strategies.hetero import own_rank, truncated
from strategies.merge import without_residual
from strategies.product import PRODUCT, Matrix, ProductRule, best_rank

COLUMNS, BASIS, ROWS = ".columns", ".basis", ".rows"  # Y (m, w), Q (m, w), Z (w, n)
OVERSAMPLE = 4  # columns beyond that rank; with none, O may all but hide a direction (errors 100 times larger)
LONGEST = 1 + 1e-3  # norm of a column of a basis: a coordinator that sends longer ones deviates


class Exact(ProductRule):
    """Ranks may differ by site: one of rank r_k trains, and is compared with, the first r_k components."""

    name, ranked = "exact", True

    def passes(self, setup: Setup) -> int:
        return 2 if any(_sketched(setup, m) for m in setup.modules) else 1

    def own(self, tensors: Tensors, rank: int) -> Named:
        return truncated(tensors, rank)

    def plan(self, round_: Round, pass_no: int) -> tuple[Part, ...]:
        setup = round_.setup
        width, out = _width(setup), []
        for module in setup.modules:
            m, n = setup.shape(module + B)[0], setup.shape(module + A)[1]
            if pass_no == 2:
                part = (module + ROWS, (width, n))
            else:
                part = (module + COLUMNS, (m, width)) if _sketched(setup, module) else (module + PRODUCT, (m, n))
            if pass_no == 1 or _sketched(setup, module):
                out.append(Part(*part, setup.bound(part[0])))
        if pass_no == 1:
            out += [Part(name, shape, setup.bound(name)) for name, shape in self.others(round_)]
        return tuple(out)

    def parts(self, round_: Round, pass_no: int, new: Tensors, shared: Tensors) -> Named:
        """Raises Refused `rule.moved`, `rule.site_rank`, `rule.basis`."""
        check_still(self, round_, new)
        setup, rank = round_.setup, own_rank(round_, new)
        begun = truncated(round_.old, rank)
        factors = {m: _difference(new, begun, m) for m in setup.modules}
        rest = {n: new[n] - begun[n] for n, _ in self.others(round_)}
        length = float(np.linalg.norm([norm(rest), *(_length(*pair) for pair in factors.values())]))
        factor, out = scale(length, setup.max_norm), {}
        for part in self.plan(round_, pass_no):
            module, _, kind = part.name.rpartition(".")
            if module not in factors:
                value = rest[part.name]
            elif f".{kind}" == COLUMNS:
                value = factors[module][0] @ (factors[module][1] @ drawn(setup, round_.no, module))
            elif f".{kind}" == ROWS:
                value = (_checked(setup, module, shared).T @ factors[module][0]) @ factors[module][1]
            else:
                value = factors[module][0] @ factors[module][1]
            out[part.name] = (factor * value).astype(np.float32)
        return out

    def shares(self, setup: Setup) -> Shapes:
        return tuple((m + BASIS, (setup.shape(m + B)[0], _width(setup))) for m in setup.modules if _sketched(setup, m))

    def between(self, round_: Round, means: Tensors) -> Named:
        out = {}
        for m in round_.setup.modules:
            if _sketched(round_.setup, m):
                begun = without_residual(round_.old, m) @ drawn(round_.setup, round_.no, m)
                out[m + BASIS] = np.ascontiguousarray(np.linalg.qr(means[m + COLUMNS] + begun)[0], np.float32)
        return out

    def change(self, round_: Round, means: Tensors) -> Named:
        bases, out = self.between(round_, means), {name: means[name] for name, _ in self.others(round_)}
        for m in round_.setup.modules:
            if not _sketched(round_.setup, m):
                out[m + PRODUCT] = means[m + PRODUCT]
                continue
            begun, q = without_residual(round_.old, m), bases[m + BASIS].astype(np.float64)
            out[m + PRODUCT] = (q @ (means[m + ROWS] + q.T @ begun) - begun).astype(np.float32)
        return out

    def split(self, round_: Round, module: str, total: Matrix) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return best_rank(total, round_.setup.rank)


def drawn(setup: Setup, round_no: int, module: str) -> Matrix:
    """O, float64 (n, w), uniform from the contract's seed: the same bits everywhere, its columns no longer than 1."""
    n = setup.shape(module + A)[1]
    stream = np.random.Generator(np.random.PCG64([setup.seed, round_no, setup.modules.index(module)]))
    return np.asarray((2 * stream.random((n, _width(setup))) - 1) / np.sqrt(n))


def _width(setup: Setup) -> int:
    """Every site's own components, and those of B A that some site doesn't train."""
    return sum(setup.ranks) + setup.rank - min(setup.ranks) + OVERSAMPLE


def _sketched(setup: Setup, module: str) -> bool:
    m, n = setup.shape(module + B)[0], setup.shape(module + A)[1]
    return _width(setup) * (m + n) < m * n


def _difference(new: Tensors, begun: Tensors, module: str) -> tuple[Matrix, Matrix]:
    """Factors (m, 2 r), (2 r, n) of B_k A_k - B A."""
    left = np.concatenate([new[module + B], -begun[module + B]], axis=1, dtype=np.float64)
    return left, np.concatenate([new[module + A], begun[module + A]], dtype=np.float64)


def _length(left: Matrix, right: Matrix) -> float:
    """Frobenius norm of left @ right, in the size of the factors."""
    return float(np.linalg.norm(np.linalg.qr(left)[1] @ np.linalg.qr(right.T)[1].T))


def _checked(setup: Setup, module: str, shared: Tensors) -> NDArray[np.float32]:
    basis, want = shared.get(module + BASIS), (setup.shape(module + B)[0], _width(setup))
    if basis is None or basis.shape != want or basis.dtype != np.float32 or not (
            np.linalg.norm(basis, axis=0) <= LONGEST).all():
        raise Refused("rule.basis", f"The basis of {module!r} isn't float32 {want} with columns no longer than 1.",
                      "The coordinator sent something else between the passes; the round is void.")
    return basis
