"""A model folder's digests: what a contract pins is what a site has, or the round is refused.

The chat template is part of the folder that each site installed itself; a coordinator sends none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from privacy.canonical import digest, labelled_hash
from privacy.contract import ModelTerms
from privacy.errors import Refused, UsageError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
                   "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "added_tokens.json",
                   "chat_template.jinja")


class FolderDigests(NamedTuple):
    """Lowercase hex hashes of a model folder, under the names that they have in a contract."""

    weights: str
    tokenizer: str
    chat_template: str | None


def folder_digests(folder: Path) -> FolderDigests:
    """Over config.json + *.safetensors, over the tokenizer's files, and over its chat template's text, if it has one.

    Raises UsageError `model.missing`, and Refused `model.pickle` for a folder that brings pickled weights only.
    """
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not weights or not (folder / "config.json").is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise Refused("model.pickle", "The model folder holds pickled weights, which are never opened.",
                          "Convert the weights to safetensors.")
        raise UsageError("model.missing", f"{folder.name} is no Hugging Face folder with safetensors weights.",
                         "Give the folder with config.json and *.safetensors.")
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return FolderDigests(_digest([folder / "config.json", *weights]), _digest(tokenizer), _chat_template(folder))


def check_folder(folder: Path, terms: ModelTerms) -> None:
    """Raises Refused `model.digest` when the folder isn't the contract's base model; also as `folder_digests`."""
    if folder_digests(folder) != (terms.weights, terms.tokenizer, terms.chat_template):
        raise Refused("model.digest", "The base model, its tokenizer or chat template differs from the contract's.",
                      "Install the model that the contract names, unchanged.")


def _chat_template(folder: Path) -> str | None:
    """As transformers finds it: a file of its own comes before the tokenizer's configuration."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template: Any = None
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    elif settings.is_file():
        template = json.loads(settings.read_bytes()).get("chat_template")
    return None if template is None else digest(template)


def _digest(files: Sequence[Path]) -> str:
    parts: list[bytes | str | int] = []
    for file in files:
        with file.open("rb") as f:
            parts += [file.name, hashlib.file_digest(f, "sha256").digest()]
    return labelled_hash("consilo files", *parts).hex()
