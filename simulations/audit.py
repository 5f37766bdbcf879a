"""Gradient canaries through the product's own trainer: what one run of it leaks, against what it claims.

A canary is a record of the site's data whose gradient lies along one coordinate of the head's weight and is far longer
than the clip norm. It is loaded, sampled, differentiated, clipped, summed and noised by `LocalTrainer` as any other; only
its loss is its own. Canaries are included by fair coins of a recorded seed. Their directions are orthogonal, and each
step draws their signs anew (`privacy.audit.judge` says why).

Sampling and noise are the operating system's randomness: two runs with one seed agree in the coins, not in the scores.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from conf.settings import Settings
from fl_client.training import LocalTrainer
from fl_server.contracting import make_contract
from privacy.audit import MIN_CANARIES, Finding, judge
from privacy.canonical import labelled_hash
from privacy.contract import Contract
from privacy.errors import CheckFailed, UsageError
from privacy.mechanism import DpMechanism
from privacy.noise import pitch
from privacy.population import Draw
from strategies.adapter import HEAD, initial
from strategies.model import classifier
from strategies.records import load_records

if TYPE_CHECKING:
    import torch

LENGTH = 1e3  # a canary's gradient over max(clip, 1): the head's bias, which can't be left out, gets a thousandth


@dataclass(frozen=True)
class Place:
    """A site's model folder and data file, and the names of the file's columns."""

    model: Path
    data: Path
    text: str = "text"
    label: str = "label"
    person: str | None = None


class CanaryTrainer(LocalTrainer):
    """place: its data file holds canaries from record `first` on. planted: int (n,), which of the `canaries` each of those
    records is. rng draws the directions: `coordinates`, int (canaries,), in the update vector. `signs`: +-1 (canaries,),
    of the next step.

    Raises UsageError `dp.parameter` (more canaries than the head has weights), CheckFailed `audit.inert` (a canary's
    contribution isn't what it is meant to be: the audit would find nothing, whatever there is).
    """

    def __init__(self, contract: Contract, site: str, place: Place, *, first: int, planted: NDArray[np.int64], canaries: int,
                 rng: np.random.Generator) -> None:
        super().__init__(contract, site, model=place.model, data=place.data, text=place.text, label=place.label,
                         person=place.person)
        self.probe()
        head, names = classifier(self._model).head, [name for name, _ in self.spec.sizes]
        if not MIN_CANARIES <= canaries <= head.weight.numel():
            raise UsageError("dp.parameter", f"{canaries} canaries don't fit this model's head.",
                             f"Ask for {MIN_CANARIES}..{head.weight.numel()}, the number of its weights.")
        weights = rng.choice(head.weight.numel(), canaries, replace=False)
        self.coordinates = weights + sum(count for _, count in self.spec.sizes[:names.index(HEAD[0])])
        self.signs = np.ones(canaries)
        self._first, self._canaries = first, planted
        self._rows, self._columns = np.divmod(weights, head.in_features)
        self._length = LENGTH * max(contract.privacy.clip, 1.0)
        self._honest, self._grads._losses = self._grads._losses, self._losses
        head.register_forward_pre_hook(self._before)
        self._model.module.register_forward_hook(self._after)  # the head's own hooks come before those of Opacus
        self._check(contract.privacy.clip, contract.privacy.physical_batch)

    def _check(self, clip: float, physical_batch: int) -> None:
        """Every planted record alone, clipped: at least half of the clip norm lies along its canary's direction."""
        rows, start = np.arange(len(self._canaries)) + self._first, 0
        for part in self._grads.clipped(Draw(rows[:, None], np.ones(len(rows), np.int64)), clip, physical_batch):
            which = self._canaries[start:start + len(part)]
            start += len(part)
            if (part[np.arange(len(part)), self.coordinates[which]] * pitch(clip) < clip / 2).any():
                raise CheckFailed("audit.inert", "A canary doesn't reach the sum that is released.",
                                  "Report it: an audit with such canaries would say nothing.")

    def _losses(self, records: NDArray[np.int64]) -> torch.Tensor:
        """A canary's loss is its sign times one logit of a sentence vector along one axis."""
        import torch

        at = records - self._first
        self._planted = torch.from_numpy(at >= 0)
        self._which = self._canaries[np.maximum(at, 0)]
        each = self._honest(records)
        own = self._logits[torch.arange(len(at)), torch.from_numpy(self._rows[self._which])]
        return torch.where(self._planted, own * torch.from_numpy(self.signs[self._which]).to(own.dtype), each)

    def _before(self, head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        import torch

        axis = torch.nn.functional.one_hot(torch.from_numpy(self._columns[self._which]), args[0].shape[1])
        return (torch.where(self._planted[:, None], axis * self._length, args[0]),)

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> None:
        self._logits = logits


def audit(contract: Contract, site: str, place: Place, *, canaries: int, rounds: int, seed: int, alpha: float,
          live: bool = False) -> Finding:
    """Run `rounds` noisy steps of the first phase at one site, each released, and judge them.

    live: whether the site's own records contribute. Otherwise they are in place with a label outside the contract, so the
    trainer samples them and counts them as zero: privacy is to hold with any records, and these hide no canary.
    Local steps are released one by one, which is what the accountant assumes of them. Raises UsageError `dp.parameter`
    (canaries, alpha), `dp.unbounded` (trust=none); CheckFailed `audit.inert`; what LocalTrainer raises.
    """
    if contract.privacy.trust == "none":
        raise UsageError("dp.unbounded", "With trust=none no finite epsilon is claimed.", "Audit a private contract.")
    terms = contract.privacy.model_copy(update={"local_steps": 1})
    contract = contract.model_copy(update={"privacy": terms})
    mechanism, rng = contract.mechanism(site), np.random.default_rng(seed)
    included = rng.random(canaries) < 0.5
    planted = np.repeat(np.flatnonzero(included), mechanism.group)
    with tempfile.TemporaryDirectory(prefix="consilo-") as folder:
        copy = Place(place.model, Path(folder) / "planted.jsonl", person="person")
        first = _plant(contract, place, copy.data, planted, live)
        trainer = CanaryTrainer(contract, site, copy, first=first, planted=planted, canaries=canaries, rng=rng)
    return judge(_scores(trainer, contract, mechanism, rounds, rng), included, mechanism, alpha=alpha)


def _scores(trainer: CanaryTrainer, contract: Contract, mechanism: DpMechanism, rounds: int,
            rng: np.random.Generator) -> NDArray[np.float64]:
    """float (rounds, canaries): the released sum along each canary's direction, in units of the clip norm."""
    unit = -mechanism.denominator / (contract.rule.local_lr * mechanism.clip)
    adapter, scores = initial(trainer.spec, contract.lora.seed), np.zeros((rounds, len(trainer.signs)))
    for step in range(rounds):
        trainer.signs = rng.choice([-1.0, 1.0], len(trainer.signs))
        update = trainer.train(adapter, 1)
        scores[step] = unit * trainer.signs * update[trainer.coordinates]
        adapter = trainer.spec.add(adapter, np.float32(contract.rule.server_lr) * update)
    return scores


def _plant(contract: Contract, place: Place, out: Path, canaries: NDArray[np.int64], live: bool) -> int:
    """Write the site's records, then one for each of `canaries`. Returns the number of the first of those."""
    by_person = contract.privacy.unit == "person"
    records = load_records(place.data, contract.data.labels, text=place.text, label=place.label,
                           person=place.person if by_person else None)
    owners = np.arange(len(records)) if records.owners is None else records.owners
    rows: list[dict[str, Any]] = [
        {"text": text, "label": contract.data.labels[label] if ok and live else None, "person": f"person {owner}"}
        for text, label, ok, owner in zip(records.texts, records.labels, records.valid, owners, strict=True)]
    rows += [{"text": "canary", "label": contract.data.labels[0], "person": f"canary {k}"} for k in canaries]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(records)


def configured(settings: Settings, site: str | None) -> tuple[Contract, str, Place]:
    """The contract that `fl-simulate run` would make, its first site or the named one, and where that site's data lie.

    Raises UsageError `contract.no_such_site`, and what `make_contract` and `declare_sites` raise.
    """
    from simulations.local import declare_sites

    settings = declare_sites(settings)
    contract = make_contract(settings, {n: labelled_hash("audit", n).hex() for n in settings.data.sites})
    name = contract.site(site or contract.sites[0].name).name
    return contract, name, Place(Path(settings.model.path), Path(str(settings.data.sites[name].file)), settings.data.text,
                                 settings.data.label, settings.data.person)
