"""Token recovery from the gradients of the first layer's lora_A: what differential privacy takes away from one attack.

The attack itself is in `attack_scan`; here is what it is run on. query and value see the same inputs, so the rows of their
lora_A are stacked: up to 2 r inputs can be told apart.

Guarantees: without differential privacy the attack gets the record's plain gradient; every other release is the vector
that the product's own `LocalTrainer` sends, unpatched. The attacker is favoured throughout (rule fedit, first layer, no
secure aggregation, the text's length and the noise's size known). B and the head start at zero, so the first two rounds
have no such gradient at all: the attack is on the last round.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf import load_settings
from conf.settings import Settings, SiteDeclaration
from fl_client.training import LocalTrainer
from fl_server.contracting import make_contract
from privacy.contract import Contract, Phase
from privacy.errors import UsageError
from privacy.mechanism import declared
from privacy.noise import pitch
from simulations.attack_scan import Found, Release, Vocabulary, scan
from strategies.adapter import AdapterSpec, Tensors, initial
from strategies.model import build, classifier
from strategies.optimizers import optimizer

FORMAT = "consilo.attack/1"
TEXT = "Anna Miller was told on Monday she has lung cancer"
SETUP = ("rule=fedit", "lora.layers=[0]", "lora.r=8", "data.name=synthetic", "data.floor=1")
SITES = ("site-a", "site-b", "site-c")  # the contract wants a cohort; the one that is watched comes first
OTHERS = {
    "heart": ("my heart beats very fast after coffee", "a dull pain in the chest when running",
              "the doctor heard a murmur", "both ankles are swollen in the evening"),
    "lungs": ("short of breath on the stairs", "a dry cough that keeps me awake", "wheezing in cold air",
              "coughing since the winter"),
    "skin": ("red patches on both arms", "a mole that has changed its colour", "the rash itches at night",
             "very dry skin on the hands"),
    "joints": ("the left knee is stiff in the morning", "my shoulder hurts when lifting", "swollen finger joints",
               "back pain after sitting for long"),
}
WARM_UP = 2  # texts of each label that the adapter is trained on before the attack
SIGMAS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
WATCHED = (1, 2, 3, 5, 10, 15)  # rounds that are attacked without noise, besides the last one
FLOAT_ERROR = 2.0**-21  # of a gradient's norm: what 32-bit sums leave in directions that should be empty
Record = tuple[str, str]


class Site:
    """One record, or several, behind the product's trainer. n: number of records, all of them declared."""

    def __init__(self, contract: Contract, records: Sequence[Record], model: Path, folder: Path) -> None:
        path = folder / f"records-{len(list(folder.iterdir()))}.jsonl"  # another site may still read its own
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in records))
        sites = tuple(s.model_copy(update={"n_decl": declared(len(records))}) for s in contract.sites)
        self.n, self._contract = len(records), contract.model_copy(update={"sites": sites})
        self._trainer = LocalTrainer(self._contract, SITES[0], model=model, data=path, text="text", label="label")

    @property
    def spec(self) -> AdapterSpec:
        return self._trainer.spec

    def update(self, adapter: Tensors, round_no: int = 1) -> NDArray[np.float32]:
        return self._trainer.train(adapter, round_no)

    def release(self, adapter: Tensors, round_no: int = 1, *, times: int = 1) -> Release:
        """The lora_A part of what is sent, undone to the sum; of several sends, their mean."""
        mechanism = self._contract.mechanism(SITES[0], round_no)
        sent = np.mean([self.update(adapter, round_no).astype(np.float64) for _ in range(times)], axis=0)
        total, at, rows = -sent * mechanism.denominator / self._contract.rule.local_lr, 0, []
        shapes = dict(self.spec.shapes)
        for name, size in self.spec.sizes:
            if ".lora_A." in name:
                rows.append(total[at:at + size].reshape(shapes[name]))
            at += size
        gradient = np.concatenate(rows)
        spread = math.sqrt(sum(gradient.shape) + 2 * math.sqrt(gradient.size))  # sqrt(rows) + sqrt(columns)
        deviation = math.hypot(mechanism.sigma * mechanism.clip, pitch(mechanism.clip) * math.sqrt(self.n / 12))
        return Release(gradient, deviation * spread / math.sqrt(times))


class Plain:
    """The record's gradient as plain federated learning would send it: no clip, no lattice, no noise."""

    def __init__(self, contract: Contract, record: Record, model: Path) -> None:
        import torch

        self._model = classifier(build(model, contract))
        self._batch = self._model.encode([record[0]])
        self._label = torch.tensor([contract.data.labels.index(record[1])])
        self._a = [p for name, p in self._model.parameters.items() if ".lora_A." in name]

    def release(self, adapter: Tensors) -> Release:
        import torch

        self._model.load(adapter)
        loss = torch.nn.functional.cross_entropy(self._model.module(self._batch), self._label)
        gradient = torch.cat(torch.autograd.grad(loss, self._a)).numpy().astype(np.float64)
        return Release(gradient, float(np.linalg.norm(gradient)) * FLOAT_ERROR)


