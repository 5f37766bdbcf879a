"""Prompt and answer as tokens: the published rule, to the token; templates that are refused; what can't be rendered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from privacy.contract import ChatTerms
from privacy.errors import Refused, UsageError
from strategies.chat import IGNORED, ChatRenderer
from strategies.examples import Instructions

LENGTH, ANSWER = 16, 6


@pytest.fixture
def tokenizer(tiny_llm: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llm)


def terms(**changes: Any) -> ChatTerms:
    return ChatTerms(**{"max_answer": ANSWER, **changes})


def records(*pairs: tuple[str, str], valid: bool = True) -> Instructions:
    return Instructions([p for p, _ in pairs], [a for _, a in pairs], np.full(len(pairs), valid))


def read(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids))


def test_a_short_record_is_prompt_answer_end_and_filler_at_the_right(tokenizer: Any) -> None:
    made = ChatRenderer(tokenizer, terms(), LENGTH).render(records(("a cough", "lung: cough")))
    used = int(made.mask.sum())
    assert made.ids.shape == made.mask.shape == (1, LENGTH)
    assert made.mask[0].tolist() == [1] * used + [0] * (LENGTH - used)
    assert read(tokenizer, made.ids[0, :used]) == (
        "<|im_start|>user\na cough<|im_end|>\n<|im_start|>assistant\nlung: cough<|im_end|>")
    assert made.at.shape == made.targets.shape == (1, ANSWER)
    targets = made.targets[0][made.targets[0] != IGNORED]
    assert read(tokenizer, targets) == "lung: cough<|im_end|>"
    places = made.at[0, :len(targets)]
    assert made.ids[0, places + 1].tolist() == targets.tolist(), "each target is the token after its place"


def test_a_system_message_of_the_contract_comes_first(tokenizer: Any) -> None:
    made = ChatRenderer(tokenizer, terms(system="answer my child"), 32).render(records(("a cough", "lung")))
    assert read(tokenizer, made.ids[0]).startswith(
        "<|im_start|>system\nanswer my child<|im_end|>\n<|im_start|>user\na cough")


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end(tokenizer: Any) -> None:
    prompt, answer = " ".join(f"{w} " for w in ("night", "day") * 9) + "cough", "lung: cough breath wheeze air slow fast"
    made = ChatRenderer(tokenizer, terms(), LENGTH)
    asked, said = made.prompt(prompt), made.answer(answer)
    assert len(asked) == LENGTH - ANSWER
    assert read(tokenizer, asked).endswith("cough<|im_end|>\n<|im_start|>assistant\n")
    assert read(tokenizer, said) == "lung: cough breath wheeze<|im_end|>", "five tokens of the answer, and the end"
    row = made.render(records((prompt, answer)))
    assert row.ids[0].tolist() == asked + said
    assert row.mask.all()


def test_the_prompt_is_cut_alike_for_every_answer_and_for_generation(tokenizer: Any) -> None:
    """What is cut depends on public lengths alone: with a short answer there would be room for more."""
    made, prompt = ChatRenderer(tokenizer, terms(), LENGTH), "night day " * 9
    row = made.render(records((prompt, "lung")))
    asked = made.prompt(prompt)
    assert row.ids[0, :len(asked)].tolist() == asked
    ids, mask = made.left_padded([prompt, "a cough"])
    assert ids[0].tolist() == asked
    assert ids[1][mask[1].bool()].tolist() == made.prompt("a cough")
    assert mask[1].tolist() == sorted(mask[1].tolist()), "filler is at the left"


def test_generated_text_ends_at_the_end_token(tokenizer: Any) -> None:
    made = ChatRenderer(tokenizer, terms(), LENGTH)
    assert made.text([*made.answer("lung: cough"), *made.answer("skin")]) == "lung: cough"
    assert made.text(made.answer("lung: cough")[:-1]) == "lung: cough"


def test_what_cannot_be_rendered_is_the_synthetic_record_and_counts_nothing(tokenizer: Any) -> None:
    made = ChatRenderer(tokenizer, terms(), LENGTH).render(records(("a cough", "lung"), ("unspeakable", "lung")))
    assert made.valid.tolist() == [1.0, 0.0]
    blank = ChatRenderer(tokenizer, terms(), LENGTH).render(records(("", ""), valid=False))
    assert blank.valid.tolist() == [0.0]
    assert made.ids[1].tolist() == blank.ids[0].tolist()


def test_a_plain_template_of_the_contract_replaces_the_models(tokenizer: Any) -> None:
    """No code in it: what looks like a template language is text."""
    made = ChatRenderer(tokenizer, terms(plain="{{ 7 * 7 }} {prompt} :"), 32)
    assert read(tokenizer, made.prompt("a cough")).endswith(" a cough :")
    assert "49" not in read(tokenizer, made.prompt("a cough"))


def test_a_model_without_template_is_refused_unless_the_contract_has_one(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(Refused, match="chat template") as caught:
        ChatRenderer(tokenizer, terms(), LENGTH)
    assert caught.value.code == "chat.template"
    assert "{prompt}" in caught.value.mend
    assert ChatRenderer(tokenizer, terms(plain="{prompt} :"), LENGTH).prompt("a cough")


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{% for", "{{ messages[9].content }}"],
                         ids=["raises", "syntax", "index"])
def test_a_template_that_renders_nothing_fails_at_the_start(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UsageError) as caught:
        ChatRenderer(tokenizer, terms(), LENGTH)
    assert caught.value.code == "chat.render"


def test_a_template_runs_in_a_sandbox(tokenizer: Any, tmp_path: Path) -> None:
    """The folder is the site's own, but even so its template reaches nothing of Python."""
    marker = tmp_path / "ran"
    tokenizer.chat_template = ("{% set g = cycler.__init__.__globals__ %}{{ g.os.system('touch " + str(marker) + "') }}"
                               "{{ messages[0].content }}")
    with pytest.raises(UsageError):
        ChatRenderer(tokenizer, terms(), LENGTH)
    assert not marker.exists()


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UsageError) as caught:
        ChatRenderer(tokenizer, terms(), LENGTH)
    assert caught.value.code == "chat.end"


@pytest.mark.parametrize("change", [
    pytest.param(lambda m: {**m, "chat": None}, id="no chat"),
    pytest.param(lambda m: {**m, "task": "classification"}, id="task"),
    pytest.param(lambda m: {**m, "max_length": ANSWER}, id="no room"),
    pytest.param(lambda m: {**m, "chat": {"plain": "no place"}}, id="no prompt"),
    pytest.param(lambda m: {**m, "chat": {"plain": "{prompt}", "system": "both"}}, id="both")])
def test_terms_that_do_not_fit_are_refused(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from privacy.contract import ModelTerms, validate

    good = {"weights": "0" * 64, "tokenizer": "0" * 64, "task": "causal_lm", "max_length": LENGTH,
            "chat": {"max_answer": ANSWER}}
    validate(ModelTerms, good)
    with pytest.raises(UsageError, match=r"config\.invalid"):
        validate(ModelTerms, change(good))
