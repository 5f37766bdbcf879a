"""A consortium small enough for every test: a tiny random BERT, three sites' records with a learnable rule, a contract.

tiny_model: Path of a Hugging Face folder (2 layers of width 32). tiny_labels: its classes. tiny_data: CSVs (text,label)
under "site-a", "site-b", "site-c" and "public". tiny_contract: a function that makes a contract on them, sections
changed by keyword: `tiny_contract(privacy={"q": 1.0}, sites=("site-a",))`. tiny_llm, tiny_instructions: the same for a
causal language model (llm_kit.py).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy import __version__
from privacy.contract import Contract, load_contract

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a tiny model's threads only wait for each other; inherited by processes

RULE = {"heart": ("pulse", "chest", "flutter", "valve"), "lung": ("cough", "breath", "wheeze", "air"),
        "skin": ("rash", "itch", "blister", "mole")}
FILLER = ("the", "a", "my", "very", "often", "since", "monday", "again", "hurt", "feel", "strange", "child", "old",
          "left", "right", "slow", "fast", "night", "day", "some", "much", "worse", "better", "and", "with", "no")
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,-?!"
SIZES = {"site-a": 60, "site-b": 70, "site-c": 80, "public": 90}
WIDTH = 32
LAYERS = 2


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ALPHABET, *(f"##{c}" for c in ALPHABET), *FILLER,
             *(word for group in RULE.values() for word in group)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                            sep_token="[SEP]", mask_token="[MASK]").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(vocab), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
                            intermediate_size=2 * WIDTH, max_position_embeddings=64, initializer_range=0.05)
        model = BertModel(config)
        torch.nn.init.normal_(model.embeddings.word_embeddings.weight)  # words outweigh positions: learnable in seconds
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import llm_kit

    words = [*FILLER, *RULE, *(word for group in RULE.values() for word in group)]
    return llm_kit.tiny_llm(tmp_path_factory.mktemp("tiny-llm"), words)


@pytest.fixture(scope="session")
def tiny_instructions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """JSONL files (prompt, completion) under the names of tiny_data and "site-d"."""
    from tests import llm_kit

    return llm_kit.instructions(tmp_path_factory.mktemp("tiny-instructions"), SIZES | {"site-d": 60}, RULE, FILLER)


@pytest.fixture(scope="session")
def tiny_labels() -> tuple[str, ...]:
    return tuple(RULE)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The label is the one whose words occur; each text has one to four of them among up to five others."""
    folder, rng = tmp_path_factory.mktemp("tiny-data"), np.random.default_rng(1)
    files = {name: folder / f"{name}.csv" for name in SIZES}
    for name, path in files.items():
        with path.open("w", newline="", encoding="utf-8") as f:
            write = csv.writer(f).writerow
            write(("text", "label"))
            for _ in range(SIZES[name]):
                label = str(rng.choice(list(RULE)))
                words = [*rng.choice(RULE[label], rng.integers(1, 5)), *rng.choice(FILLER, rng.integers(0, 6))]
                write((" ".join(rng.permutation(words)), label))
    return files


@pytest.fixture(scope="session")
def tiny_contract(tiny_model: Path, tiny_labels: tuple[str, ...]) -> Callable[..., Contract]:
    from strategies.folder import folder_digests

    def make(*, sites: Sequence[str] = ("site-a", "site-b", "site-c"), site: dict[str, Any] | None = None,
             **sections: Any) -> Contract:
        """site: terms of every site. A section given as a dict updates that section; anything else replaces it."""
        from privacy.canonical import canonical
        from privacy.signing import code_digest

        terms: dict[str, Any] = {
            "run": "0" * 32, "purpose": "test", "code_version": __version__,
            "code": code_digest(), "expires": "2099-01-01T00:00:00Z",
            "model": {**folder_digests(tiny_model)._asdict(), "max_length": 16},
            "data": {"name": "tiny", "labels": list(tiny_labels), "floor": 50},
            "lora": {"r": 2, "alpha": 8.0},
            "rule": {},
            "privacy": {"rounds": 2, "physical_batch": 32},
            "secagg": {"threshold": 3, "survivors": 3, "range": 10.0},
            "sites": [{"name": name, "signer": f"{i:064x}", "n_decl": 70, "delta": 1e-5, "sigma": 1.0} | (site or {})
                      for i, name in enumerate(sites)]}
        for name, value in sections.items():
            terms[name] = terms[name] | value if isinstance(value, dict) else value
        if terms["privacy"].get("unit") == "person":
            terms["data"] = {"fields": ["text", "label", "person"]} | terms["data"]
        return load_contract(canonical(terms))

    return make
