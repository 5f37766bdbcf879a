"""What `bench strategies` trains: LoRA on a frozen layer over sentence vectors, 8 classes, at silos that hold few of them.

    vector (384) -> frozen 384 x 384 + LoRA -> GELU -> frozen head -> 8 classes

Nothing but the adapter learns, so how factors are combined decides; a run takes seconds. Base and head are random and
everyone's. All that a site does is the product's: the rules' own code by `strategies.federate` and, with an epsilon,
DP-SGD by the project's mechanism, calibrated to the whole run; Adam then steps on the noisy mean, which is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from privacy.calibration import calibrate_sigma
from privacy.dpsgd import noisy_mean
from privacy.engine import gradients
from privacy.mechanism import DpMechanism, default_delta
from privacy.population import Population
from simulations.sentences import CLASSES, Sentences
from strategies.adapter import Tensors, initial
from strategies.base import CORE, RESIDUAL, A, B, Named, Rule, Setup, adapter_spec
from strategies.federate import federate

LAYER = "layer"
SCALE = 2.0  # alpha / r, at every rank
LENGTH = 10.0  # of a sentence's vector
HELD_OUT = 0.2
BATCH, LEARNING_RATE = 128, 5e-3
Q, CLIP, PHYSICAL = 0.125, 1.0, 64  # of DP-SGD


@dataclass(frozen=True, kw_only=True)
class Task:
    """classes: how many of the 8 a silo holds; all 8 are alike silos. epsilon: None trains without privacy."""

    silos: int = 8
    classes: int = 2
    rank: int = 4
    epsilon: float | None = None
    rounds: int = 10
    local_steps: int = 10

    @property
    def covered(self) -> bool:
        """Whether every class is at some silo."""
        return self.classes <= len(CLASSES) <= self.silos * self.classes


@dataclass(frozen=True)
class Silo:
    """vectors: float32 (n, width). labels: int64 (n,)."""

    vectors: torch.Tensor
    labels: torch.Tensor


class Layer(torch.nn.Module):
    """The whole model with an adapter of that rank; `tensors` names its parts as the adapter does."""

    def __init__(self, base: torch.Tensor, head: torch.Tensor, rank: int, core: bool) -> None:
        super().__init__()
        width, linear = len(base), torch.nn.Linear
        self.base, self.head = linear(width, width, bias=False), linear(width, len(head), bias=False)
        self.a, self.b = linear(width, rank, bias=False), linear(rank, width, bias=False)
        self.core = linear(rank, rank, bias=False) if core else torch.nn.Identity()
        self._base: torch.Tensor = base
        parts = {LAYER + A: "a", LAYER + B: "b", **({LAYER + CORE: "core"} if core else {})}
        self.tensors = {name: self.get_parameter(f"{part}.weight") for name, part in parts.items()}
        self.requires_grad_(False)
        self.head.weight.copy_(head)

    def load(self, adapter: Tensors) -> None:
        """A residual goes into the base's weight."""
        with torch.no_grad():
            for name, p in self.tensors.items():
                p.copy_(torch.from_numpy(adapter[name]))
            residual = adapter.get(LAYER + RESIDUAL)
            self.base.weight.copy_(self._base if residual is None else self._base + SCALE * torch.from_numpy(residual))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.base(x) + SCALE * self.b(self.core(self.a(x)))
        logits: torch.Tensor = self.head(torch.nn.functional.gelu(hidden))
        return logits


