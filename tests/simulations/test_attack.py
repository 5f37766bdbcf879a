"""The attack works where it should, on the product's own releases, and the page says no more than the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from privacy.errors import UsageError
from simulations.attack import FORMAT, OTHERS, TEXT, Plain, Site, attack, prepare, variant
from simulations.attack_page import page
from simulations.attack_scan import Release, Vocabulary, scan, span
from strategies.adapter import initial
from strategies.optimizers import optimizer

SENTENCE = "my chest hurt since monday and the rash"
TOKENS = 8
ROUNDS = 6
ALPHA = 1e-4


@pytest.fixture(scope="module")
def overrides(tiny_model: Path) -> list[str]:
    return ["model=local", f"model.path={tiny_model}", "model.name=tiny", "model.max_length=16",
            f"privacy.rounds={ROUNDS}"]


@pytest.fixture(scope="module")
def document(overrides: list[str]) -> dict[str, Any]:
    return attack(SENTENCE, overrides, seeds=(0, 1), repeats=2)


def away(site: Site, spread: float) -> dict[str, NDArray[np.float32]]:
    """An adapter far from its start, as after long training."""
    rng = np.random.default_rng(3)
    return {name: (value + rng.normal(0, spread, value.shape)).astype(np.float32)
            for name, value in initial(site.spec, 0).items()}


def test_plain_gradient_betrays_every_token(document: dict[str, Any]) -> None:
    assert document["format"] == FORMAT and len(document["tokens"]) == TOKENS
    assert document["scenarios"]["plain"] == {"releases": 2, "recovered": 2 * TOKENS, "of": 2 * TOKENS, "rate": 1.0,
                                              "median_rank": 1.0}
    assert [t["guess"] for t in document["without_dp"]] == SENTENCE.split()
    assert document["sweep"][-1]["sigma"] == document["mechanism"]["sigma"] > 1.0
    assert not document["mechanism"]["shipped_default"]  # six rounds are not the shipped twenty


def test_noise_leaves_chance(document: dict[str, Any]) -> None:
    """Hits under noise are not more than those of guessing, at alpha 1e-4; ranks are spread over the vocabulary."""
    for name in ("noise", "noise, whole run", "crowd, noise"):
        found = document["scenarios"][name]
        assert stats.binomtest(found["recovered"], found["of"], 0.05, alternative="greater").pvalue > ALPHA, name
        assert found["median_rank"] > document["model"]["vocabulary"] / 8, name


def test_control_the_noised_path_can_betray(overrides: list[str], tmp_path: Path) -> None:
    """Same trainer, noise next to nothing: every token; the setting's noise: none but by chance, at alpha 1e-4."""
    settings, contract = prepare(overrides)
    folder, shipped = Path(settings.model.path), contract.sites[0].sigma
    site = Site(variant(contract, noise=True, q=1.0, sigmas=[1e-8, shipped]), [(SENTENCE, "skin")], folder, tmp_path)
    vocabulary, adapter = Vocabulary(folder, settings.model.max_length), away(site, 0.3)
    tokens = vocabulary.tokens(SENTENCE)
    releases = [site.release(adapter, 1), *(site.release(adapter, 2) for _ in range(20))]
    off, *on = scan(vocabulary.embed, tokens, releases)
    assert off.hits.all()
    hits = int(sum(f.hits.sum() for f in on))
    assert stats.binomtest(hits, 20 * TOKENS, 0.1, alternative="greater").pvalue > ALPHA


def test_first_two_rounds_hold_no_such_gradient(document: dict[str, Any]) -> None:
    rates = {row["round"]: row["rate"] for row in document["by_round"]}
    assert rates[1] == rates[2] == 0.0 and rates[ROUNDS] == 1.0


def test_releases_are_what_the_product_sends(overrides: list[str], tmp_path: Path) -> None:
    """Without noise the trainer's vector is the plain gradient times the clip's factor, up to the lattice."""
    settings, contract = prepare(overrides)
    record, model = (SENTENCE, "skin"), Path(settings.model.path)
    site = Site(variant(contract, noise=False, q=1.0), [record], model, tmp_path)
    adapter = away(site, 0.3)
    sent, plain = site.release(adapter).gradient, Plain(contract, record, model).release(adapter).gradient
    factor = float((sent * plain).sum() / (plain * plain).sum())
    assert 0 < factor <= 1.0 + 1e-5
    assert np.abs(sent - factor * plain).max() < 2 * contract.privacy.clip * 2.0**-20


