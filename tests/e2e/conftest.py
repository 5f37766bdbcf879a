"""A small federation by configuration alone: three sites on tiny files, a tiny local model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def overrides(tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path]) -> Callable[..., list[str]]:
    """overrides("privacy.rounds=1", ...) -> hydra overrides; later ones win. Output goes to tmp_path/out."""

    def make(*more: str) -> list[str]:
        sites = ",".join(f"{n}:{{file:{p}}}" for n, p in tiny_data.items() if n != "public")
        base = ["model=local", "model.name=tiny", f"model.path={tiny_model}", "model.max_length=16", "data=files",
                "data.name=tiny", f"data.sites={{{sites}}}", f"data.evaluation.file={tiny_data['public']}",
                "privacy.rounds=2", "privacy.retries=1", "server.evaluate_every=1", f"server.out={tmp_path / 'out'}",
                f"server.log={tmp_path / 'log'}",
                f"site.state={tmp_path / 'state'}"]
        changed = {m.split("=")[0] for m in more}
        return [b for b in base if b.split("=")[0] not in changed] + list(more)

    return make
