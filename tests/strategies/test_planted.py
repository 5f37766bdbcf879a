"""Rules with a bug planted in them: each breaks a promise of the conformance kit, or the kit would be no proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from privacy.errors import CheckFailed
from strategies import conformance as kit
from strategies.adapter import Tensors
from strategies.base import RESIDUAL, A, Named, Part, Round, Rule
from strategies.clip import clip_norm
from strategies.exact import Exact
from strategies.linear import FedIt, Ffa
from strategies.plaintext import Flora, Median


class BothFactors(Flora):
    """Planted: p on both factors of the stack."""

    def combine(self, round_: Round, sent: Sequence[Tensors], weights: Sequence[float]) -> Named:
        shares = np.asarray(weights) / sum(weights)
        return super().combine(round_, [{n: (v * (p if n.endswith(A) else 1.0)).astype(np.float32) for n, v in s.items()}
                                        for p, s in zip(shares, sent, strict=True)], weights)


class Uniform(Flora):
    """Planted: weights forgotten."""

    def combine(self, round_: Round, sent: Sequence[Tensors], weights: Sequence[float]) -> Named:
        return super().combine(round_, sent, [1.0] * len(sent))


class NoResidual(Exact):
    """Planted: what doesn't fit into rank r is lost."""

    def apply(self, round_: Round, change: Tensors) -> Named:
        return {n: np.zeros_like(v) if n.endswith(RESIDUAL) else v for n, v in super().apply(round_, change).items()}


class LastResidual(Exact):
    """Planted: this round's residual in place of the sum of all."""

    def apply(self, round_: Round, change: Tensors) -> Named:
        after = super().apply(round_, change)
        return {n: v - round_.old[n] if n.endswith(RESIDUAL) else v for n, v in after.items()}


class Narrow(Exact):
    """Planted: a basis that is too small for all sites' ranks."""

    def between(self, round_: Round, means: Tensors) -> Named:
        out = super().between(round_, means)
        return {n: np.where(np.arange(v.shape[1]) < kit.RANK, v, 0).astype(np.float32) for n, v in out.items()}


class OtherFactor(Exact):
    """Planted: in the second pass a site clips by another factor than in the first."""

    def parts(self, round_: Round, pass_no: int, new: Tensors, shared: Tensors) -> Named:
        out = super().parts(round_, pass_no, new, shared)
        return out if pass_no == 1 else {n: (v * np.float32(0.9)) for n, v in out.items()}


class FedItCalledExact(FedIt):
    exact = True


class Trains(Ffa):
    """Planted: A moves, although the rule says that it is frozen."""

    def apply(self, round_: Round, change: Tensors) -> Named:
        return {n: v + np.float32(1e-6) if n.endswith(A) else v for n, v in super().apply(round_, change).items()}


class Unchecked(Ffa):
    """Planted: nobody compares the frozen A."""

    def parts(self, round_: Round, pass_no: int, new: Tensors, shared: Tensors) -> Named:
        return clip_norm({n: new[n] - round_.old[n] for n, _ in self.trained(round_)}, round_.setup.max_norm)


class Unclipped(Ffa):
    def parts(self, round_: Round, pass_no: int, new: Tensors, shared: Tensors) -> Named:
        return {n: new[n] - round_.old[n] for n, _ in self.trained(round_)}


class InPlace(Ffa):
    def parts(self, round_: Round, pass_no: int, new: Tensors, shared: Tensors) -> Named:
        out = super().parts(round_, pass_no, new, shared)
        for name in out:
            new[name][...] = 0
        return out


class Whole(Ffa):
    """Planted: sites send the tensors themselves where `change` expects their change."""

    def parts(self, round_: Round, pass_no: int, new: Tensors, shared: Tensors) -> Named:
        return {n: new[n] for n, _ in self.trained(round_)}


class Peeking(Ffa):
    """Planted: the encoding's range follows a private value."""

    def plan(self, round_: Round, pass_no: int) -> tuple[Part, ...]:
        return tuple(Part(p.name, p.shape, p.range + float(np.abs(round_.old["head.weight"]).max()))
                     for p in super().plan(round_, pass_no))


class FirstWins(Median):
    """Planted: the order of sites matters."""

    def combine(self, round_: Round, sent: Sequence[Tensors], weights: Sequence[float]) -> Named:
        return dict(sent[0])


class Doubles(FedIt):
    exact = False

    def change(self, round_: Round, means: Tensors) -> Named:
        return {n: v * np.float32(1.001) for n, v in means.items()}


class Drifts(FedIt):
    """Planted: a step of the server that no site asked for."""

    exact = False

    def apply(self, round_: Round, change: Tensors) -> Named:
        return {n: v + np.float32(1e-3) for n, v in super().apply(round_, change).items()}


class SitesClaim(Ffa):
    """Planted: not linear, and called so."""

    linear, instead = False, "ffa"


PLANTED: list[tuple[Rule, Callable[[Rule], None]]] = [
    (BothFactors(), kit.exact_means_exact), (Uniform(), kit.exact_means_exact), (Uniform(), kit.weight_counts),
    (NoResidual(), kit.exact_means_exact), (LastResidual(), kit.exact_means_exact), (Narrow(), kit.exact_means_exact),
    (OtherFactor(), kit.exact_means_exact), (FedItCalledExact(), kit.exact_means_exact),
    (Trains(), kit.only_what_may_move_moves), (Unchecked(), kit.moved_tensors_are_refused),
    (Unclipped(), kit.parts_fit_the_plan), (InPlace(), kit.parts_fit_the_plan),
    (Whole(), kit.exact_means_exact), (Whole(), kit.identical_sites_give_that_site), (Peeking(), kit.plan_is_public),
    (FirstWins(), kit.order_does_not_matter), (Doubles(), kit.identical_sites_give_that_site),
    (Drifts(), kit.nothing_learnt_changes_nothing), (SitesClaim(), kit.linear_means_secure)]


@pytest.mark.parametrize(("wrong", "prove"), PLANTED, ids=lambda x: getattr(x, "__name__", type(x).__name__))
def test_planted_rule_is_caught(wrong: Rule, prove: Callable[[Rule], None]) -> None:
    with pytest.raises(CheckFailed) as caught:
        prove(wrong)
    assert caught.value.code == "rule.conformance"