def variant(contract: Contract, *, noise: bool, q: float | None = None, batch: int = 1,
            sigmas: Sequence[float] = ()) -> Contract:
    """The contract without noise, or with another q; sigmas: one phase of one round for each, in order."""
    shipped = contract.sites[0].sigma
    terms: dict[str, Any] = {"physical_batch": batch, "q": q or contract.privacy.q, "schedule": ()}
    if sigmas:
        terms["schedule"] = tuple(Phase(rounds=1, q=terms["q"], noise=s / shipped) for s in sigmas)
    if noise:
        return contract.model_copy(update={"privacy": contract.privacy.model_copy(update=terms)})
    sites = tuple(s.model_copy(update={"sigma": 0.0}) for s in contract.sites)
    terms |= {"trust": "none", "epsilon": None}
    return contract.model_copy(update={"privacy": contract.privacy.model_copy(update=terms), "sites": sites})


def prepare(overrides: Sequence[str]) -> tuple[Settings, Contract]:
    """The configuration with SETUP and made-up records, and its contract, noise calibrated. Raises UsageError
    `attack.privacy`."""
    from simulations.demo import embedded

    settings = load_settings([*SETUP, *overrides])
    if settings.privacy.epsilon is None:
        raise UsageError("attack.privacy", "Without noise there is nothing to compare the open gradient with.",
                         "Leave privacy as it is shipped, or set privacy.epsilon.")
    site = SiteDeclaration(n_decl=declared(1 + sum(map(len, OTHERS.values()))))
    data = settings.data.model_copy(update={"labels": tuple(OTHERS), "sites": dict.fromkeys(SITES, site)})
    settings = settings.model_copy(update={"data": data})
    embedded(settings)
    return settings, make_contract(settings, {name: f"{i:064x}" for i, name in enumerate(SITES)})


