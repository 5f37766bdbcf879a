"""A model and data small enough for an audit in seconds: a random BERT of two layers, texts of random words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from conf.settings import DataSettings, ModelSettings, Settings, SiteDeclaration

SITE = "site"
LABELS = tuple(f"class {i}" for i in range(8))
WORDS = tuple(f"w{i}" for i in range(50))
WIDTH = 32  # with the labels, 256 weights in the head: so many canaries at most
RECORDS = 100
LENGTH = 8  # tokens


def tiny(settings: Settings, folder: Path) -> Settings:
    """The same settings on a model and one site's records, written to `folder`."""
    model, data = folder / "model", folder / "records.jsonl"
    _model(model)
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS, 5)), "label": str(rng.choice(LABELS))} for _ in range(RECORDS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settings.model_copy(update={
        "model": ModelSettings(name="tiny", path=str(model), max_length=LENGTH),
        "data": DataSettings(name="random words", labels=LABELS, sites={SITE: SiteDeclaration(file=str(data))}),
        # one site has no one to hide its sum among
        "secure_aggregation": settings.secure_aggregation.model_copy(update={"enabled": False})})


def _model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pad, unknown = "[PAD]", "[UNK]"
    vocab = {word: i for i, word in enumerate((pad, unknown, *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=unknown))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(vocab), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=2 * WIDTH, max_position_embeddings=16)).save_pretrained(folder)