def test_noise_of_a_release_is_the_contracts(overrides: list[str], tmp_path: Path) -> None:
    """Two-sided chi-square on the coordinates, alpha 1e-4; the record's part is far below it."""
    settings, contract = prepare(overrides)
    site = Site(variant(contract, noise=True, q=1.0), [(SENTENCE, "skin")], Path(settings.model.path), tmp_path)
    adapter = initial(site.spec, 0)  # its lora_A gradient is zero
    draws = np.concatenate([site.release(adapter).gradient.ravel() for _ in range(20)])
    scale = contract.sites[0].sigma * contract.privacy.clip
    statistic = float(np.square(draws / scale).sum())
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], draws.size)
    assert low < statistic < high


def test_span_drops_directions_below_the_noise() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(3, 20))
    gradient = rng.normal(size=(8, 3)) @ inputs + 1e-9 * rng.normal(size=(8, 20))
    basis = span(Release(gradient, 1e-7))
    assert basis.shape == (20, 3)
    np.testing.assert_allclose(basis @ (basis.T @ inputs.T), inputs.T, atol=1e-6)
    assert span(Release(np.zeros((8, 20)), 0.0)).shape == (20, 0)
    assert span(Release(gradient, 1e9)).shape == (20, 8)  # all is noise: nothing better than every direction


def test_scan_without_a_gradient_knows_nothing() -> None:
    table = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float32)
    nothing = scan(lambda position: table, [(0, 4), (1, 0)], [Release(np.zeros((4, 6)), 0.0)])[0]
    assert not nothing.hits.any()
    np.testing.assert_array_equal(nothing.rank, [6.0, 6.0])
    np.testing.assert_array_equal(nothing.guess, [-1, -1])


def test_more_tokens_than_rank_are_not_read(overrides: list[str]) -> None:
    """r = 2 on two matrices: four directions for ten inputs."""
    small = attack(SENTENCE, [*overrides, "lora.r=2"], seeds=(0,), repeats=1)
    assert small["inputs"] > small["most_tokens"] == 4 and small["scenarios"]["plain"]["rate"] < 1.0
    assert "more than the attack can tell apart" in page(small)


def test_refusals(overrides: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        attack(SENTENCE, [*overrides, "privacy=none"])
    assert refused.value.code == "attack.privacy"
    with pytest.raises(UsageError) as refused:
        attack("  ", overrides)
    assert refused.value.code == "attack.text"


def test_page_is_a_function_of_the_document(document: dict[str, Any]) -> None:
    made = page(document)
    assert made == page(json.loads(json.dumps(document)))
    assert "http" not in made and "src=" not in made and "<script" not in made
    for words in ("claims no more than that", "arXiv 2405.15586", "What this does not show", "本页不说明什么"):
        assert words in made


def test_attack_markup_in_the_text_is_escaped(document: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>"
    row = document["without_dp"][0] | {"token": evil, "guess": evil}
    made = page(document | {"text": evil, "without_dp": [row, *document["without_dp"][1:]]})
    assert "<script" not in made and made.count("&lt;script&gt;") >= 3


def test_page_never_rounds_a_claim(document: dict[str, Any]) -> None:
    """One word of a thousand isn't 0 %, and one missing isn't 100 %."""
    scenarios = dict(document["scenarios"])
    scenarios["noise"] = scenarios["noise"] | {"rate": 0.001}
    scenarios["plain"] = scenarios["plain"] | {"rate": 0.999}
    assert "99 % without, &lt; 1 % with" in page(document | {"scenarios": scenarios})


@pytest.mark.model
def test_minilm_sentence_is_read_at_rank_8(tmp_path: Path) -> None:
    """The claim: 100 % of ten tokens at r = 8 without noise, none of them through the shipped default."""
    settings, contract = prepare(())
    folder, victim = Path(settings.model.path), (TEXT, "lungs")
    site = Site(variant(contract, noise=True, q=1.0), [victim], folder, tmp_path)
    learnt = [(texts[0], label) for label, texts in OTHERS.items()]
    warm = Site(variant(contract, noise=False, q=1.0, batch=len(learnt)), learnt, folder, tmp_path)
    adapter, state = initial(site.spec, 0), np.zeros(site.spec.dim, np.float32)
    for _ in range(4):
        change, state = optimizer(contract.rule.optimizer)(contract.rule, warm.update(adapter), state)
        adapter = site.spec.add(adapter, change)
    vocabulary = Vocabulary(folder, settings.model.max_length)
    tokens = vocabulary.tokens(TEXT)
    open_, noisy = scan(vocabulary.embed, tokens, [Plain(contract, victim, folder).release(adapter), site.release(adapter)])
    assert contract.lora.r == 8 and len(tokens) == 10
    assert open_.hits.all() and not noisy.hits.any()