class Bench:
    """One rule on one task with one seed. The seed fixes all but DP's sampling and noise: those are the system's."""

    def __init__(self, data: Sentences, task: Task, rule: Rule, seed: int, learning_rate: float = LEARNING_RATE) -> None:
        self.task, self.rule, self.seed, self.learning_rate = task, rule, seed, learning_rate
        width, rng = data.vectors.shape[1], np.random.default_rng([seed, 2])
        base, head = (torch.from_numpy(rng.normal(0, width**-0.5, (rows, width)).astype(np.float32))
                      for rows in (width, len(CLASSES)))
        parts, out = split(data, task, seed)
        self.silos, self._out = [_silo(data, rows) for rows in parts], _silo(data, out)
        spec = adapter_spec(rule, ((LAYER + A, (task.rank, width)), (LAYER + B, (width, task.rank))))
        self.setup = Setup(spec=spec, ranks=site_ranks(rule, task), seed=seed)
        core = LAYER + CORE in dict(spec.shapes)
        self._models = {r: Layer(base, head, r, core) for r in self.setup.ranks}
        self._mechanisms = [_mechanism(task, len(silo.labels)) for silo in self.silos]

    def accuracy(self) -> float:
        """On the sentences held out, after all rounds, 0..1."""
        adapter: Tensors = initial(self.setup.spec, self.seed)
        largest = max(len(silo.labels) for silo in self.silos)
        weights = [len(silo.labels) / largest for silo in self.silos]
        for no in range(1, self.task.rounds + 1):
            news = [self.trained(adapter, no, k) for k in range(self.task.silos)]
            adapter = federate(self.rule, self.setup, no, adapter, news, weights).adapter
        model = self._models[self.task.rank]
        model.load(adapter)
        with torch.no_grad():
            right = model(self._out.vectors).argmax(dim=1) == self._out.labels
        return float(right.to(torch.float64).mean())

    def trained(self, adapter: Tensors, no: int, k: int) -> Named:
        """A silo's adapter after its local steps: Adam, fresh in each round."""
        model, start = self._models[self.setup.ranks[k]], self.rule.own(adapter, self.setup.ranks[k])
        model.load(start)
        free = {name: p for name, p in model.tensors.items() if self.rule.trains(name, no)}
        adam = torch.optim.Adam(free.values(), lr=self.learning_rate)
        for gradient in self._gradients(model, free, no, k):
            for p, part in zip(free.values(), torch.split(gradient, [p.numel() for p in free.values()]), strict=True):
                p.grad = part.reshape(p.shape)
            adam.step()
        return {**start, **{name: p.detach().numpy().copy() for name, p in free.items()}}

    def _gradients(self, model: Layer, free: dict[str, torch.nn.Parameter], no: int, k: int) -> Iterator[torch.Tensor]:
        """Of each local step, flat: the mean over a batch or, under DP, the released noisy mean."""
        silo, mechanism = self.silos[k], self._mechanisms[k]

        def losses(rows: NDArray[np.int64]) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(model(silo.vectors[rows]), silo.labels[rows], reduction="none")

        if mechanism is None:
            yield from _plain(losses, model, free, len(silo.labels), [self.seed, no, k], self.task.local_steps)
            return
        engine, population = gradients("auto", model, free, losses), Population(len(silo.labels), mechanism)
        for _ in range(self.task.local_steps):
            yield torch.from_numpy(noisy_mean(engine, population, mechanism, PHYSICAL).astype(np.float32))


def split(data: Sentences, task: Task, seed: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Rows of each silo, and those held out. The classes lie on a ring, in an order drawn from the seed; silo k holds
    `classes` of them from place 8 k / silos on, and a class is dealt out evenly to the silos that hold it."""
    rng, n = np.random.default_rng([seed, 1]), len(CLASSES)
    order, rows = rng.permutation(n), rng.permutation(len(data.labels))
    out, rest = np.split(rows, [int(HELD_OUT * len(rows))])
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(task.silos)]
    for place, label in enumerate(order):
        holders = [k for k in range(task.silos) if (place - n * k // task.silos) % n < task.classes]
        for k, part in zip(holders, np.array_split(rest[data.labels[rest] == label], len(holders)), strict=True):
            parts[k].append(part)
    return [np.concatenate(part) for part in parts], out


def site_ranks(rule: Rule, task: Task) -> tuple[int, ...]:
    """All alike; for `hetero`, which is `fedit` then, every other silo has half the rank."""
    half = max(1, task.rank // 2) if rule.name == "hetero" else task.rank
    return tuple(half if k % 2 else task.rank for k in range(task.silos))


def _silo(data: Sentences, rows: NDArray[np.int64]) -> Silo:
    return Silo(torch.from_numpy(data.vectors[rows] * np.float32(LENGTH)), torch.from_numpy(data.labels[rows]))


def _mechanism(task: Task, records: int) -> DpMechanism | None:
    if task.epsilon is None:
        return None
    delta = default_delta(records)
    sigma = calibrate_sigma(Q, task.rounds * task.local_steps, delta, task.epsilon)
    return DpMechanism(trust="local", unit="record", adjacency="add_remove", sampler="poisson", q=Q, clip=CLIP, sigma=sigma,
                       steps=task.local_steps, delta=delta, n_decl=records)


def _plain(losses: Callable[[NDArray[np.int64]], torch.Tensor], model: Layer, free: dict[str, torch.nn.Parameter],
           records: int, seed: list[int], steps: int) -> Iterator[torch.Tensor]:
    rng = np.random.default_rng(seed)
    model.requires_grad_(False)
    for p in free.values():
        p.requires_grad_(True)
    for _ in range(steps):
        loss = losses(rng.choice(records, min(BATCH, records), replace=False)).mean()
        yield torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(free.values()))])
