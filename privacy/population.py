"""Who owns which records, and what one step draws of them. All randomness is the operating system's.

An item is what the mechanism samples and clips (see `DpMechanism`): a record, or a person with up to `draws` of its
records, drawn without replacement and anew in each step. Where the unit is a person but records are sampled, a person
keeps at most `group` records: which ones is decided once, by a hash under the lineage's id, never by the order of a file.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privacy.canonical import labelled_hash
from privacy.errors import UsageError
from privacy.mechanism import DpMechanism
from privacy.noise import poisson_sample

Rows = NDArray[np.int64]


class Contents(Protocol):
    """What tells records apart by what they say, such as their digests; read when asked for."""

    def __getitem__(self, record: int, /) -> bytes: ...


@dataclass(frozen=True)
class Draw:
    """rows: records of each item, int64 (items, draws), filled up by repetition; count: how many of them are meant."""

    rows: Rows
    count: Rows

    def __len__(self) -> int:
        return len(self.count)


class Population:
    """The units of one site's data for one mechanism. owners: person of each record, integers 0.. (n,), or None.

    Memory: 12 bytes a record where persons are known, next to nothing where not.
    Raises UsageError `data.person` where the unit is a person and records have no owner.
    """

    def __init__(self, records: int, mechanism: DpMechanism, *, owners: NDArray[np.integer] | None = None,
                 lineage: str = "", contents: Contents = ()) -> None:
        if mechanism.unit == "person" and owners is None:
            raise UsageError("data.person", "The privacy unit is a person, but the data names none.",
                             "Set site.person (data.person in simulations) to the column with the person's key.")
        self._sampled, self._draws = mechanism.sampled, mechanism.draws
        self._eligible: Rows | None = None  # all of them
        if mechanism.unit == "person" and owners is not None:
            self._order = np.argsort(owners, kind="stable")
            self._starts = np.append(np.flatnonzero(np.diff(owners[self._order], prepend=-1)), records).astype(np.int32)
            if mechanism.sampled == "record":
                self._eligible = self._kept(mechanism.group, lineage, contents)
            self.units = len(self._starts) - 1
        else:
            self.units = records
        self.items = (self.units if mechanism.sampled == "person" else
                      records if self._eligible is None else len(self._eligible))

    def draw(self, q: float) -> Draw:
        """The items of one step, each with probability q, independently."""
        chosen = poisson_sample(self.items, q)
        if self._sampled == "record":
            rows = chosen if self._eligible is None else self._eligible[chosen]
            return Draw(rows[:, None], np.ones(len(chosen), np.int64))
        rows, count = np.zeros((len(chosen), self._draws), np.int64), np.zeros(len(chosen), np.int64)
        rng = random.SystemRandom()
        for i, person in enumerate(chosen):
            own = self._own(int(person))
            drawn = rng.sample(range(len(own)), min(self._draws, len(own)))
            rows[i], count[i] = np.resize(own[drawn], self._draws), len(drawn)
        return Draw(rows, count)

    def _own(self, person: int) -> Rows:
        """A person's records."""
        return self._order[self._starts[person]:self._starts[person + 1]]

    def _kept(self, most: int, lineage: str, contents: Contents) -> Rows:
        """Of each person at most `most` records, the same ones for the life of the lineage. Sorted."""
        kept = np.ones(len(self._order), bool)
        for person in np.flatnonzero(np.diff(self._starts) > most):
            own = self._own(int(person))
            keys = [labelled_hash("consilo k_max", lineage, contents[int(row)]) for row in own]
            kept[own[np.argsort(np.array(keys, "S32"), kind="stable")[most:]]] = False
        return np.flatnonzero(kept)
