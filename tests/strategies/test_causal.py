"""The causal language model: losses and gradients of each record by itself, cached layers, generation, PEFT folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from privacy.compute import Compute
from privacy.contract import ChatTerms, LoraTerms, ModelTerms
from privacy.dpsgd import ClippedGradients
from privacy.engine import Engine, gradients
from privacy.errors import UsageError
from privacy.noise import pitch
from privacy.population import Draw
from strategies.causal import CausalLM, metrics
from strategies.chat import IGNORED
from strategies.examples import InstructionFile, Instructions

LENGTH, ANSWER = 24, 6
PAIRS = [("a cough", "lung: cough"), ("my", "lung"), ("some rash again " * 12, "skin: rash itch blister mole rash itch"),
         ("old child left right night pulse", "heart: pulse"), ("itch", "skin: itch mole"), ("slow breath", "lung: breath")]


def model(folder: Path, *, separator: str | None = ":", **lora: Any) -> CausalLM:
    chat = ChatTerms(max_answer=ANSWER, separator=separator)
    terms = ModelTerms(weights="0" * 64, tokenizer="0" * 64, task="causal_lm", max_length=LENGTH, chat=chat)
    made = CausalLM(folder, terms, chat, LoraTerms.model_validate(
        {"r": 2, "alpha": 8.0, "targets": ("q_proj", "v_proj"), "layers": (-2, -1)} | lora))
    made.load(values(made))
    for p in made.parameters.values():
        p.requires_grad_(True)
    return made


def values(made: CausalLM, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.3, p.shape).astype(np.float32) for name, p in made.parameters.items()}


def instructions(pairs: list[tuple[str, str]]) -> Instructions:
    return Instructions([p for p, _ in pairs], [a for _, a in pairs], np.ones(len(pairs), bool))


@pytest.fixture
def file(tmp_path: Path) -> InstructionFile:
    return write(tmp_path, PAIRS)


def write(folder: Path, pairs: list[tuple[str, str]]) -> InstructionFile:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": a}) + "\n" for p, a in pairs))
    return InstructionFile(path, prompt="prompt", answer="completion")


def everyone(file: InstructionFile) -> NDArray[np.int64]:
    return np.arange(len(file))


def alone(made: CausalLM, folder: Path, adapter: Path, pair: tuple[str, str]) -> tuple[float, NDArray[np.float64]]:
    """Loss and gradient (dim,) of one record, unpadded, through plain PEFT and transformers' own loss, in float64."""
    made.save(adapter, {n: p.detach().numpy() for n, p in made.parameters.items()}, "tiny")
    base = AutoModelForCausalLM.from_pretrained(folder)
    peft = PeftModel.from_pretrained(base, adapter, is_trainable=True).double().eval()
    asked, said = made.chat.prompt(pair[0]), made.chat.answer(pair[1])
    out = peft(input_ids=torch.tensor([asked + said]), labels=torch.tensor([[IGNORED] * len(asked) + said]), use_cache=False)
    out.loss.backward()
    parts = {n.replace(".default.", "."): p.grad for n, p in peft.named_parameters() if p.grad is not None}
    return float(out.loss.detach()), np.concatenate([parts[n].numpy().ravel() for n in made.parameters])


def test_loss_is_the_mean_over_the_records_own_answer_tokens(tiny_llm: Path, tmp_path: Path, file: InstructionFile) -> None:
    made = model(tiny_llm)
    got = made.losses(file)(everyone(file)).detach().numpy()
    want = [alone(made, tiny_llm, tmp_path / "adapter", pair)[0] for pair in PAIRS]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize("engine", ["fused", "opacus"])
def test_gradients_are_those_of_each_record_alone(tiny_llm: Path, tmp_path: Path, file: InstructionFile,
                                                  engine: Engine) -> None:
    """Ragged prompts and answers, one of them cut."""
    want = np.array([alone(model(tiny_llm), tiny_llm, tmp_path / "adapter", pair)[1] for pair in PAIRS])
    made = model(tiny_llm)
    grads = gradients(engine, made.module, made.parameters, made.losses(file))
    got = grads._chunk(everyone(file))
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error.max() < 2e-5


