"""The model: cached lower layers, PEFT folders that load elsewhere, digests, and folders that are refused unopened."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from fl_client.control_transfer import adapter_tensors_digest
from privacy.contract import Contract, LoraTerms, ModelTerms
from privacy.errors import ConsiloError, Refused, UsageError
from strategies.adapter import HEAD, initial
from strategies.classifier import ENCODE_BATCH, TextClassifier
from strategies.folder import TOKENIZER_FILES, check_folder, folder_digests
from strategies.model import build

TEXTS = ["a cough", "", "my chest hurt very much since monday and my breath is slow " * 3, "rash ?!", "pulse pulse"]
CLASSES = 3


def classifier(folder: Path, *, pooling: str = "mean", **lora: Any) -> TextClassifier:
    terms = ModelTerms.model_validate({"weights": "0" * 64, "tokenizer": "0" * 64, "max_length": 16, "pooling": pooling})
    return TextClassifier(folder, terms, LoraTerms.model_validate({"r": 2, "alpha": 8.0} | lora), CLASSES)


def values(made: TextClassifier, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.3, p.shape).astype(np.float32) for name, p in made.parameters.items()}


def plain_logits(folder: Path, adapter: Path, texts: Sequence[str], pooling: str) -> NDArray[np.float32]:
    """The published folder under plain PEFT, every layer run, with pooling and head written out."""
    tokens = AutoTokenizer.from_pretrained(folder)(list(texts), padding="max_length", truncation=True, max_length=16,
                                                   return_tensors="pt")
    head = load_file(adapter / "head.safetensors")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), adapter).eval()
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state.numpy()
    mask = tokens["attention_mask"].numpy()[..., None]
    pooled = out[:, 0] if pooling == "cls" else (out * mask).sum(1) / mask.sum(1)
    pooled = pooled / np.linalg.norm(pooled, axis=1, keepdims=True) * 10.0
    logits: NDArray[np.float32] = pooled @ head["weight"].T + head["bias"]
    return logits


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("layers", [(-1,), (0,), (0, 1), (-2, -1)])
def test_cached_lower_layers_give_the_logits_of_the_plain_model(tiny_model: Path, tmp_path: Path, pooling: str,
                                                                layers: tuple[int, ...]) -> None:
    made = classifier(tiny_model, pooling=pooling, layers=layers)
    tensors = values(made)
    made.load(tensors)
    got = made.logits(made.encode(TEXTS))
    made.save(tmp_path / "adapter", tensors, "tiny")
    np.testing.assert_allclose(got, plain_logits(tiny_model, tmp_path / "adapter", TEXTS, pooling), atol=1e-5)
    assert got.shape == (len(TEXTS), CLASSES)


def test_encoding_again_after_training_starts_from_the_base(tiny_model: Path) -> None:
    """`encode` puts the full layers back: adapter values and earlier batches change nothing."""
    made = classifier(tiny_model)
    first = made.encode(TEXTS)
    made.load(values(made))
    made.logits(first)
    assert torch.equal(made.encode(TEXTS).hidden, first.hidden)


def test_no_bit_of_an_encoding_depends_on_the_other_records(tiny_model: Path) -> None:
    made, shapes = classifier(tiny_model), set()
    made.peft.register_forward_pre_hook(lambda _, args, given: shapes.add(given["input_ids"].shape), with_kwargs=True)
    alone = made.encode(TEXTS[2:3]).hidden
    for n in (1, ENCODE_BATCH - 1, ENCODE_BATCH, ENCODE_BATCH + 3):
        batch = made.encode([*["a rash"] * n, TEXTS[2]])
        assert len(batch.hidden) == n + 1
        assert torch.equal(batch.hidden[-1:], alone)
    assert shapes == {(ENCODE_BATCH, 16)}, "float sums depend on a batch's shape"


def test_layers_count_from_the_top_when_negative(tiny_model: Path) -> None:
    assert classifier(tiny_model, layers=(-1, 1)).adapted == [1]
    assert list(classifier(tiny_model, layers=(-2,)).parameters) == list(classifier(tiny_model, layers=(0,)).parameters)
    assert all("layer.1." in n for n in classifier(tiny_model).parameters if n not in HEAD)


@pytest.mark.parametrize("layer", [2, -3])
def test_layer_that_does_not_exist_is_refused(tiny_model: Path, layer: int) -> None:
    with pytest.raises(UsageError, match=str(layer)) as caught:
        classifier(tiny_model, layers=(layer,))
    assert caught.value.code == "lora.layers"


@pytest.mark.parametrize("targets", [("quarry",), ("query", "valeu")])
def test_unknown_target_is_refused_by_name(tiny_model: Path, targets: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=targets[-1]) as caught:
        classifier(tiny_model, targets=targets)
    assert caught.value.code == "lora.targets"


def test_rank_above_the_layers_width_is_refused(tiny_model: Path) -> None:
    """The start has orthonormal rows; there are no more of them than columns."""
    assert classifier(tiny_model, r=32).parameters
    with pytest.raises(UsageError) as caught:
        classifier(tiny_model, r=33)
    assert caught.value.code == "lora.rank"


def test_spec_is_ordered_with_the_head_last(tiny_model: Path) -> None:
    made = classifier(tiny_model)
    spec = made.spec(lambda name: ".lora_A." not in name)
    names = [name for name, _ in spec.shapes]
    assert names[-2:] == list(HEAD)
    assert names[:-2] == sorted(names[:-2])
    assert spec.dim == sum(p.numel() for n, p in made.parameters.items() if ".lora_A." not in n)
    made.load(initial(spec, 0))
    assert not made.logits(made.encode(TEXTS)).any(), "a fresh head says nothing"


def test_base_weights_are_frozen(tiny_model: Path) -> None:
    made = classifier(tiny_model)
    trained = {id(p) for p in made.parameters.values()}
    assert all(id(p) in trained or not p.requires_grad for p in made.module.parameters())


# What is published


@pytest.mark.filterwarnings("error::UserWarning")
def test_saved_folder_loads_through_peft_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    made = classifier(tiny_model, layers=(0, 1))
    tensors = values(made)
    made.save(tmp_path / "adapter", tensors, "tiny-encoder")
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), tmp_path / "adapter")
    result = loaded.load_adapter(tmp_path / "adapter", "again")
    assert not [key for key in result.missing_keys if "lora" in key]
    assert not result.unexpected_keys
    state = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    lora = {n: v for n, v in tensors.items() if n not in HEAD}
    assert state.keys() == lora.keys()
    assert all(state[n].numpy().tobytes() == v.tobytes() for n, v in lora.items())
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors",
                                                                   "head.safetensors"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-encoder"
    assert str(tiny_model) not in json.dumps(config)


# Folders that are refused


class Boom:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
@pytest.mark.case(15)
def test_pickled_weights_are_refused_unopened(folder: Path, name: str, tiny_contract: Callable[..., Contract]) -> None:
    marker = folder.parent / "opened"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Boom(marker)))
    for use in (folder_digests, lambda f: build(f, tiny_contract())):
        with pytest.raises(Refused) as caught:
            use(folder)
        assert caught.value.code == "model.pickle"
    assert not marker.exists()


LYING = {
    "past the end": {"a": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 22]}},
    "overlapping": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
    "a shape that its bytes are not": {"a": {"dtype": "F32", "shape": [1 << 30, 1 << 30], "data_offsets": [0, 12]}},
    "a product that overflows": {"a": {"dtype": "F32", "shape": [1 << 63, 2], "data_offsets": [0, 12]}},
    "before the start": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [-4, 8]}},
}


@pytest.mark.parametrize("lie", [*LYING, "a header of an exabyte"])
def test_case_14_a_header_that_lies_is_refused_before_anything_is_allocated(lie: str, folder: Path) -> None:
    """Of a base model, and of an adapter that is fetched."""
    header = json.dumps(LYING.get(lie, {})).encode()
    size = len(header) if lie in LYING else 1 << 60
    for name in ("model.safetensors", "adapter_model.safetensors"):
        (folder / name).write_bytes(size.to_bytes(8, "little") + header + bytes(12))
    tracemalloc.start()
    try:
        assert adapter_tensors_digest(folder) == ""
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.unreadable"):
        classifier(folder)


@pytest.mark.case(15)
def test_pickled_weights_beside_safetensors_are_never_opened(folder: Path) -> None:
    marker = folder.parent / "opened"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Boom(marker)))
    classifier(folder)
    assert not marker.exists()


@pytest.mark.parametrize("remove", ["config.json", "model.safetensors"])
def test_folder_that_is_no_model(folder: Path, remove: str) -> None:
    (folder / remove).unlink()
    for path in (folder, folder / "nowhere"):
        with pytest.raises(UsageError) as caught:
            folder_digests(path)
        assert caught.value.code == "model.missing"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.case(10)
def test_changed_model_folder_is_refused(folder: Path, name: str, tiny_contract: Callable[..., Contract]) -> None:
    build(folder, tiny_contract())
    if name == "model.safetensors":
        weights = {n: v.copy() for n, v in load_file(folder / name).items()}
        next(iter(weights.values())).reshape(-1).view(np.uint32)[0] ^= 1
        save_file(weights, folder / name, metadata={"format": "pt"})
    else:
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    with pytest.raises(Refused) as caught:
        build(folder, tiny_contract())
    assert caught.value.code == "model.digest"


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "vocab.txt", "chat_template.jinja",
                                  "spiece.model", "sentencepiece.bpe.model", "more.safetensors"])
def test_smuggled_file_changes_the_digest(folder: Path, name: str) -> None:
    before = folder_digests(folder)
    assert name in TOKENIZER_FILES or name.endswith(".safetensors")
    (folder / name).write_bytes(b"{}")
    assert folder_digests(folder) != before


@pytest.mark.case(10)
def test_the_chat_template_has_a_digest_of_its_own(folder: Path, tiny_contract: Callable[..., Contract]) -> None:
    """A file of its own comes before the tokenizer's configuration; its text counts, wherever it stands."""
    terms = tiny_contract().model
    assert folder_digests(folder).chat_template is None
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    inside = folder_digests(folder)
    assert inside.chat_template is not None
    agreed = terms.model_copy(update=inside._asdict())
    check_folder(folder, agreed)
    for wrong in (None, "0" * 64):
        with pytest.raises(Refused, match=r"model\.digest"):
            check_folder(folder, agreed.model_copy(update={"chat_template": wrong}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert folder_digests(folder).chat_template == inside.chat_template
    (folder / "chat_template.jinja").write_text("{{ messages }}!")
    assert folder_digests(folder).chat_template != inside.chat_template


def test_code_in_a_model_folder_is_never_run(folder: Path) -> None:
    """config.json names a module of the folder: nothing imports it."""
    marker = folder.parent / "imported"
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}
        (folder / name).write_text(json.dumps(config))
    with suppress(ConsiloError, ValueError):
        classifier(folder)
    assert not marker.exists()
