"""Who owns which records, and what one step draws of them. All randomness is the operating system's.

An item is what the mechanism samples and clips (see `DpMechanism`): a record, or a person with up to `draws` of its
records, drawn without replacement and anew in each step. Where the unit is a person but records are sampled, a person
keeps at most `group` records: which ones is decided once, by a hash under the lineage's id, never by the order of a file.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.canonical import labelled_hash
from privacy.errors import UsageError
from privacy.mechanism import DpMechanism
from privacy.noise import poisson_sample

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """rows: records of each item, int64 (items, draws), filled up by repetition; count: how many of them are meant."""

    rows: Rows
    count: Rows

    def __len__(self) -> int:
        return len(self.count)


class Population:
    """The units of one site's data for one mechanism. owners: person of each record, int64 (n,), or None.

    Raises UsageError `data.person` where the unit is a person and records have no owner.
    """

    def __init__(self, records: int, mechanism: DpMechanism, *, owners: Rows | None = None, lineage: str = "",
                 contents: Sequence[bytes] = ()) -> None:
        if mechanism.unit == "person" and owners is None:
            raise UsageError("data.person", "The privacy unit is a person, but the data names none.",
                             "Set site.person (data.person in simulations) to the column with the person's key.")
        self._sampled, self._draws = mechanism.sampled, mechanism.draws
        self._owned: list[Rows] = []
        if mechanism.unit == "person" and owners is not None:
            order = np.argsort(owners, kind="stable")
            self._owned = np.split(order, np.flatnonzero(np.diff(owners[order])) + 1)
        self._eligible = np.arange(records)
        if self._owned and mechanism.sampled == "record":
            kept = [_fixed_subset(rows, mechanism.group, lineage, contents) for rows in self._owned]
            self._eligible = np.sort(np.concatenate(kept))
        self.units = len(self._owned) if mechanism.unit == "person" else records
        self.items = len(self._owned) if mechanism.sampled == "person" else len(self._eligible)

    def draw(self, q: float) -> Draw:
        """The items of one step, each with probability q, independently."""
        chosen = poisson_sample(self.items, q)
        if self._sampled == "record":
            return Draw(self._eligible[chosen][:, None], np.ones(len(chosen), np.int64))
        rows, count = np.zeros((len(chosen), self._draws), np.int64), np.zeros(len(chosen), np.int64)
        rng = random.SystemRandom()
        for i, person in enumerate(chosen):
            own = self._owned[person]
            drawn = rng.sample(list(own), min(self._draws, len(own)))
            rows[i], count[i] = np.resize(drawn, self._draws), len(drawn)
        return Draw(rows, count)


def _fixed_subset(rows: Rows, most: int, lineage: str, contents: Sequence[bytes]) -> Rows:
    """At most `most` of a person's records, the same ones for the life of the lineage."""
    if len(rows) <= most:
        return rows
    keys = [labelled_hash("consilo k_max", lineage, contents[row]) for row in rows]
    return rows[np.argsort(np.array(keys, "S32"), kind="stable")[:most]]
