"""What a site sends of its update, as the contract's rule says: the offers that it expects, and the encoded vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_client.app import StageRefused, Vector
from privacy.contract import Contract
from privacy.errors import SiteCode
from privacy.secagg import transcript as tr
from privacy.secagg.messages import Ring
from strategies.adapter import AdapterSpec, Tensors, adapter_digest, initial
from strategies.base import Round, after_training, flatten, segments, setup, unflatten
from strategies.rules import rule


class Sending:
    """One site's side of the rule, for all rounds of one contract. Holds no secret: an update is passed in and out.

    Raises UsageError `rule.*`, `encoding.range`.
    """

    def __init__(self, contract: Contract, site: str, spec: AdapterSpec) -> None:
        self._contract, self._spec = contract, spec
        self._rule = rule(contract.rule.name, secure=contract.secagg.enabled)
        self._setup = setup(self._rule, contract, spec)
        self._terms, names = contract.site(site), [s.name for s in contract.sites]
        self._rank = self._setup.ranks[names.index(site)]
        start = initial(spec, contract.lora.seed)
        self._still = {name: value for name, value in start.items() if not self._rule.changes(name)}
        self.passes = self._rule.passes(self._setup)

    def begin(self, round_no: int, adapter: Vector) -> Round:
        """The round of an adapter as it travels, float32 (spec.size,). Raises Refused `adapter.tensor`, and StageRefused
        where a tensor that no round changes isn't the one that the contract implies."""
        tensors = self._spec.unpack(adapter)
        if any((tensors[name] != value).any() for name, value in self._still.items()):
            raise StageRefused(SiteCode.ADAPTER)
        return Round(self._setup, round_no, tensors)

    def offer(self, round_: Round, attempt: int, second: tr.Second | None = None) -> tr.Offer:
        """The M0 that this site expects."""
        plan = self._rule.plan(round_, 2 if second else 1)
        return tr.offer(self._contract, round_no=round_.no, attempt=attempt, ranges=segments(plan),
                        adapter=adapter_digest(round_.old), second=second)

    def trained(self, round_: Round, change: NDArray[np.float32]) -> Tensors:
        """This site's adapter, given what its trainer returned."""
        return after_training(self._rule, round_, self._rank, change)

    def shared(self, vector: Vector) -> Tensors:
        """What the coordinator made of the first sum, as it travels. Raises Refused `rule.vector`."""
        return unflatten(vector.astype(np.float32, copy=False), self._rule.shares(self._setup))

    def encode(self, offer: tr.Offer, round_: Round, new: Tensors, shared: Tensors) -> Ring:
        """The vector of the offer's pass, to be masked. Raises as `Rule.parts` and `Encoding.encode`."""
        plan = self._rule.plan(round_, offer.pass_no)
        vector = flatten(self._rule.parts(round_, offer.pass_no, new, shared), plan)
        return offer.encoding.encode(vector, self._terms.weight, consume=True)
