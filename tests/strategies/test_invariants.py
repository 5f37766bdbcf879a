"""The invariants of federated LoRA on real PEFT models, each beside the wrong variants that accuracy would not show.

Distances are relative Frobenius norms; what a wrong variant gives is asserted too, so that an invariant can't go blind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft_kit as kit
import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from peft_kit import peft_spec, read, write

from strategies.adapter import HEAD
from strategies.base import RESIDUAL, A, B, Rule
from strategies.conformance import TOLERANCE
from strategies.exact import Exact
from strategies.federate import encoded_mean, federate
from strategies.fedsb import FedSb
from strategies.linear import FedIt, Ffa, RoLora
from strategies.merge import folded, merged, without_residual
from strategies.plaintext import FlexLora, Flora, stacked

WEIGHTS = (1.0, 0.5, 0.125)
DATA = kit.silos((12, 6, 2))


@pytest.fixture(params=kit.KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return kit.peft_model(request.param)


def trained(model: Any, rule: Rule, start: kit.Tensors, no: int = 1, **how: Any) -> list[kit.Tensors]:
    return [kit.train(model, silo, start, rule, no, **how) for silo in DATA]


@pytest.mark.parametrize("rule", [Exact(), Flora()], ids=lambda r: r.name)
def test_base_plus_residual_plus_product_is_the_mean_of_the_sites_weights(model: Any, rule: Rule) -> None:
    """W0 + s residual + s B A = mean W_k, over three rounds; W_k as PEFT itself scales and merges it."""
    setup = kit.setup_of(rule, model, 3)
    assert rule.passes(setup) == (2 if rule.linear else 1)
    old = kit.begin(setup)
    for no in (1, 2, 3):
        news = trained(model, rule, old, no, optimizer=torch.optim.Adam, lr=0.02)
        residual = {m: kit.SCALE * old[m + RESIDUAL].astype(np.float64) for m in setup.modules}
        sites = [{m: w + residual[m] for m, w in kit.full_weights(model, new).items()} for new in news]
        want, uniform = kit.average(sites, WEIGHTS), kit.average(sites, (1, 1, 1))
        base = {m: kit.base_weight(model, m) for m in setup.modules}
        after = federate(rule, setup, no, old, news, WEIGHTS).adapter
        got = {m: merged(base[m], after, m, kit.SCALE) for m in setup.modules}
        unscaled = {m: base[m] + after[m + RESIDUAL] + kit.SCALE * without_residual(after, m) for m in setup.modules}
        assert kit.distance(got, want) < TOLERANCE
        assert kit.distance(unscaled, want) > 1e4 * TOLERANCE
        assert kit.distance(got, uniform) > 1e4 * TOLERANCE
        old = after


def test_exact_through_the_secure_encoding_is_the_mean_up_to_its_rounding(model: Any) -> None:
    rule = Exact()
    setup = kit.setup_of(rule, model, 3)
    old = kit.begin(setup)
    news = trained(model, rule, old)
    plain = federate(rule, setup, 1, old, news, WEIGHTS).adapter
    secure = federate(rule, setup, 1, old, news, WEIGHTS, mean=encoded_mean(30, 32)).adapter
    for m in setup.modules:
        error = merged(np.float32(0), secure, m, 1.0) - merged(np.float32(0), plain, m, 1.0)
        step = 100.0 / (2**29 - 1) * 3 / sum(WEIGHTS)
        assert 0 < np.abs(error).max() < 100 * step  # a step of each pass, and what the basis makes of it


def test_stack_is_the_mean_of_the_products_and_p_on_both_factors_is_not(model: Any) -> None:
    start = kit.begin(kit.setup_of(Flora(), model, 3))
    news = trained(model, Flora(), start)
    p = np.asarray(WEIGHTS) / sum(WEIGHTS)
    for m in (n.removesuffix(A) for n in start if n.endswith(A)):
        factors = [(new[m + B], new[m + A]) for new in news]
        want = sum(pk * b.astype(np.float64) @ a for pk, (b, a) in zip(p, factors, strict=True))
        left, right = stacked(factors, WEIGHTS)
        both = left @ np.concatenate([pk * a for pk, (_, a) in zip(p, factors, strict=True)])
        assert np.linalg.norm(left @ right - want) < TOLERANCE * np.linalg.norm(want)
        assert np.linalg.norm(both - want) > 4e-2 * np.linalg.norm(want)


def test_peft_cat_agrees_with_the_stack_and_peft_linear_is_no_mean(model: Any) -> None:
    """add_weighted_adapter: `cat` is exact; `linear` takes the root of the weight into both factors and mixes sites."""
    start = kit.begin(kit.setup_of(Flora(), model, 3))
    news = trained(model, Flora(), start, optimizer=torch.optim.Adam)
    p = [w / sum(WEIGHTS) for w in WEIGHTS]
    want = kit.average([kit.full_weights(model, new) for new in news], WEIGHTS)
    for i, new in enumerate(news):
        model.add_adapter(f"site{i}", model.peft_config["default"])
        write(model, {n: v for n, v in new.items() if ".lora_" in n}, f"site{i}")
    worst = {}
    for kind in ("cat", "linear"):
        model.add_weighted_adapter([f"site{i}" for i in range(3)], p, kind, combination_type=kind)
        got = {m: kit.base_weight(model, m) + model.get_submodule(m).get_delta_weight(kind).detach().numpy() for m in want}
        moved = kit.distance(want, {m: kit.base_weight(model, m) for m in want})
        worst[kind] = kit.distance(got, want) / moved
    assert worst["cat"] < 1e-4
    assert worst["linear"] > 0.1


def test_flexlora_misses_by_the_eckart_young_bound_and_fedit_by_no_less(model: Any) -> None:
    setup = kit.setup_of(FlexLora(), model, 3)
    start = kit.begin(setup)
    news = trained(model, FlexLora(), start, optimizer=torch.optim.Adam)
    flex = federate(FlexLora(), setup, 1, start, news, WEIGHTS).adapter
    fedit = federate(FedIt(), kit.setup_of(FedIt(), model, 3), 1, start, news, WEIGHTS).adapter
    for m in setup.modules:
        left, right = stacked([(new[m + B], new[m + A]) for new in news], WEIGHTS)
        want = left @ right
        bound = float(np.linalg.norm(np.linalg.svd(want)[1][kit.RANK:]))
        misses = [float(np.linalg.norm(merged(np.float32(0), t, m, 1.0) - want)) for t in (flex, fedit)]
        assert misses[0] == pytest.approx(bound, rel=1e-4)
        assert misses[1] > 1.01 * bound > 1e-3 * float(np.linalg.norm(want))


def test_ffa_never_moves_a(model: Any) -> None:
    setup = kit.setup_of(Ffa(), model, 3)
    start = old = kit.begin(setup)
    for no in (1, 2):
        old = federate(Ffa(), setup, no, old, trained(model, Ffa(), old, no), WEIGHTS).adapter
    assert max(float(np.abs(old[m + A] - start[m + A]).max()) for m in setup.modules) == 0
    assert all((old[m + B] != start[m + B]).any() for m in setup.modules)


@pytest.mark.parametrize("no", [1, 2])
@pytest.mark.parametrize("rule", [Ffa(), FedIt(), RoLora()], ids=lambda r: r.name)
def test_one_sgd_step_of_each_silo_is_one_step_of_the_pooled_data(model: Any, rule: Rule, no: int) -> None:
    """Weighted by their sizes; AdamW divides by each silo's own gradient and must differ, and so must other weights."""
    setup = kit.setup_of(rule, model, 3)
    old = {n: v if n.endswith(A) else np.random.default_rng(0).normal(0, 0.1, v.shape).astype(np.float32)
           for n, v in kit.begin(setup).items()}
    sizes = [len(silo.ids) for silo in DATA]

    def gap(optimizer: Any, weights: Any) -> float:
        how = {"steps": 1, "lr": 0.1, "optimizer": optimizer}
        want = kit.train(model, kit.pooled(DATA), old, rule, no, **how)
        got = federate(rule, setup, no, old, trained(model, rule, old, no, **how), weights).adapter
        return kit.distance(got, want)

    assert gap(torch.optim.SGD, sizes) < TOLERANCE
    assert gap(torch.optim.AdamW, sizes) > 0.05
    assert gap(torch.optim.SGD, (1, 1, 1)) > 0.05


