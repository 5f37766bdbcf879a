"""Which records a lineage's budget covers: known to the site alone, as truncated HMACs under a key that it holds.

Guarantees: what is stored tells nobody without the key whether a record is in it; a job on records that were never
registered with the lineage is refused, and so is one whose records another lineage of this site covers already: each has
a budget of its own, so what both cover could be spent twice. Nothing of it leaves the site but the event of a
registration, without a count.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privacy.errors import CheckFailed, Refused
from privacy.files import FileLayer, read_private, write_private
from privacy.ledger import Ledger

TAG_BYTES = 8  # of each HMAC-SHA256: a chance of 3e-10 that two of 10^5 records collide
Tags = NDArray[np.uint64]  # sorted, each once
NONE: Tags = np.zeros(0, np.uint64)


def site_key(path: Path) -> bytes:
    """The site's key for tags, 32 bytes, made on first use. Raises Refused `key.permissions`; CheckFailed `lineage.file`."""
    if not path.exists():
        write_private(path, secrets.token_bytes(32))
    key = read_private(path)
    if len(key) != 32:
        raise _damaged(path)
    return key


def tags(key: bytes, contents: Iterable[bytes], people: Iterable[str] = ()) -> Tags:
    """Tags of records, by canonical content and, where given, of their persons by key. Order and repetitions don't count.
    Each is read once: 8 bytes of memory for it, and as many again while they are sorted."""
    parts = chain((b"record\n" + content for content in contents),
                  (b"person\n" + person.encode("utf-8", "surrogatepass") for person in people))
    found = bytearray()
    for part in parts:
        found += hmac.digest(key, part, "sha256")[:TAG_BYTES]
    return np.unique(np.frombuffer(found, np.uint64))


def overlap(a: Path, b: Path) -> bool:
    """Whether two tag files of one site share a record or a person. Raises CheckFailed `lineage.file`."""
    return bool(np.intersect1d(_load(a), _load(b), assume_unique=True).size)


def register(ledger: Ledger, path: Path, found: Tags, approver: str) -> None:
    """The operator adds what is in `found` to the lineage. The event is recorded before the tags are stored: after a
    crash in between, it is registered again. Raises as `Ledger.register` does; CheckFailed `lineage.file`."""
    ledger.register(approver)
    _store(path, np.union1d(_load(path) if path.exists() else NONE, found))


def check(path: Path, found: Tags, *, new: bool, others: Sequence[Path] = ()) -> None:
    """Before a job encumbers anything: every record and person has to be the lineage's own.

    path: the lineage's tag file; new: its ledger holds no reserve yet, so that these data become the lineage's; others:
    tag files of the site's other lineages, named by their folders. Raises Refused `lineage.unregistered`,
    `lineage.overlap`; CheckFailed `lineage.file`.
    """
    for other in others:
        if np.intersect1d(_load(other), found, assume_unique=True).size:
            raise Refused("lineage.overlap", f"Some of these data belong to the lineage in {other.parent.name}.",
                          "Use that lineage and its budget, or data that no other lineage covers.")
    if new:
        _store(path, found)
    elif np.setdiff1d(found, _load(path) if path.exists() else NONE, assume_unique=True).size:
        raise Refused("lineage.unregistered", "Some of these data were never registered with this lineage.",
                      "Let the operator register them; they share what is left of the lineage's budget.")


def _store(path: Path, found: Tags) -> None:
    FileLayer().write_atomic(path, found.tobytes(), mode=0o600)


def _load(path: Path) -> Tags:
    data = read_private(path)
    if len(data) % TAG_BYTES:
        raise _damaged(path)
    return np.frombuffer(data, np.uint64)


def _damaged(path: Path) -> CheckFailed:
    return CheckFailed("lineage.file", f"{path.name} is damaged.", "Restore it from the site's own backup.")
