"""The data of `bench strategies`: rated sentences of four kinds as vectors, from an encoder that stays as it is.

From the VADER corpora (Hutto and Gilbert, ICWSM 2014): movie reviews, product reviews, editorials, tweets. A class is a
kind and the sign of its mean rating; a rating of 0 has no sign and is left out. The vectors are all-MiniLM-L6-v2's: mean
over the tokens, of length 1. They are computed once and kept in the cache, by the pins of model and sentences.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.fetch import TABLE, fetch

ARCHIVE = "hutto_ICWSM_2014"
KINDS = {"movie": "movieReviewSnippets", "product": "amazonReviewSnippets", "editorial": "nytEditorialSnippets",
         "tweet": "tweets"}
CLASSES = tuple(f"{kind} {sign}" for kind in KINDS for sign in ("negative", "positive"))
MAX_TOKENS, BATCH = 64, 64


@dataclass(frozen=True)
class Sentences:
    """vectors: float32 (n, width). labels: int64 (n,), indices into CLASSES."""

    vectors: NDArray[np.float32]
    labels: NDArray[np.int64]


def load() -> Sentences:
    """From the cache; else fetched and encoded now (about three CPU-minutes). Raises as `fetch`."""
    folder = fetch("sentences")
    file = folder / f"vectors-{TABLE['minilm'].sha256[:16]}.npz"
    if not file.is_file():
        texts, labels = read(folder / f"{ARCHIVE}.tar.gz")
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, vectors=encode(texts, fetch("minilm")), labels=labels)
        partial.replace(file)
    with np.load(file, allow_pickle=False) as kept:  # noqa: TID251
        return Sentences(kept["vectors"], kept["labels"])


def read(archive: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Sentences and their classes, in the files' order. archive: the corpora's own, inside the package."""
    texts, labels = list[str](), list[int]()
    with tarfile.open(archive, "r:gz") as t:
        for at, name in enumerate(KINDS.values()):
            content = t.extractfile(f"{ARCHIVE}/{name}_GroundTruth.txt")
            if content is None:
                raise ValueError(f"{name} is no regular file")
            for line in content.read().decode("utf-8").splitlines():
                _, rating, text = line.split("\t", 2)
                if float(rating):
                    texts.append(text)
                    labels.append(2 * at + (float(rating) > 0))
    return texts, np.array(labels, np.int64)


def encode(texts: list[str], model: Path) -> NDArray[np.float32]:
    """Vectors of length 1, float32 (n, width)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    encoder: Any = AutoModel.from_pretrained(model, local_files_only=True, trust_remote_code=False, use_safetensors=True)
    encoder.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    out = np.empty((len(texts), encoder.config.hidden_size), np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            rows = order[start:start + BATCH]
            tokens = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=MAX_TOKENS,
                               return_tensors="pt")
            weight = tokens["attention_mask"][..., None]
            mean = (encoder(**tokens).last_hidden_state * weight).sum(1) / weight.sum(1)
            out[rows] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return out
