"""`fl-simulate bench rules`: rules side by side on a real task, by the configuration that a run would have.

Each run is a contract, the sites' own trainer (sampling, clipping and noise as calibrated by that contract) and the rule's
code on both sides of the weighted mean; for a linear rule the mean goes through the encoding of secure aggregation. What
a run over the network has besides (keys, masks, statements) doesn't change the adapter. What the frozen lower layers make
of a text is computed once for all runs. docs/benchmarks.md documents every field.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf import load_settings
from conf.settings import Settings
from fl_client.training import LocalTrainer
from fl_server.contracting import make_contract
from fl_server.evaluation import PublicSplit
from privacy.canonical import labelled_hash
from privacy.contract import Contract
from simulations.bench import Runs, environment
from simulations.demo import embedded
from simulations.local import declare_sites
from strategies.adapter import Tensors, initial
from strategies.base import Round, after_training, setup
from strategies.classifier import Batch, Labelled
from strategies.federate import Next, encoded_mean, federate
from strategies.lora_model import LoraModel
from strategies.model import build, classifier
from strategies.rules import RULES, rule
from strategies.table import Table

PHYSICAL = 32  # records in memory at a time
Say = Callable[[str], None]


@dataclass
class Models:
    """Builds models, and remembers what their frozen layers make of texts. All are of one base, length and set of layers."""

    known: dict[bytes, Batch] = field(default_factory=dict)

    def build(self, folder: Path, contract: Contract, rank: int | None = None) -> LoraModel:
        """As `model.build`, but for float rounding. Raises UsageError `model.task` too."""
        model = classifier(build(folder, contract, rank))
        encode, each = model.encode, model.each

        def remembered(texts: Sequence[str]) -> Batch:
            key = labelled_hash("bench rules", *texts)
            if key not in self.known:
                self.known[key] = encode(texts)
            return self.known[key]

        def cut(records: Labelled) -> Tensor:
            return each(replace(records, batch=shortened(records.batch)))

        vars(model).update(encode=remembered, each=cut)  # of this one model
        return model


def shortened(batch: Batch) -> Batch:
    """Without what is padding in all records; it is masked anyway."""
    width = int(batch.mask.sum(dim=1).max())
    hidden = None if batch.hidden is None else batch.hidden[:, :width]
    return Batch(batch.input_ids[:, :width], batch.mask[:, :width], hidden)


def run(overrides: Sequence[str], *, rules: Sequence[str], seeds: Sequence[int], keep: Path | None, threads: int = 1,
        say: Say = lambda line: None) -> dict[str, Any]:
    """All figures of docs/benchmarks.md, `bench rules`. rules: each a name, perhaps with overrides of its own after it
    ("krum rule.byzantine=0"). keep: JSON lines of runs that are done; they aren't repeated.

    Raises as `load_settings`, `make_contract`, `LocalTrainer`, `PublicSplit` and the rules do.
    """
    torch.set_num_threads(threads)
    at_start, models, runs = environment("numpy", "torch", "peft", "opacus"), Models(), Runs(keep)
    settings, mine = load_settings(overrides), list[dict[str, Any]]()
    embedded(settings)
    with tempfile.TemporaryDirectory() as folder:
        files = by_length(settings, Path(folder))
        for seed, words in itertools.product(seeds, rules):
            name, *own = words.split()
            mine.append(runs.once({"overrides": sorted(overrides), "rule": words, "seed": seed},
                                  lambda: play(settled([*overrides, *own], name, seed, files), models), say))  # noqa: B023
    taken = {words: [one["accuracy"] for one in mine if one["rule"] == words] for words in rules}
    return {"bench": "rules", "data": settings.data.name, "overrides": list(overrides), "epsilon": settings.privacy.epsilon,
            "rounds": settings.privacy.rounds, "units": mine[0]["units"], "seeds": list(seeds), "dtype": "float32",
            "accuracy": {name: mean(each) for name, each in taken.items()},
            "spread": {name: stdev(each) if len(each) > 1 else 0.0 for name, each in taken.items()},
            "environment": at_start, "samples": mine}


def render(found: dict[str, Any]) -> str:
    """The same for people."""
    privacy = "no DP" if found["epsilon"] is None else f"epsilon {found['epsilon']:g}"
    lines = [f"{found['data']}: {found['rounds']} rounds, {privacy}, accuracy of {found['units']} public records, seeds "
             f"{', '.join(map(str, found['seeds']))}: mean (standard deviation)", ""]
    return "\n".join([*lines, *(f"{value:.4f} ({found['spread'][name]:.4f})  {name}"
                                for name, value in sorted(found["accuracy"].items(), key=lambda pair: -pair[1]))])


def play(settings: Settings, models: Models) -> dict[str, Any]:
    """One run: accuracy before and after, 0..1, of `units` public records."""
    start, contract = process_time(), _contract(settings)
    combine, terms = rule(contract.rule.name, secure=contract.secagg.enabled), contract.rule
    trainers = {name: LocalTrainer(contract, name, model=Path(settings.model.path), data=Path(str(site.file)),
                                   text=settings.data.text, label=settings.data.label, person=settings.data.person,
                                   make=models.build) for name, site in sorted(settings.data.sites.items())}
    split = PublicSplit(models.build(Path(settings.model.path), contract), contract, settings.data.evaluation)
    spec = next(iter(trainers.values())).spec
    made, through = setup(combine, contract, spec), encoded_mean(contract.secagg.bits, contract.secagg.ring)
    adapter: Tensors = initial(spec, contract.lora.seed)
    before, after = split.score(adapter), Next(dict(adapter))
    for no in range(1, contract.privacy.rounds + 1):
        round_ = Round(made, no, after.adapter)
        news = [after_training(combine, round_, rank, trainers[site.name].train(after.adapter, no))
                for site, rank in zip(contract.sites, made.ranks, strict=True)]
        after = federate(combine, made, no, after.adapter, news, [site.weight for site in contract.sites], terms=terms,
                         state=after.state, mean=through)
    score = split.score(after.adapter)
    return {"accuracy": score.values["accuracy"], "before": before.values["accuracy"], "units": score.units,
            "terms": terms.model_dump(mode="json"), "sigma": {site.name: site.sigma for site in contract.sites},
            "cpu_s": process_time() - start}


def settled(overrides: Sequence[str], name: str, seed: int, sites: Mapping[str, Path]) -> Settings:
    sums = "masked" if RULES[name].linear else "plain"
    settings = load_settings([f"secure_aggregation={sums}", *overrides, f"rule={name}", f"seed={seed}",
                              f"privacy.physical_batch={PHYSICAL}", *(f"data.sites.{n}.file={f}" for n, f in sites.items()),
                              "data.text=text", "data.label=label", "data.person=person"])
    return declare_sites(settings)


def by_length(settings: Settings, folder: Path) -> dict[str, Path]:
    """A copy of each site's records, the shortest first: batches then hold little padding. Sampling knows no order."""
    out, data = {}, settings.data
    for name, site in data.sites.items():
        table = Table.open(Path(str(site.file)), {"text": data.text, "label": data.label}, person=data.person)
        owners = [""] * len(table) if table.owners is None else np.array(list(table.people))[table.owners].tolist()
        rows = [{**(row or {}), "person": owner} for row, owner in zip(table, owners, strict=True)]
        out[name] = folder / f"{name}.jsonl"
        out[name].write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda r: len(str(r.get("text"))))))
    return out


def _contract(settings: Settings) -> Contract:
    return make_contract(settings, {name: f"{i:064x}" for i, name in enumerate(settings.data.sites)})  # no certificates
