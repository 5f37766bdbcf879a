"""What fl-simulate audit and demo-attack write, made up, as the tests of reports need it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from privacy.audit import judge
from tests.privacy.evidence_fixture import SITES, Consortium, contract

CANARY = "canary sentence 7f3a"


def audit(parties: Consortium, noise: float = 1.0) -> dict[str, Any]:
    """What `privacy.audit` itself says of made-up scores at clinic-a; noise: factor on what is claimed."""
    m, rng = contract(parties.signers).mechanism(SITES[0]), np.random.default_rng(0)
    included = np.arange(64) % 2 == 0
    scores = noise * m.sigma * rng.standard_normal((8, 64)) + m.q * included
    found = judge(scores, included, m, alpha=0.01).as_dict()
    return json.loads(json.dumps(found | {"seed": 0, "model": "minilm", "data": "letters", "site": SITES[0],
                                          "unit": "record", "live": False}))


def attack() -> dict[str, Any]:
    """As simulations/attack.py writes it (a real one is read in the tests of simulations)."""
    def rate(recovered: int) -> dict[str, Any]:
        return {"releases": 3, "recovered": recovered, "of": 30, "rate": round(recovered / 30, 4), "median_rank": 1.0}

    token = {"position": 1, "token": CANARY, "guess": CANARY, "distance": 0.0, "ranks": [1.0]}
    return {
        "format": "consilo.attack/1", "attack": "span check", "text": CANARY, "tokens": [CANARY] * 10, "chance": 1 / 30522,
        "model": {"name": "minilm", "digest": "0" * 64, "vocabulary": 30522},
        "adapter": {"r": 8, "targets": ["query", "value"], "layers": [0], "rule": "fedit", "round": 20},
        "mechanism": {"epsilon": 8.0, "delta": 1e-5, "sigma": 1.583, "clip": 5.0, "q": 0.5, "rounds": 20, "retries": 1,
                      "shipped_default": True},
        "most_tokens": 16, "inputs": 12, "others": 16, "seeds": [0, 1, 2], "repeats": 3, "noise": "from a CSPRNG",
        "without_dp": [token], "with_dp": [token],
        "scenarios": {"plain": rate(30), "noise off": rate(29), "noise": rate(0), "noise, whole run": rate(0),
                      "noise, record absent": rate(0), "crowd, noise off": rate(1), "crowd, noise": rate(0)},
        "by_round": [{"round": 1, **rate(0)}], "sweep": [{"sigma": 1e-8, **rate(29)}],
        "favours": ["none"], "not_claimed": [CANARY]}