def attack(text: str = TEXT, overrides: Sequence[str] = (), *, seeds: Sequence[int] = (0, 1, 2), repeats: int = 3,
           say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run every scenario and return what attack.json holds.

    seeds: of the adapter's start. repeats: releases a seed, where there is noise; noise and sampling are from a CSPRNG.
    Raises UsageError `attack.privacy` (no noise to compare with), `attack.text`, `attack.model`.
    """
    settings, contract = prepare(overrides)
    folder = Path(settings.model.path)
    vocabulary = Vocabulary(folder, settings.model.max_length)
    tokens = vocabulary.tokens(text)
    say(f"{len(tokens)} tokens, {vocabulary.size} candidates each, r = {contract.lora.r}")
    taken = _releases(text, contract, folder, seeds, repeats, say)
    flat = [(name, r) for name, releases in taken.items() for r in releases]
    say(f"testing the vocabulary against {len(flat)} releases")
    found: dict[str, list[Found]] = {name: [] for name in taken}
    for (name, _), result in zip(flat, scan(vocabulary.embed, tokens, [r for _, r in flat]), strict=True):
        found[name].append(result)
    return _document(text, contract, settings.model.name, vocabulary, tokens, found, seeds=seeds, repeats=repeats,
                     shipped=settings.privacy == load_settings().privacy)


def _releases(text: str, contract: Contract, model: Path, seeds: Sequence[int], repeats: int,
              say: Callable[[str], None]) -> dict[str, list[Release]]:
    """Scenario -> releases, one or `repeats` a seed; `sweep SIGMA` and `round N` among them."""
    victim, rounds = (text, "lungs"), contract.privacy.rounds
    others = [(t, label) for label, texts in OTHERS.items() for t in texts]
    learnt = [(t, label) for label, texts in OTHERS.items() for t in texts[:WARM_UP]]
    shipped = contract.sites[0].sigma
    sigmas = [s for s in SIGMAS if s < shipped]
    with tempfile.TemporaryDirectory(prefix="consilo-") as scratch:
        def site(records: Sequence[Record], **terms: Any) -> Site:
            return Site(variant(contract, **terms), records, model, Path(scratch))

        trained = site(learnt, noise=False, q=1.0, batch=len(learnt))
        open_alone = site([victim], noise=False, q=1.0)
        plain = Plain(contract, victim, model)
        alone = site([victim], noise=True, q=1.0, sigmas=[*sigmas, shipped])
        absent = site([others[0]], noise=True, q=1.0)
        open_crowd = site([victim, *others], noise=False, batch=len(others) + 1)
        crowd = site([victim, *others], noise=True, batch=len(others) + 1)
    taken: dict[str, list[Release]] = {}

    def take(name: str, source: Site, adapter: Tensors, times: int, round_no: int = 1, *, mean: int = 1) -> None:
        taken.setdefault(name, []).extend(source.release(adapter, round_no, times=mean) for _ in range(times))

    step = optimizer(contract.rule.optimizer)
    for seed in seeds:
        adapter, state = initial(trained.spec, seed), np.zeros(trained.spec.dim, np.float32)
        for n in range(1, rounds + 1):
            if n in WATCHED or n == rounds:
                taken.setdefault(f"round {n}", []).append(plain.release(adapter))
            if n < rounds:
                change, state = step(contract.rule, trained.update(adapter), state)
                adapter = trained.spec.add(adapter, change)
        taken.setdefault("plain", []).append(plain.release(adapter))
        take("noise off", open_alone, adapter, 1)
        for i, sigma in enumerate(sigmas, 1):
            take(f"sweep {sigma:g}", alone, adapter, repeats, i)
        take("noise", alone, adapter, repeats, len(sigmas) + 1)
        take("noise, whole run", alone, adapter, 1, len(sigmas) + 1, mean=rounds)
        take("noise, record absent", absent, adapter, repeats)
        take("crowd, noise off", open_crowd, adapter, 1)
        take("crowd, noise", crowd, adapter, 1)
        say(f"seed {seed}: round {rounds} taken")
    return taken


def _document(text: str, contract: Contract, model: str, vocabulary: Vocabulary, tokens: Sequence[tuple[int, int]],
              found: dict[str, list[Found]], *, seeds: Sequence[int], repeats: int, shipped: bool) -> dict[str, Any]:
    mechanism, p, true = contract.mechanism(SITES[0]), contract.privacy, [i for _, i in tokens]

    def rate(name: str) -> dict[str, Any]:
        hits = np.concatenate([f.hits for f in found[name]])
        ranks = np.concatenate([f.rank for f in found[name]])
        return {"releases": len(found[name]), "recovered": int(hits.sum()), "of": hits.size,
                "rate": round(float(hits.mean()), 4), "median_rank": round(float(np.median(ranks)), 1)}

    def single(name: str) -> list[dict[str, Any]]:
        """The first release of the first seed, token by token; ranks: of all releases."""
        first = found[name][0]
        return [{"position": position, "token": word, "guess": guess, "distance": round(float(first.nearest[t]), 4),
                 "ranks": [float(f.rank[t]) for f in found[name]]}
                for t, ((position, _), word, guess) in enumerate(
                    zip(tokens, vocabulary.words(true), vocabulary.words(list(first.guess)), strict=True))]

    scenarios = [name for name in found if not name.startswith(("sweep ", "round "))]
    sweep = [{"sigma": float(name[6:]), **rate(name)} for name in found if name.startswith("sweep ")]
    return {
        "format": FORMAT, "attack": "span check on stacked layer-0 lora_A gradients (DAGER, arXiv 2405.15586)",
        "text": text, "tokens": vocabulary.words(true), "chance": 1 / vocabulary.size,
        "model": {"name": model, "digest": contract.model.weights, "vocabulary": vocabulary.size},
        "adapter": {"r": contract.lora.r, "targets": list(contract.lora.targets), "layers": list(contract.lora.layers),
                    "rule": contract.rule.name, "round": p.rounds},
        "mechanism": {"epsilon": p.epsilon, "delta": mechanism.delta, "sigma": mechanism.sigma, "clip": mechanism.clip,
                      "q": mechanism.q, "rounds": p.rounds, "retries": p.retries, "shipped_default": shipped},
        "most_tokens": contract.lora.r * len(contract.lora.targets), "inputs": len(tokens) + 2,
        "others": sum(map(len, OTHERS.values())), "seeds": list(seeds),
        "repeats": repeats, "noise": "from a CSPRNG: no two runs give the same figures under noise",
        "without_dp": single("plain"), "with_dp": single("noise"),
        "scenarios": {name: rate(name) for name in scenarios},
        "by_round": [{"round": int(name[6:]), **rate(name)} for name in found if name.startswith("round ")],
        "sweep": [*sweep, {"sigma": mechanism.sigma, **rate("noise")}],
        "favours": ["the shipped adapter trains neither layer 0 nor any lora_A", "no secure aggregation",
                    "length of the text and size of the noise known", "the record alone in its batch, and sampled for sure"],
        "not_claimed": ["that other attacks fail", "that the shipped noise is the least that stops this one",
                        "anything about other texts, models, layers, tensors or ranks", "a bound: that is what epsilon is"],
    }
