"""CASES 38: what isn't tagged can't be put into a message, by type and at run time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fl_client.app import StageRefused
from fl_client.exit import Charge, DpReleased, LocalOnly, Outgoing, System, unwrap
from fl_client.replies import Replies
from privacy.contract import Contract
from privacy.errors import Refused, SiteCode


@pytest.fixture
def charge(tiny_contract: Any) -> Charge:
    return Charge(tiny_contract(), 1, 0, 3)


def test_tagged_values_leave(charge: Charge) -> None:
    y = np.zeros(3, np.uint32)
    assert unwrap(Outgoing(System(b"m1")))[0] == b"m1"
    assert unwrap(Outgoing(DpReleased(b"m5", charge), {"y": DpReleased(y, charge)}))[1]["y"] is y


@pytest.mark.parametrize("body", [b"raw", "text", 0.93, LocalOnly(b"loss"), System("text"), None])
@pytest.mark.case(38)
def test_untagged_body_is_refused(body: Any) -> None:
    with pytest.raises(Refused, match=r"exit\.untagged"):
        Outgoing(body)


@pytest.mark.parametrize("value", [np.zeros(2, np.float32), LocalOnly(np.zeros(2, np.float32)), System(b"x"), 3])
@pytest.mark.case(38)
def test_untagged_vector_is_refused(value: Any) -> None:
    with pytest.raises(Refused, match=r"exit\.untagged"):
        Outgoing(System(b""), {"metric": value})


@pytest.mark.case(38)
def test_a_forged_charge_is_none(charge: Charge) -> None:
    with pytest.raises(Refused, match=r"exit\.untagged"):
        Outgoing(System(b""), {"y": DpReleased(np.zeros(2, np.uint32), "paid")})  # type: ignore[arg-type]


def test_a_subclass_is_no_way_round() -> None:
    class Sneaky(LocalOnly, System):
        pass

    with pytest.raises(Refused, match=r"exit\.untagged"):
        Outgoing(Sneaky(b"x"))


@pytest.mark.case(38)
def test_private_update_without_a_charge(tiny_contract: Any) -> None:
    contract: Contract = tiny_contract()
    with pytest.raises(Refused, match=r"exit\.uncharged"):
        Charge(contract, 1, 0, None)


@pytest.mark.parametrize("returned", [(b"body", {}), b"body", {"loss": 0.3}, None])
def test_a_handler_that_returns_anything_else_sends_a_code_only(returned: Any) -> None:
    handler = Replies(lambda: None, lambda code: None).once("train.update", lambda body, arrays: returned)
    with pytest.raises(StageRefused) as caught:
        handler(b"", {})
    assert caught.value.code is SiteCode.FAILED


def test_local_only_values_hide_from_representations() -> None:
    assert "0.93" not in repr(LocalOnly(0.93))
