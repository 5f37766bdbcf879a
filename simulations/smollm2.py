"""SmolLM2-135M-Instruct as a Hugging Face folder: the package's GGUF file, dequantised once and kept as bfloat16.

The weights are those of 4-bit blocks, so they are not the published model's to the last digit. transformers reads the file
but can't save what it read, so the tensors go into a fresh model. Same input and versions, same bytes: digests agree
everywhere.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from privacy.errors import UsageError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "model.safetensors"


def convert(folder: Path) -> None:
    """Write config, bfloat16 weights (269 MB), tokenizer and chat template beside the GGUF file, unless they are newer than
    it. 25 s and 1.4 GB of memory. Raises UsageError `fetch.gguf` where the package gguf isn't installed."""
    source, weights = folder / GGUF, folder / WEIGHTS
    if weights.is_file() and weights.stat().st_mtime_ns >= source.stat().st_mtime_ns:
        return
    try:
        import gguf  # noqa: F401
    except ImportError as e:
        raise UsageError("fetch.gguf", "SmolLM2 comes as a GGUF file, and the package gguf is not installed.",
                         "Install consilo[sim].") from e
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, local_files_only=True, dtype=torch.float32)
        config = read.config
        del config.quantization_config
        made = LlamaForCausalLM(config)
        made.load_state_dict(read.state_dict())
        made.to(torch.bfloat16).save_pretrained(scratch)
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, local_files_only=True).save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir(), key=lambda f: f.name == WEIGHTS):  # the weights last: then all is there
            file.chmod(0o644)
            shutil.move(file, folder / file.name)
    weights.touch()
