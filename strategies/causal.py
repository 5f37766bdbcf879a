"""A causal language model with LoRA that learns answers to prompts; a chat of one turn, a mean loss per record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privacy.contract import ChatTerms, LoraTerms, ModelTerms
from strategies.base import Rule
from strategies.chat import IGNORED, SYNTHETIC, ChatRenderer, Rendered
from strategies.examples import Instructions
from strategies.linear import Ffa
from strategies.lora_model import LoraModel, load_base

if TYPE_CHECKING:
    import torch

ENCODE_BATCH = 16
MEASURE_BATCH = 64
PLAIN = Ffa()


@dataclass(frozen=True)
class Turns:
    """rendered: the records as tokens. hidden: float32 (n, length, width), or None, as `LoraModel.below` gives it."""

    rendered: Rendered
    hidden: torch.Tensor | None

    def take(self, rows: NDArray[np.int64] | slice) -> Turns:
        return Turns(self.rendered.take(rows), None if self.hidden is None else self.hidden[rows])


class CausalLM(LoraModel):
    """Built from a contract. rule: its adapter may have a core or a residual beside PEFT's tensors. No head.

    Also raises as `ChatRenderer`.
    """

    task = "CAUSAL_LM"
    encode_batch = ENCODE_BATCH
    synthetic = SYNTHETIC

    def __init__(self, folder: Path, model: ModelTerms, chat: ChatTerms, lora: LoraTerms, rule: Rule = PLAIN) -> None:
        base, tokenizer = load_base("AutoModelForCausalLM", folder)
        self.terms = chat
        self.chat = ChatRenderer(tokenizer, chat, model.max_length)
        super().__init__(base, lora, rule, {})
        self._at: torch.Tensor | None = None
        base.get_output_embeddings().register_forward_pre_hook(self._answers_only)
        self.module = _module(self)

    def prepare(self, records: Instructions) -> Turns:
        rendered = self.chat.render(records)
        return Turns(rendered, self.below(rendered.ids, rendered.mask))

    def each(self, prepared: Turns) -> torch.Tensor:
        """Mean cross entropy over each record's answer tokens."""
        targets = prepared.rendered.targets
        return self._entropies(prepared).sum(1) / (targets != IGNORED).sum(1) * prepared.rendered.valid

    def measure(self, records: Instructions) -> Callable[[], dict[str, float]]:
        """answer_nll: nats per answer token. exact_match: share of greedily generated answers that are the record's, blanks
        at the ends aside. prefix_match, where the contract has a separator: the same of the part before the first one."""
        good = np.flatnonzero(records.valid)
        prompts, answers = [records.prompts[i] for i in good], [records.answers[i].strip() for i in good]
        prepared = self.prepare(Instructions(prompts, answers, np.ones(len(good), bool))) if prompts else None

        def measure() -> dict[str, float]:
            if prepared is None:
                return dict.fromkeys(metrics(self.terms), 0.0)
            said, before = self.generate(prompts), self.terms.separator
            found = {"exact_match": _share(a == b for a, b in zip(said, answers, strict=True)),
                     "answer_nll": self._nll(prepared)}
            if before is not None:
                found["prefix_match"] = _share(a.split(before)[0].strip() == b.split(before)[0].strip()
                                               for a, b in zip(said, answers, strict=True))
            return {name: found[name] for name in metrics(self.terms)}

        return measure

    def generate(self, prompts: Sequence[str]) -> list[str]:
        """Greedy answers of at most max_answer tokens, with a cache of keys and values."""
        import torch

        out: list[str] = []
        with torch.inference_mode(), self.whole():
            for start in range(0, len(prompts), MEASURE_BATCH):
                ids, mask = self.chat.left_padded(prompts[start:start + MEASURE_BATCH])
                out += map(self.chat.text, self._greedy(ids, mask).tolist())
        return out

    def _greedy(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """int64 (n, up to max_answer)."""
        import torch

        said: list[torch.Tensor] = []
        cache, places = None, (mask.cumsum(1) - 1).clamp(min=0)
        while len(said) < self.terms.max_answer:
            result = self.peft(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache,
                               use_cache=True, logits_to_keep=1)
            ids, cache = result.logits[:, -1:].argmax(-1), result.past_key_values
            said.append(ids)
            if bool((torch.cat(said, 1) == self.chat.end).any(1).all()):
                break
            mask, places = torch.cat([mask, torch.ones_like(ids)], 1), places[:, -1:] + 1
        return torch.cat(said, 1)

    def _nll(self, prepared: Turns) -> float:
        import torch

        total = 0.0
        with torch.no_grad():
            for start in range(0, len(prepared.rendered.ids), MEASURE_BATCH):
                total += float(self._entropies(prepared.take(slice(start, start + MEASURE_BATCH))).double().sum())
        return total / int((prepared.rendered.targets != IGNORED).sum())

    def _entropies(self, prepared: Turns) -> torch.Tensor:
        """float32 (n, answer), zero where there is no token."""
        import torch

        logits, targets = self.module(prepared), prepared.rendered.targets
        flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED,
                                                 reduction="none")
        return flat.view(targets.shape)

    def _answers_only(self, _layer: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """The vocabulary is wide: logits are computed where a token of an answer comes next, and nowhere else."""
        if self._at is None:
            return None
        return (args[0].gather(1, self._at[..., None].expand(-1, -1, args[0].shape[-1])),)

    def answers(self, turns: Turns) -> torch.Tensor:
        """Logits, float32 (n, answer, vocabulary)."""
        self.inject(turns.hidden)
        self._at = turns.rendered.at
        try:
            logits: torch.Tensor = self.peft(input_ids=turns.rendered.ids, attention_mask=turns.rendered.mask,
                                             use_cache=False).logits
            return logits
        finally:
            self._at = None


def metrics(terms: ChatTerms) -> tuple[str, ...]:
    """Names of what is measured, the headline first."""
    return (*(["prefix_match"] if terms.separator is not None else []), "exact_match", "answer_nll")


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)


def _module(model: CausalLM) -> Any:
    import torch

    class Answers(torch.nn.Module):
        """Turns -> logits where answers are, float32 (n, answer, vocabulary)."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model.peft

        def forward(self, turns: Turns) -> torch.Tensor:
            return model.answers(turns)

    return Answers()