def contributions(made: CausalLM, file: InstructionFile, clip: float, losses: Any = None,
                  rows: Any = None) -> NDArray[np.int64]:
    """int64 (n, dim), in units of the lattice's pitch."""
    grads: ClippedGradients = gradients("fused", made.module, made.parameters, losses or made.losses(file))
    rows = everyone(file) if rows is None else np.asarray(rows)
    return np.concatenate(list(grads.clipped(Draw(rows[:, None], np.ones(len(rows), np.int64)), clip, len(PAIRS))))


def batch_mean(made: CausalLM, file: InstructionFile) -> Any:
    """Planted: each record's loss is divided by the batch's tokens, as transformers' own loss is."""
    turns = made.prepare(file.load())

    def losses(rows: NDArray[np.int64]) -> torch.Tensor:
        batch = turns.take(rows)
        tokens = (batch.rendered.targets != IGNORED).sum()
        return made._entropies(batch).sum(1) / tokens * len(rows)

    return losses


def longest_wins(made: CausalLM, file: InstructionFile) -> Any:
    """Planted: a record's mean is over as many tokens as the batch's longest answer has."""
    turns = made.prepare(file.load())

    def losses(rows: NDArray[np.int64]) -> torch.Tensor:
        batch = turns.take(rows)
        longest = (batch.rendered.targets != IGNORED).sum(1).max()
        return made._entropies(batch).sum(1) / longest

    return losses


def couples(made: CausalLM, file: InstructionFile, losses: Any = None) -> bool:
    """Whether any record's contribution changes when the longest one leaves the batch. The physical batch is filled up by
    repetition, so nothing else changes."""
    whole = contributions(made, file, 1e6, losses)
    without = contributions(made, file, 1e6, losses, [0, 1, 3, 4, 5])
    return not np.array_equal(whole[[0, 1, 3, 4, 5]], without)


def test_no_record_changes_another_ones_contribution(tiny_llm: Path, file: InstructionFile) -> None:
    made = model(tiny_llm)
    assert not couples(made, file)


@pytest.mark.parametrize("plant", [batch_mean, longest_wins])
def test_planted_token_mean_over_the_batch_is_caught(tiny_llm: Path, file: InstructionFile, plant: Any) -> None:
    made = model(tiny_llm)
    assert couples(made, file, plant(made, file))


def test_another_text_in_one_record_changes_no_other_loss(tiny_llm: Path, tmp_path: Path, file: InstructionFile) -> None:
    made = model(tiny_llm)
    before = made.losses(file)(everyone(file))
    changed = [*PAIRS[:2], ("mole " * 40, "heart"), *PAIRS[3:]]
    after = made.losses(write(tmp_path, changed))(everyone(file))
    others = [0, 1, 3, 4, 5]
    assert torch.equal(before[others], after[others])
    assert before[2] != after[2]


@pytest.mark.parametrize("clip", [0.01, 1.0])
def test_a_record_moves_the_clipped_sum_by_at_most_the_clip(tiny_llm: Path, file: InstructionFile, clip: float) -> None:
    made = model(tiny_llm)
    whole = contributions(made, file, clip)
    slack = 0.5 * pitch(clip) * whole.shape[1] ** 0.5
    for left_out in everyone(file):
        rest = contributions(made, file, clip, rows=np.delete(everyone(file), left_out))
        moved = np.linalg.norm((whole.sum(0) - rest.sum(0)) * pitch(clip))
        assert moved <= clip + slack
    assert np.linalg.norm(whole * pitch(clip), axis=1).max() > 0.9 * min(clip, 1.0), "the bound is reached"


def test_a_record_that_cannot_be_rendered_contributes_nothing(tiny_llm: Path, tmp_path: Path) -> None:
    """And the others' contributions are those without it, to the bit."""
    made = model(tiny_llm)
    bad = tmp_path / "bad.jsonl"
    good = [json.dumps({"prompt": p, "completion": a}) for p, a in PAIRS[:2]]
    bad.write_text("\n".join([good[0], '{"prompt": "unspeakable", "completion": "lung"}', '{"prompt": 7, "completion": "x"}',
                              "not json", good[1], '{"prompt": "a cough", "completion": ""}']))
    file = InstructionFile(bad, prompt="prompt", answer="completion")
    assert len(file) == 6
    got = contributions(made, file, 1.0)
    assert not got[[1, 2, 3, 5]].any()
    np.testing.assert_array_equal(got[[0, 4]], contributions(made, write(tmp_path, [PAIRS[0], *PAIRS]), 1.0)[[0, 2]])


