from __future__ import annotations

from pathlib import Path

import pytest
from harness import Consortium


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    folder: Path = tmp_path_factory.mktemp("consortium")
    return Consortium(folder, 6)
