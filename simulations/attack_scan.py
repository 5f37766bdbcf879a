"""The span check of DAGER (Petrov et al., arXiv 2405.15586) on gradients of a first layer's lora_A.

Such a gradient is a sum over tokens of (what flows back) x (the layer's input), so its rows lie in the span of the inputs,
and in layer 0 an input is a row of a public table: LayerNorm(word + position + type). Each word of the vocabulary is tested
for lying in that span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privacy.errors import UsageError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Release:
    """gradient: stacked lora_A rows of one released sum, (rows, width). floor: singular values up to it are noise."""

    gradient: Array
    floor: float


@dataclass(frozen=True)
class Found:
    """What one release betrays of each token, arrays (tokens,).

    rank: of the true token among the vocabulary by distance from the span, 1 the closest, ties at their middle.
    guess: id of the closest one, -1 where no row is left to test with. true, nearest: their distances, 0..1.
    """

    rank: Array
    guess: NDArray[np.int64]
    true: Array
    nearest: Array

    @property
    def hits(self) -> NDArray[np.bool_]:
        return np.asarray(self.rank == 1.0)


def span(release: Release) -> Array:
    """Orthonormal basis of the row space, (width, k): the directions above the noise, or all where none is."""
    if not release.gradient.any():
        return np.zeros((release.gradient.shape[1], 0))
    _, values, rows = np.linalg.svd(release.gradient, full_matrices=False)
    k = int((values > release.floor).sum()) or len(values)
    return np.asarray(rows[:k].T, np.float64)


def scan(embed: Callable[[int], NDArray[np.float32]], tokens: Sequence[tuple[int, int]],
         releases: Sequence[Release]) -> list[Found]:
    """Test the whole vocabulary at each position. embed(position): inputs of layer 0, (vocabulary, width).

    tokens: (position, true id) of what is scored. The distance is |x - Px| / |x| for the projection P onto the span.
    """
    bases = [span(r).astype(np.float32) for r in releases]
    rank, true, nearest = (np.zeros((len(bases), len(tokens))) for _ in range(3))
    guess = np.full((len(bases), len(tokens)), -1, np.int64)
    for t, (position, token) in enumerate(tokens):
        candidates = embed(position)
        candidates = candidates / np.linalg.norm(candidates, axis=1, keepdims=True)
        for b, basis in enumerate(bases):
            inside = np.square(candidates @ basis).sum(1, dtype=np.float64)
            distance = np.sqrt(np.clip(1.0 - inside, 0.0, 1.0))
            closer, ties = (inside > inside[token]).sum(), (inside == inside[token]).sum() - 1
            rank[b, t], true[b, t], nearest[b, t] = 1 + closer + ties / 2, distance[token], distance.min()
            if basis.shape[1]:
                guess[b, t] = int(inside.argmax())
    return [Found(*row) for row in zip(rank, guess, true, nearest, strict=True)]


class Vocabulary:
    """The public half: tokenizer and input embeddings of a BERT folder. Raises UsageError `attack.model`."""

    def __init__(self, folder: Path, max_length: int) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        base = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                                         dtype=torch.float32).eval()
        if base.config.model_type != "bert":
            raise UsageError("attack.model", "The attack knows the input embeddings of BERT models only.",
                             "Leave the model as it is shipped.")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._embeddings, self._length, self.size = base.embeddings, max_length, int(base.config.vocab_size)

    def embed(self, position: int) -> NDArray[np.float32]:
        """What layer 0 gets for each word of the vocabulary at that position, (vocabulary, width)."""
        import torch

        with torch.no_grad():
            ids = torch.arange(self.size)[:, None]
            return np.asarray(self._embeddings(input_ids=ids, position_ids=torch.full_like(ids, position))[:, 0].numpy())

    def tokens(self, text: str) -> list[tuple[int, int]]:
        """(position, id) of the tokens between the two that frame every text. Raises UsageError `attack.text`."""
        ids = self._tokenizer(text, truncation=True, max_length=self._length)["input_ids"]
        if len(ids) < 3:
            raise UsageError("attack.text", "The text has no token.", "Give a sentence of about ten words.")
        return list(enumerate(ids))[1:-1]

    def words(self, ids: Sequence[int]) -> list[str | None]:
        return [None if i < 0 else str(self._tokenizer.convert_ids_to_tokens(int(i))) for i in ids]
