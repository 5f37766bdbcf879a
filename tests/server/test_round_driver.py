"""The coordinator's record of who fell out: each site once at a stage, as the evidence demands."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fl_server.round import Lost, RoundDriver
from privacy.errors import Aborted


def test_attack_a_wrong_dealer_that_falls_silent_is_named_once() -> None:
    """A second row for one site and stage would make the whole bundle fail."""
    def unmask() -> None:
        raise Aborted("secagg.forged_share", "No set of shares fits.", "The round is void.")

    driver = RoundDriver.__new__(RoundDriver)
    driver._names, driver.lost = ["a", "b", "c"], [Lost("b", "unmask", "site.unreachable")]
    with pytest.raises(Aborted):
        driver._unmask(SimpleNamespace(unmask=unmask, suspects=(1, 2)))  # type: ignore[arg-type]
    assert driver.lost == [Lost("b", "unmask", "site.unreachable"), Lost("c", "unmask", "secagg.forged_share")]
