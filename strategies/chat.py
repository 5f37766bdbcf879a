"""A prompt and its answer as tokens of fixed length, by a fixed public rule, and which of them the loss is taken over.

1. The prompt becomes a chat of the contract's system message, if it has one, and one user message, rendered by the model
   folder's chat template (its digest is the contract's) with the start of the assistant's turn; or by the contract's plain
   template, whose {prompt} is replaced. No template comes from a coordinator but that plain text.
2. The answer is its own tokens without special ones, at most max_answer - 1 of them, and the end-of-sequence token.
3. A rendered prompt of more than max_length - max_answer tokens loses those at its BEGINNING, so that any answer fits.
4. Filled up at the right to max_length. One record a row: packing would put another's tokens into its gradient.

The loss is the mean cross entropy over the answer's tokens, of each record by itself. A record that can't be rendered, or
whose prompt or answer is no text, is invalid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privacy.contract import ChatTerms
from privacy.errors import Refused, UsageError
from strategies.examples import Instructions

if TYPE_CHECKING:
    import torch

IGNORED = -100  # target of no token
SYNTHETIC = Instructions(["A synthetic prompt, no one's."], ["No one's answer."], np.ones(1, bool))


@dataclass(frozen=True)
class Rendered:
    """ids, mask: int64 (n, length). at: int64 (n, answer), positions whose next token is the answer's. targets: int64
    (n, answer), those tokens, IGNORED after the end. valid: float32 (n,), 0 or 1; an invalid row is the synthetic one."""

    ids: torch.Tensor
    mask: torch.Tensor
    at: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor

    def take(self, rows: NDArray[np.int64] | slice) -> Rendered:
        return Rendered(*(getattr(self, f.name)[rows] for f in fields(self)))


class ChatRenderer:
    """Raises Refused `chat.template` where neither the model's folder nor the contract has one, UsageError `chat.render`
    where the synthetic record can't be rendered, and `chat.end` for a tokenizer without an end-of-sequence token."""

    def __init__(self, tokenizer: Any, terms: ChatTerms, length: int) -> None:
        self._tokenizer, self._terms, self._length = tokenizer, terms, length
        if terms.plain is None and not tokenizer.chat_template:
            raise Refused("chat.template", "The model's folder has no chat template.",
                          "Set model.chat.plain to a public one, such as 'Question: {prompt}\\nAnswer: '.")
        if tokenizer.eos_token_id is None:
            raise UsageError("chat.end", "The tokenizer has no end-of-sequence token.", "Use a model that has one.")
        self.end = int(tokenizer.eos_token_id)
        self._filler = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        try:
            self._synthetic = self._row(SYNTHETIC.prompts[0], SYNTHETIC.answers[0])
        except Exception as e:
            raise UsageError("chat.render", "The chat template can't render a plain prompt.",
                             "Use the template that belongs to the model, or set model.chat.plain.") from e

    def prompt(self, text: str) -> list[int]:
        """Token ids of the rendered prompt, cut at its beginning to leave room for the longest answer."""
        if self._terms.plain is not None:
            whole = self._terms.plain.replace("{prompt}", text)
        else:
            system = [] if self._terms.system is None else [{"role": "system", "content": self._terms.system}]
            whole = self._tokenizer.apply_chat_template([*system, {"role": "user", "content": text}], tokenize=False,
                                                        add_generation_prompt=True)
        ids: list[int] = self._tokenizer(whole, add_special_tokens=self._terms.plain is not None)["input_ids"]
        return ids[-(self._length - self._terms.max_answer):]

    def answer(self, text: str) -> list[int]:
        own = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*own[:self._terms.max_answer - 1], self.end]

    def render(self, records: Instructions) -> Rendered:
        """At least one record."""
        import torch

        rows, valid = [], []
        for prompt, answer, ok in zip(records.prompts, records.answers, records.valid, strict=True):
            row = self._synthetic
            if ok:
                try:
                    row = self._row(prompt, answer)
                except Exception:  # noqa: BLE001 - a record may raise anything; it contributes zero
                    ok = False
            rows.append(row)
            valid.append(float(ok))
        ids, mask, at, targets = (torch.tensor(column) for column in zip(*rows, strict=True))
        return Rendered(ids, mask, at, targets, torch.tensor(valid))

    def left_padded(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, mask: int64 (n, longest), to generate from."""
        import torch

        rows = [self.prompt(text) for text in prompts]
        longest = max(map(len, rows))
        ids = [[self._filler] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)

    def text(self, ids: Sequence[int]) -> str:
        """Of generated tokens, up to the end-of-sequence token."""
        own = list(ids)
        return str(self._tokenizer.decode(own[:own.index(self.end)] if self.end in own else own,
                                          skip_special_tokens=True)).strip()

    def _row(self, prompt: str, answer: str) -> tuple[list[int], list[int], list[int], list[int]]:
        asked, said = self.prompt(prompt), self.answer(answer)
        ids, spare = asked + said, self._length - len(asked) - len(said)
        first, missing = len(asked) - 1, self._terms.max_answer - len(said)
        return (ids + [self._filler] * spare, [1] * len(ids) + [0] * spare,
                [*range(first, first + len(said)), *[first] * missing], said + [IGNORED] * missing)
