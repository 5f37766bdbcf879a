"""PEFT's state dicts: every key checked both ways, where PEFT itself loads wrong ones in silence."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft_kit as kit
import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.numpy import save_file

from privacy.errors import Refused, UsageError
from strategies.codec import peft_spec, read, read_folder, write

Change = Callable[[kit.Tensors], kit.Tensors]


@pytest.fixture(params=kit.KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return kit.peft_model(request.param)


def tensors(model: Any) -> kit.Tensors:
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in peft_spec(model).shapes}


def other_layer(t: kit.Tensors) -> kit.Tensors:
    return {n.replace(".0.", ".7."): v for n, v in t.items()}


def prefix_lost(t: kit.Tensors) -> kit.Tensors:
    return {n.removeprefix("base_model.model."): v for n, v in t.items()}


def other_case(t: kit.Tensors) -> kit.Tensors:
    return {n.replace("lora_B", "lora_b"): v for n, v in t.items()}


def one_missing(t: kit.Tensors) -> kit.Tensors:
    return dict(list(t.items())[1:])


def one_more(t: kit.Tensors) -> kit.Tensors:
    return {**t, "base_model.model.smuggled.lora_A.weight": next(iter(t.values()))}


WRONG = [other_layer, prefix_lost, other_case, one_missing, one_more]


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.case(13)
def test_wrong_keys_load_silently_in_peft_and_are_refused_here(model: Any, change: Change) -> None:
    right = tensors(model)
    wrong = change(right)
    before = read(model)
    set_peft_model_state_dict(model, {n: torch.from_numpy(v) for n, v in wrong.items()})  # no error
    silent = read(model)
    assert change is one_more or any(silent[n].tobytes() != right[n].tobytes() for n in right)
    write(model, before)
    with pytest.raises(Refused) as caught:
        write(model, wrong)
    assert caught.value.code == "adapter.tensor"
    assert any(name in caught.value.cause for name in wrong.keys() ^ right.keys())
    assert all(v.tobytes() == before[n].tobytes() for n, v in read(model).items())


@pytest.mark.case(13)
def test_wrong_shape_type_or_value_is_refused(model: Any) -> None:
    right = tensors(model)
    name = next(iter(right))
    for bad in (right[name].T, right[name].astype(np.float64), right[name] * np.float32("inf"), right[name][:1]):
        with pytest.raises(Refused, match="lora_A"):
            write(model, {**right, name: bad})


def test_write_and_read_are_inverse_and_order_does_not_matter(model: Any) -> None:
    right = tensors(model)
    write(model, dict(reversed(right.items())))
    assert list(read(model)) == sorted(right)
    assert all(v.tobytes() == right[n].tobytes() for n, v in read(model).items())


def test_what_was_read_is_a_copy(model: Any) -> None:
    right = tensors(model)
    write(model, right)
    before = read(model)
    write(model, {n: v + 1 for n, v in right.items()})
    assert all(v.tobytes() == right[n].tobytes() for n, v in before.items())


def test_tensor_that_peft_rounds_is_found(model: Any) -> None:
    """A model in half precision takes the values, and not all of their bits."""
    right = tensors(model)
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    with pytest.raises(Refused, match="bfloat16"):
        write(model, right)


LYING = {
    "larger than the file": {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
    "overlapping": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
    "a shape that its bytes are not": {"a": {"dtype": "F32", "shape": [1 << 30, 1 << 30], "data_offsets": [0, 12]}},
    "a product that overflows": {"a": {"dtype": "F32", "shape": [1 << 63, 2], "data_offsets": [0, 12]}},
    "before the start": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [-4, 8]}},
}


@pytest.mark.parametrize("lie", [*LYING, "a header of an exabyte"])
def test_case_14_a_header_that_lies_is_refused_before_anything_is_allocated(lie: str, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    header = json.dumps(LYING.get(lie, {})).encode()
    size = len(header) if lie in LYING else 1 << 60
    (tmp_path / "adapter_model.safetensors").write_bytes(size.to_bytes(8, "little") + header + bytes(12))
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match=r"adapter\.format"):
            read_folder(tmp_path, peft_spec(model))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_peft_folder_is_read_with_its_variant_and_keys_checked(model: Any, tmp_path: Path) -> None:
    right = tensors(model)
    write(model, right)
    model.save_pretrained(tmp_path)
    spec = peft_spec(model)
    assert all(v.tobytes() == right[n].tobytes() for n, v in read_folder(tmp_path, spec).items())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for file, content, code in (
            ("adapter_config.json", json.dumps(config | {"use_dora": True}), "adapter.variant"),
            ("adapter_config.json", "[1]", "adapter.format"), ("adapter_config.json", "{", "adapter.format"),
            ("adapter_model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}", "adapter.format"),
            ("adapter_model.safetensors", b"PK\x03\x04 a pickle", "adapter.format")):
        good = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(Refused) as caught:
            read_folder(tmp_path, spec)
        assert caught.value.code == code
        (tmp_path / file).write_bytes(good)
    for change in WRONG:
        save_file({n: np.ascontiguousarray(v) for n, v in change(right).items()}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(Refused) as caught:
            read_folder(tmp_path, spec)
        assert caught.value.code == "adapter.tensor"
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match=r"file\.missing"):
        read_folder(tmp_path, spec)