def test_fedsb_folds_into_plain_lora_that_peft_runs(model: Any) -> None:
    """B R A with a random core: PEFT's output with the core folded into B is that of the merged weights."""
    setup = kit.setup_of(FedSb(), model, 3)
    start = kit.begin(setup)
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(0, 0.3, v.shape).astype(np.float32) if FedSb().trains(n) else v for n, v in start.items()}
    write(model, folded(tensors))
    base = {m: kit.base_weight(model, m) for m in setup.modules}
    want = {m: merged(base[m], tensors, m, kit.SCALE) for m in setup.modules}
    assert kit.distance(kit.full_weights(model, folded(tensors)), want) < TOLERANCE
    assert kit.distance(base, want) > 0.01


def test_residual_folds_into_one_peft_adapter_of_larger_rank(model: Any) -> None:
    """A quantised base can't absorb it; beside it, in the same adapter and scale, nothing is lost."""
    setup = kit.setup_of(Exact(), model, 3)
    old = kit.begin(setup)
    after = federate(Exact(), setup, 1, old, trained(model, Exact(), old, optimizer=torch.optim.Adam), WEIGHTS).adapter
    lora = {n: v for n, v in folded(after).items() if n not in HEAD}
    ranks = {m: lora[m + A].shape[0] for m in setup.modules}
    assert max(ranks.values()) == 3 * kit.RANK
    short = {m.removeprefix("base_model.model."): r for m, r in ranks.items()}
    kind = "bert" if any("query" in m for m in ranks) else "llama"
    wide = kit.peft_model(kind, rank_pattern=short, alpha_pattern={m: kit.SCALE * r for m, r in short.items()})
    want = {m: merged(kit.base_weight(model, m), after, m, kit.SCALE) for m in setup.modules}
    assert kit.distance(kit.full_weights(wide, lora), want) < TOLERANCE
    with torch.no_grad():  # and as a function
        for m, w in want.items():
            model.get_submodule(m).base_layer.weight.copy_(torch.from_numpy(w))
        write(model, {n: np.zeros_like(v) for n, v in read(model).items()})
        torch.testing.assert_close(wide(input_ids=DATA[0].ids).last_hidden_state,
                                   model(input_ids=DATA[0].ids).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_round_trip_through_pefts_own_save_and_load_is_bit_exact(model: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in peft_spec(model).shapes}
    write(model, tensors)
    model.save_pretrained(tmp_path)
    kind = "bert" if any("query" in n for n in tensors) else "llama"
    loaded = PeftModel.from_pretrained(kit.peft_model(kind).unload(), tmp_path)
    state = {n: v.numpy() for n, v in get_peft_model_state_dict(loaded).items()}
    assert state.keys() == tensors.keys()
    assert all(state[n].tobytes() == v.tobytes() == read(loaded)[n].tobytes() for n, v in tensors.items())
