"""Order, identity, exactness and the range of what is sent, for random shapes, ranks, numbers of sites and weights."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.adapter import HEAD, initial
from strategies.base import A, B, Round, Rule, Setup, adapter_spec, flatten, unflatten
from strategies.conformance import TOLERANCE
from strategies.example import Rotated
from strategies.federate import federate
from strategies.merge import effective
from strategies.rules import RULES

MEANS = [r for r in (*RULES.values(), Rotated()) if r.weighted]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Rule, Round, list[dict[str, np.ndarray]], list[float]]:
    one, rank = draw(st.sampled_from(MEANS)), draw(st.integers(1, 4))
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for i in range(draw(st.integers(1, 3))):
        m, n = draw(st.integers(rank, 60)), draw(st.integers(rank, 60))
        shapes += [(f"layer.{i}{A}", (rank, n)), (f"layer.{i}{B}", (m, rank))]
    spec = adapter_spec(one, (*shapes, (HEAD[0], (2, 3)), (HEAD[1], (2,))))
    sites = draw(st.integers(1, 6))
    ragged = one.name in ("hetero", "exact") and draw(st.booleans())
    ranks = tuple(draw(st.integers(1, rank)) for _ in range(sites)) if ragged else (rank,) * sites
    setup = Setup(spec=spec, ranks=ranks, seed=draw(st.integers(0, 9)), max_norm=1e4, range=1e4)
    rng, no = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.integers(1, 4))
    old = {n: v if not one.changes(n) else v + rng.normal(0, 0.3, v.shape).astype(np.float32)
           for n, v in initial(spec, setup.seed).items()}
    round_ = Round(setup, no, old)
    news = [{n: v + rng.normal(0, 0.1, v.shape).astype(np.float32) if one.trains(n, no) else v
             for n, v in one.own(round_.old, r).items()} for r in ranks]
    return one, round_, news, [draw(st.integers(1, 64)) / 64 for _ in ranks]


def next_model(one: Rule, round_: Round, news: list[dict[str, np.ndarray]], weights: list[float]) -> dict[str, np.ndarray]:
    return effective(federate(one, round_.setup, round_.no, round_.old, news, weights).adapter)


def close(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> bool:
    return all(np.linalg.norm(got[n] - v) <= 3 * TOLERANCE * max(np.linalg.norm(v), 1.0) for n, v in want.items())


@given(cases())
@settings(max_examples=120, deadline=None)
def test_order_of_sites_does_not_matter(case: tuple) -> None:  # type: ignore[type-arg]
    one, round_, news, weights = case
    turned = list(np.random.default_rng(0).permutation(len(news)))
    assert close(next_model(one, round_, news, weights),
                 next_model(one, round_, [news[i] for i in turned], [weights[i] for i in turned]))


@given(cases())
@settings(max_examples=120, deadline=None)
def test_scaling_all_weights_changes_nothing(case: tuple) -> None:  # type: ignore[type-arg]
    one, round_, news, weights = case
    assert close(next_model(one, round_, news, weights), next_model(one, round_, news, [w * 3.7 for w in weights]))


@given(cases())
@settings(max_examples=200, deadline=None)
def test_exact_rules_move_by_the_mean_of_what_the_sites_moved(case: tuple) -> None:  # type: ignore[type-arg]
    one, round_, news, weights = case
    begun = [effective(one.own(round_.old, r)) for r in round_.setup.ranks]
    moved = [{n: v - b[n] for n, v in effective(new).items()} for new, b in zip(news, begun, strict=True)]
    want = {n: v + sum(w * m[n] for w, m in zip(weights, moved, strict=True)) / sum(weights)
            for n, v in effective(round_.old).items()}
    assert not one.exact or close(next_model(one, round_, news, weights), want)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_one_site_alone_gives_its_own_model_back(case: tuple) -> None:  # type: ignore[type-arg]
    one, round_, news, _ = case
    if len(set(round_.setup.ranks)) == 1 and round_.setup.ranks[0] == round_.setup.rank:
        assert close(next_model(one, round_, news[:1], [0.5]), effective(news[0]))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_vector_of_a_plan_is_unpacked_as_it_was_packed(case: tuple) -> None:  # type: ignore[type-arg]
    one, round_, news, _ = case
    plan = one.plan(round_, 1)
    parts = one.parts(round_, 1, news[0], {})
    vector = flatten(parts, plan)
    assert vector.shape == (sum(p.size for p in plan),)
    back = unflatten(vector, plan)
    assert all(back[n].tobytes() == v.tobytes() and back[n].shape == v.shape for n, v in parts.items())
    assert all(np.abs(v).max(initial=0) <= p.range for p, v in zip(plan, (parts[p.name] for p in plan), strict=True))
