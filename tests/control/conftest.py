"""A consortium with a finished run, and listeners that serve it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "privacy"))  # evidence_fixture

from control_kit import Running, World, make_world, running


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def control(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Shared by a module's tests, which must leave it as they found it."""
    with running(world, tmp_path_factory.mktemp("control")) as made:
        yield made
