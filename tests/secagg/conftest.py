from __future__ import annotations

from functools import cache

import pytest

from simulations.adversary import Consortium


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Twelve sites. Each certificate is checked once: those that become invalid have a consortium of their own."""
    made = Consortium(tmp_path_factory.mktemp("consortium"), 12)
    made.check = cache(made.check)
    return made