@pytest.mark.parametrize("layers", [(-1,), (-2, -1), (0, 1, 2)])
def test_cached_lower_layers_change_no_loss(tiny_llm: Path, file: InstructionFile, layers: tuple[int, ...]) -> None:
    """Kept, or read, rendered and computed anew in each step; the synthetic record is the row after the last."""
    made, whole = model(tiny_llm, layers=layers), model(tiny_llm, layers=(0, 1, 2))
    assert (made.prepare(instructions(PAIRS)).hidden is None) == (0 in layers)
    whole.load({n: made.parameters[n].detach().numpy() if n in made.parameters else np.zeros(p.shape, np.float32)
                for n, p in whole.parameters.items()})
    kept, anew, through = made.losses(file), made.losses(file, Compute(cache_mib=0)), whole.losses(file)
    for rows in (everyone(file)[::-1].copy(), np.array([len(file)] * 2)):
        want = through(rows).detach()
        np.testing.assert_allclose(kept(rows).detach(), want, rtol=1e-5)
        np.testing.assert_allclose(anew(rows).detach(), want, rtol=1e-5)


def test_saved_folder_gives_the_same_logits_through_peft(tiny_llm: Path, tmp_path: Path) -> None:
    made = model(tiny_llm)
    made.save(tmp_path / "adapter", values(made), "tiny-llm")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "tiny-llm")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llm), tmp_path / "adapter").eval()
    turns = made.prepare(instructions(PAIRS))
    with torch.no_grad():
        whole = loaded(input_ids=turns.rendered.ids, attention_mask=turns.rendered.mask).logits
        got = made.module(turns)
    want = whole.gather(1, turns.rendered.at[..., None].expand(-1, -1, whole.shape[-1]))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_generation_is_greedy_and_each_answer_its_own(tiny_llm: Path, tmp_path: Path) -> None:
    """As transformers generates from each prompt alone, without filler; then the module trains on as before."""
    made = model(tiny_llm)
    turns = made.prepare(instructions(PAIRS))
    before = made.each(turns)
    prompts = [p for p, _ in PAIRS]
    got = made.generate(prompts)
    made.save(tmp_path / "adapter", values(made), "tiny-llm")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llm), tmp_path / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    for prompt, said in zip(prompts, got, strict=True):
        ids = torch.tensor([made.chat.prompt(prompt)])
        out = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False,
                            pad_token_id=tokenizer.eos_token_id)[0, ids.shape[1]:].tolist()
        assert said == made.chat.text(out)
    assert len(set(got)) > 1
    assert torch.equal(made.each(turns), before)


def test_measures(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(tiny_llm)
    pairs = [*PAIRS[:1], *PAIRS[3:6]]
    records = Instructions([p for p, _ in pairs] + [""], [a for _, a in pairs] + [""], np.array([True] * 4 + [False]))
    monkeypatch.setattr(made, "generate", lambda prompts: ["lung: cough", "heart: chest", "itch", "lung: breath"])
    found = made.measure(records)()
    assert (found["exact_match"], found["prefix_match"]) == (0.5, 0.75)
    turns = made.prepare(instructions(pairs))
    tokens = (turns.rendered.targets != IGNORED).sum(1)
    assert found["answer_nll"] == pytest.approx(float((made.each(turns).detach() * tokens).sum() / tokens.sum()), rel=1e-5)
    assert tuple(found) == metrics(made.terms) == ("prefix_match", "exact_match", "answer_nll")
    assert metrics(model(tiny_llm, separator=None).terms) == ("exact_match", "answer_nll")


def test_targets_of_another_family_are_refused_by_name(tiny_llm: Path) -> None:
    with pytest.raises(UsageError, match="query") as caught:
        model(tiny_llm, targets=("query",))
    assert caught.value.code == "lora.targets"
