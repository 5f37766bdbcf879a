"""The coordinator's record of who fell out: each site once at a stage, as the evidence demands."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fl_server.attempt import Lost
from fl_server.round import RoundDriver
from privacy.errors import Aborted, RoundVoid


def test_attack_a_wrong_dealer_that_falls_silent_is_named_once() -> None:
    """A second row for one site and stage would make the whole bundle fail."""
    def unmask() -> None:
        raise Aborted("secagg.forged_share", "No set of shares fits.", "The round is void.")

    driver = RoundDriver.__new__(RoundDriver)
    cohort = [SimpleNamespace(name=name) for name in "abc"]
    driver.lost = [Lost("b", 1, "unmask", "site.unreachable")]
    with pytest.raises(RoundVoid):
        driver._mean(SimpleNamespace(unmask=unmask, suspects=(1, 2), offer=SimpleNamespace(cohort=cohort, pass_no=1)))  # type: ignore[arg-type]
    assert driver.lost == [Lost("b", 1, "unmask", "site.unreachable"), Lost("c", 1, "unmask", "secagg.forged_share")]
