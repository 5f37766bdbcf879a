"""The transport as the round sees it: ask named sites for one stage, get an answer from each before the deadline.

Guarantees: exactly one `Answer` per asked site; an answer is credited to a site only if it replies to the message that
this site was sent and comes from its node; a note that isn't exactly of the agreed form becomes `site.malformed`; of
an error only a known `SiteCode` gets through, never a text. Vectors are held one at a time when `on_answer` is given.

On the wire: message type `train.<stage>` or `query.<stage>`; `ConfigRecord {"body": bytes}` under "c", and, if there
are vectors, an `ArrayRecord` under "arrays" of little-endian float32, uint32 or uint16 bytes (stype `consilo.le`; no
pickle, no .npy header).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from privacy.errors import SiteCode, UsageError, nearest

MAX_BODY_BYTES = 4 * 2**20
MAX_VECTOR_BYTES = 512 * 2**20  # all vectors of one note
MAX_VECTORS = 16
STYPE = "consilo.le"
DTYPES = {"float32": "<f4", "uint32": "<u4", "uint16": "<u2"}
TRAIN_STAGES = frozenset({"update", "again", "shares", "masked", "vote", "unmask"})
LOOK_S = 1.0  # how often to look whether those who are silent are still connected
GONE_S = 3.0  # offline for so long is gone; an agent that reconnects isn't
GRACE_S = 5.0  # for the rest, once a quorum has answered
UNREACHABLE = "site.unreachable"
MALFORMED = "site.malformed"

Vector = NDArray[np.float32] | NDArray[np.uint32] | NDArray[np.uint16]


@dataclass(frozen=True)
class Note:
    """What travels in a stage, either way: `body`, canonical JSON of the stage's message (at most 4 MiB), and
    `arrays`, vectors (n,) of float32, uint32 or uint16 by name (at most 16, 512 MiB together; may be empty)."""

    body: bytes
    arrays: Mapping[str, Vector] = field(default_factory=dict)


class Notes(Mapping[str, Note]):
    """Notes of a body each, made when they are sent: index, by site, in `bodies`."""

    def __init__(self, index: Mapping[str, int], bodies: Mapping[int, bytes]) -> None:
        self._index, self._bodies = index, bodies

    def __getitem__(self, site: str) -> Note:
        return Note(self._bodies[self._index[site]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


@dataclass(frozen=True)
class Answer:
    """A note, or why there is none: a `SiteCode` value, `site.unreachable` or `site.malformed`."""

    note: Note | None
    code: str | None


class Grid(Protocol):
    """What the exchange needs of a Flower `Grid`, and two methods more. Messages are `flwr.app.Message`."""

    def create_message(self, content: Any, message_type: str, dst_node_id: int, group_id: str) -> Any: ...

    def get_node_ids(self) -> Iterable[int]: ...

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]: ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        """Replies that are complete now, inflated one at a time as the caller iterates."""

    def wait(self, timeout_s: float) -> bool:
        """Sleep until there may be a reply, or the timeout. False: no reply can come any more."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """Withdraw messages and drop whatever replies to them."""

    def close(self) -> None: ...


class Exchange:
    """Stages over a grid. `nodes`: site name -> node id. One `ask` at a time."""

    def __init__(self, grid: Grid, nodes: Mapping[str, int]) -> None:
        self._grid, self._nodes = grid, dict(nodes)

    def ask(self, stage: str, notes: Mapping[str, Note], *, deadline_s: float,
            on_answer: Callable[[str, Answer], bool] | None = None, quorum: int | None = None) -> dict[str, Answer]:
        """Send each site its note and collect the answers, for at most `deadline_s` seconds.

        `on_answer(site, answer)` is called in this thread once for each site that answered, as answers arrive, and says
        whether the answer will do; then the returned answers hold no vectors. The silent get `site.unreachable`: at the
        deadline, once they have been offline for `GONE_S`, or `GRACE_S` after `quorum` answers that will do. Whatever has
        arrived by then counts, however long the others took to check.
        Raises UsageError `exchange.no_such_site`, `exchange.note` (a note of ours that is over a limit or not float32,
        uint32 or uint16).
        """
        end, good = time.monotonic() + deadline_s, 0
        gone, offline = set[str](), dict[str, float]()  # offline: since when
        kind, arrays = "train" if stage in TRAIN_STAGES else "query", dict[int, Any]()
        nodes = {site: self._node(site) for site in notes}
        messages = (self._grid.create_message(pack(note, arrays), f"{kind}.{stage}", nodes[site], "")
                    for site, note in notes.items())
        asked = dict(zip(self._grid.push_messages(messages), notes, strict=True))
        del messages, arrays
        waiting, answers = dict(asked), {site: Answer(None, UNREACHABLE) for site in notes}
        try:
            while waiting:
                last = time.monotonic() >= end
                for reply in self._grid.pull_messages(list(waiting)):
                    message = reply.metadata.reply_to_message_id
                    site = waiting.get(message)
                    if site is None or reply.metadata.src_node_id != self._nodes[site]:
                        continue
                    del waiting[message]
                    answer = read_answer(reply)
                    if on_answer is not None:
                        good += on_answer(site, answer)
                        answer = Answer(answer.note and Note(answer.note.body), answer.code)
                    answers[site] = answer
                    if quorum is not None and good >= quorum:
                        end, quorum = min(end, time.monotonic() + GRACE_S), None
                waiting = {message: site for message, site in waiting.items() if site not in gone}
                if last or not waiting or not self._grid.wait(min(max(0.0, end - time.monotonic()), LOOK_S)):
                    break
                now, there = time.monotonic(), self.online()
                offline = {site: offline.get(site, now) for site in waiting.values() if site not in there}
                gone = {site for site, since in offline.items() if now - since >= GONE_S}
        finally:
            self._grid.forget([message for message, site in asked.items() if answers[site].code == UNREACHABLE])
        return answers

    def online(self) -> set[str]:
        """Names of the sites whose agents are connected now (or were at most 20 s ago)."""
        nodes = set(self._grid.get_node_ids())
        return {site for site, node in self._nodes.items() if node in nodes}

    def wait_online(self, sites: Collection[str], deadline_s: float, least: int | None = None) -> set[str]:
        """Wait until all of `sites` are online, at most `deadline_s` seconds, and no longer than `GONE_S` once `least` of
        them are; returns those that are."""
        end, enough = time.monotonic() + deadline_s, least
        while len(there := self.online().intersection(sites)) < len(sites) and time.monotonic() < end:
            if enough is not None and len(there) >= enough:
                end, enough = min(end, time.monotonic() + GONE_S), None
            time.sleep(0.05)
        return there

    def close(self) -> None:
        self._grid.close()

    def _node(self, site: str) -> int:
        if site not in self._nodes:
            raise UsageError("exchange.no_such_site", f"There is no site {site!r} on the roster.",
                             nearest(site, self._nodes))
        return self._nodes[site]


def read_answer(reply: Any) -> Answer:
    """A Flower message as an answer. Never raises on what a site made, and never keeps its words."""
    if reply.has_error():
        known = reply.error.reason in set(SiteCode)
        return Answer(None, str(reply.error.reason) if known else MALFORMED)
    note = unpack(reply.content)
    return Answer(note, None if note else MALFORMED)


def pack(note: Note, packed: dict[int, Any] | None = None) -> Any:
    """A note as a Flower `RecordDict`. Raises UsageError `exchange.note`. packed: the notes whose arrays
    several messages share, by identity, and those arrays."""
    size = sum(vector.nbytes for vector in note.arrays.values())
    if len(note.body) > MAX_BODY_BYTES or len(note.arrays) > MAX_VECTORS or size > MAX_VECTOR_BYTES:
        raise UsageError("exchange.note", f"A note of {len(note.body)} + {size} bytes is over the limits.",
                         "Use a smaller adapter, or fewer sites in one session.")
    if any(vector.ndim != 1 or vector.dtype.name not in DTYPES for vector in note.arrays.values()):
        raise UsageError("exchange.note", "A note's array isn't a float32, uint32 or uint16 vector.", "Convert it first.")
    records = RecordDict({"c": ConfigRecord({"body": note.body})})
    packed = {} if packed is None else packed
    if note.arrays and id(note) not in packed:
        packed[id(note)] = note, ArrayRecord({
            name: Array(vector.dtype.name, vector.shape, STYPE,
                        vector.astype(DTYPES[vector.dtype.name], copy=False).tobytes())
            for name, vector in note.arrays.items()})
    if note.arrays:
        records["arrays"] = packed[id(note)][1]
    return records


def unpack(content: Any) -> Note | None:
    """The note in a `RecordDict` that a stranger made; None if it isn't exactly of the form above."""
    config, record = content.get("c"), content.get("arrays")
    if (not isinstance(config, ConfigRecord) or set(config) != {"body"} or not isinstance(config["body"], bytes)
            or len(config["body"]) > MAX_BODY_BYTES or set(content) - {"c", "arrays"}):
        return None
    if record is None:
        return Note(config["body"])
    if (not isinstance(record, ArrayRecord) or not 1 <= len(record) <= MAX_VECTORS
            or sum(len(array.data) for array in record.values()) > MAX_VECTOR_BYTES):
        return None
    arrays = {}
    for name, array in record.items():
        wire = DTYPES.get(array.dtype)
        if (array.stype != STYPE or wire is None or len(array.shape) != 1
                or len(array.data) != array.shape[0] * np.dtype(wire).itemsize):
            return None
        arrays[name] = np.frombuffer(array.data, wire).astype(array.dtype, copy=False)
    return Note(config["body"], arrays)
