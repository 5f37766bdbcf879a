"""Ranks that differ by site (HetLoRA, arXiv 2401.06432, with the count mask that makes it a mean).

A site of rank r_k trains rows 0..r_k-1 of A and columns 0..r_k-1 of B, in tensors of its own size, and sends their change
padded with zeros, beside a mask of r ones and zeros. Component j moves by mean(change_j) / mean(mask_j): the mean over
the sites that train it. Both means are linear, so a secure sum serves; every site uploads the full width under it.

The scale s = alpha / lora.r is the contract's for every site: alpha / r_k would train another function.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privacy.errors import Refused
from strategies.adapter import Tensors
from strategies.base import A, B, Named, Part, Round, Rule, check_still
from strategies.clip import clip_norm

RANKS = "ranks"  # the mask's name: float32 (r,)


class Hetero(Rule):
    """Mean of A and of B, by component; inexact as fedit is."""

    name, exact, ranked = "hetero", False, True

    def trains(self, tensor: str, round_no: int | None = None) -> bool:
        return True

    def own(self, tensors: Tensors, rank: int) -> Named:
        return truncated(tensors, rank)

    def plan(self, round_: Round, pass_no: int) -> tuple[Part, ...]:
        return (*super().plan(round_, pass_no), Part(RANKS, (round_.setup.rank,), 1.0))

    def parts(self, round_: Round, pass_no: int, new: Tensors, shared: Tensors) -> Named:
        check_still(self, round_, new)
        rank, old = own_rank(round_, new), round_.old
        begun = truncated(old, rank)
        change = clip_norm({n: new[n] - begun[n] for n in old}, round_.setup.max_norm)
        return {**{n: _padded(n, v, old[n].shape) for n, v in change.items()}, RANKS: mask(round_, rank)}

    def change(self, round_: Round, means: Tensors) -> Named:
        share = means[RANKS]
        by = np.divide(1.0, share, out=np.zeros(share.shape), where=share > 0)  # a component that no survivor trains stays
        out = {}
        for name in round_.old:
            value = means[name]
            out[name] = (value * by[:, None] if name.endswith(A) else value * by if name.endswith(B) else value
                         ).astype(np.float32)
        return out


def truncated(tensors: Tensors, rank: int) -> Named:
    """The first `rank` components of every module."""
    return {n: v[:rank] if n.endswith(A) else v[:, :rank] if n.endswith(B) else v for n, v in tensors.items()}


def own_rank(round_: Round, new: Tensors) -> int:
    """Of a site, by its tensors. Raises Refused `rule.site_rank` when no site of the contract has it, or they differ."""
    ranks = {new[m + A].shape[0] for m in round_.setup.modules} | {new[m + B].shape[1] for m in round_.setup.modules}
    if len(ranks) != 1 or not ranks <= set(round_.setup.ranks):
        raise Refused("rule.site_rank", f"The site's tensors have rank {', '.join(map(str, sorted(ranks)))}.",
                      "Train with the rank that the contract gives the site.")
    return int(ranks.pop())


def mask(round_: Round, rank: int) -> NDArray[np.float32]:
    """Ones for the components that a site of that rank trains, float32 (r,)."""
    return (np.arange(round_.setup.rank) < rank).astype(np.float32)


def _padded(name: str, value: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if not name.endswith((A, B)):
        return value
    out = np.zeros(shape, np.float32)
    out[:value.shape[0], :value.shape[1]] = value
    return out
