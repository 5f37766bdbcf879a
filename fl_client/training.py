"""Local training: the site's records, the model loaded once, and one DP-SGD round on request.

`LocalTrainer` runs in the warm child process (`trainer.py`) or, in simulations, in this process: same code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privacy.compute import Compute
from privacy.contract import Contract
from privacy.dpsgd import noisy_mean
from privacy.engine import gradients
from privacy.errors import Refused
from privacy.population import Population
from strategies.adapter import AdapterSpec, Tensors
from strategies.base import ranks, widened
from strategies.examples import open_examples
from strategies.lora_model import LoraModel
from strategies.model import build
from strategies.prox import local_step
from strategies.rules import Rule, rule

Make = Callable[[Path, Contract, int | None], LoraModel]


class Trainer(Protocol):
    """What the round needs of training."""

    spec: AdapterSpec

    def train(self, adapter: Tensors, round_no: int) -> NDArray[np.float32]:
        """The change of all that any round trains, float32 (spec.dim,), in the adapter's shapes; zero where this round
        or this site's rank trains nothing."""


class LocalTrainer:
    """Records stay in their file, and what the frozen layers make of them in memory as far as `compute` lets it.

    Raises at construction: Refused `model.digest`, `data.floor`, `device.absent`; UsageError from model, data and DP
    coverage.

    make: `model.build`, or what gives the same; a bench shares work between runs by it.
    """

    def __init__(self, contract: Contract, site: str, *, model: Path, data: Path, text: str, label: str,
                 person: str | None = None, lineage: str = "", compute: Compute = Compute(),
                 make: Make = build) -> None:
        compute.require_device()
        self._size = compute.physical_batch or contract.privacy.physical_batch
        self._contract, self._site, self._local_lr = contract, site, contract.rule.local_lr
        by_person = contract.privacy.unit == "person"
        records = open_examples(data, contract, text=text, label=label, person=person if by_person else None)
        self._records = records
        self._population = Population(len(records), contract.mechanism(site), owners=records.owners, lineage=lineage,
                                      contents=records.contents)
        if self._population.units < contract.data.floor:
            raise Refused("data.floor", "The site has fewer units than the contract's floor.",
                          "Take no part in this contract, or ask for a lower floor.")
        self._probe = len(records)  # the row of a synthetic record, never sampled
        self._rule = rule(contract.rule.name, secure=contract.secagg.enabled)
        self._rank = ranks(self._rule, contract)[[s.name for s in contract.sites].index(site)]
        self._model = make(model, contract, self._rank)
        self._model.to(compute.device)
        own = self._model.spec(self._rule.trains)
        self.spec = AdapterSpec(widened(own.shapes, contract.lora.r), own.trained)
        self._own, self._places = own, _places(self._rule, self.spec, own, self._rank)
        trained = {n: self._model.parameters[n] for n, _ in own.sizes}
        self._grads = gradients(compute.engine, self._model.module, trained, self._model.losses(records, compute),
                                precision=compute.precision, checkpointing=compute.checkpointing)

    def probe(self) -> None:
        """One backward pass of a synthetic record, then of a whole batch of it. Raises UsageError `dp.frozen`,
        `dp.no_per_sample_gradient`; Refused `dp.memory`."""
        self._grads.check(self._probe)
        self._grads.require_fit(self._size)

    def train(self, adapter: Tensors, round_no: int) -> NDArray[np.float32]:
        """local_steps noisy SGD steps from `adapter`, on what the rule trains in that round. Raises Refused `data.changed`,
        `dp.memory`."""
        self._records.require_unchanged()
        mechanism = self._contract.mechanism(self._site, round_no)
        columns = np.flatnonzero(np.repeat([self._rule.trains(name, round_no) for name, _ in self._own.sizes],
                                           [count for _, count in self._own.sizes]))
        begun, moved = self._rule.own(adapter, self._rank), np.zeros(self._own.dim, np.float32)
        for _ in range(mechanism.steps):
            self._model.load(self._own.add(begun, moved))
            mean = noisy_mean(self._grads, self._population, mechanism, self._size, columns)
            moved[columns] = local_step(moved[columns], mean, local_lr=self._local_lr, mu=self._contract.rule.mu)
        change = np.zeros(self.spec.dim, np.float32)
        change[self._places] = moved
        return change


def _places(rule: Rule, whole: AdapterSpec, own: AdapterSpec, rank: int) -> NDArray[np.int64]:
    """Where each of a site's own trained values, int64 (own.dim,), is in the whole adapter's trained vector."""
    names, sizes = zip(*whole.sizes, strict=True)
    numbers = np.split(np.arange(whole.dim), np.cumsum(sizes)[:-1])
    mine = rule.own({n: v.reshape(dict(whole.shapes)[n]) for n, v in zip(names, numbers, strict=True)}, rank)  # type: ignore[misc]
    return np.concatenate([mine[name].ravel() for name, _ in own.sizes]).astype(np.int64)
