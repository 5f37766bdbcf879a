"""FedProx and the norm's limit in the product's trainer: both after clip and noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_client.training import LocalTrainer
from privacy.contract import Contract
from privacy.errors import UsageError
from strategies.adapter import initial
from strategies.base import setup
from strategies.rules import RULES

Make = Callable[..., Contract]


@pytest.fixture
def change(tiny_model: Path, tiny_data: dict[str, Path], tiny_contract: Make) -> Callable[..., NDArray[np.float32]]:
    def run(steps: int = 1, **rule: Any) -> NDArray[np.float32]:
        contract = tiny_contract(privacy={"trust": "none", "epsilon": None, "q": 1.0, "local_steps": steps},
                                 site={"sigma": 0.0}, rule={"local_lr": 0.5, **rule})
        trainer = LocalTrainer(contract, "site-a", model=tiny_model, data=tiny_data["site-a"], text="text", label="label")
        return trainer.train(initial(trainer.spec, 0), 1)

    return run


def test_prox_pulls_each_step_after_the_first(change: Callable[..., NDArray[np.float32]]) -> None:
    first, plain, pulled = change(1), change(2), change(2, mu=0.4)
    np.testing.assert_array_equal(change(1, mu=0.4), first)  # nothing to pull yet
    np.testing.assert_allclose(pulled - plain, -0.5 * 0.4 * first, atol=1e-6)
    assert np.abs(first).max() > 1e-3


def test_setup_of_a_contract(tiny_model: Path, tiny_contract: Make) -> None:
    from strategies.model import build

    ranks = [{"site": "site-b", "r": 1}]
    contract = tiny_contract(rule={"name": "hetero", "ranks": ranks, "byzantine": 2}, lora={"seed": 4})
    classifier = build(tiny_model, contract)
    made = setup(RULES["hetero"], contract, classifier.spec(lambda _: True))
    assert (made.ranks, made.rank, made.seed, made.byzantine, made.range) == ((2, 1, 2), 2, 4, 2, 10.0)
    assert made.max_norm > 2 * contract.privacy.clip
    assert setup(RULES["ffa"], tiny_contract(rule={"max_norm": 3.0}), made.spec).max_norm == 3.0
    for name, bad in (("hetero", {"site": "site-x", "r": 1}), ("hetero", {"site": "site-a", "r": 3}), ("ffa", ranks[0])):
        with pytest.raises(UsageError) as caught:
            setup(RULES[name], tiny_contract(rule={"ranks": [bad]}), made.spec)
        assert caught.value.code == "rule.rank"
    with pytest.raises(UsageError, match=r"encoding\.range.*head\.bias"):
        setup(RULES["ffa"], tiny_contract(secagg={"ranges": [{"tensor": "hed.bias", "range": 2.0}]}), made.spec)
