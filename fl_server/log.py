"""The coordinator's transparency log on disk: one folder for all its runs.

Guarantees: an entry is durable before a checkpoint covers it; an entry is logged once; two runs at a time (two
processes) may share the log.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from privacy.canonical import canonical, parse
from privacy.errors import CheckFailed, ConsiloError, Refused
from privacy.files import FileLayer, read_file
from privacy.identity import Signer
from privacy.transparency import Entry, Frontier, Head, MerkleTree, sign_checkpoint

LEASE_S = 10.0  # for another run's append
_LINE = re.compile(rb"([0-9a-f]{32}) ([0-9a-f]{64})")


class TransparencyLog:
    """folder: `entries.txt` (run and digest a line), `heads.json` (sites' newest statements on their ledgers).

    name: the coordinator's, and the log's. Raises CheckFailed `log.broken`; Refused `file.leased`.
    """

    def __init__(self, folder: Path, name: str, signer: Signer, files: FileLayer | None = None) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._name, self._signer, self._files = folder, name, signer, files or FileLayer()
        self.entries: list[Entry] = []
        self.tree = MerkleTree()
        self._index: dict[Entry, int] = {}
        self._read = 0
        with self._leased():
            self._files.sync_folder(folder)

    def extend(self, entries: Sequence[Entry]) -> tuple[Head, bytes]:
        """Append those that aren't there yet; returns the new head, and the signed checkpoint."""
        with self._leased() as fd:
            new = [entry for entry in dict.fromkeys(entries) if entry not in self._index]
            data = b"".join(entry.line().encode() + b"\n" for entry in new)
            self._files.append(fd, data)  # what was found may not be durable yet: its writer may have been killed
            self._take(new)
            self._read += len(data)
            size = len(self.tree)
        head = Head(log=self._name, size=size, root=self.tree.root(size).hex())
        return head, sign_checkpoint(self._signer, head)

    def index(self, entry: Entry) -> int:
        return self._index[entry]

    def frontier(self, size: int) -> Frontier:
        """What the first `size` entries leave for going on."""
        frontier = Frontier()
        for entry in self.entries[:size]:
            frontier.append(entry.leaf)
        return frontier

    def ledger_heads(self) -> dict[str, str]:
        """Envelopes in which sites named a head of their ledger, the newest by `site lineage`."""
        path = self._folder / "heads.json"
        try:
            heads = parse(read_file(path)) if path.exists() else {}
            if isinstance(heads, dict) and all(isinstance(envelope, str) for envelope in heads.values()):
                return heads
        except ConsiloError as e:
            raise _broken(path) from e
        raise _broken(path)

    def keep_ledger_heads(self, newest: Mapping[str, str]) -> None:
        """Add to them. Durable."""
        with self._leased():
            self._files.write_atomic(self._folder / "heads.json", canonical({**self.ledger_heads(), **newest}))

    @contextmanager
    def _leased(self) -> Iterator[int]:
        """The file, with what others appended taken in. A torn last line was in no checkpoint, and is cut."""
        path, end = self._folder / "entries.txt", time.monotonic() + LEASE_S
        while True:
            try:
                fd = self._files.open_append(path)
                break
            except Refused:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        try:
            new = os.fstat(fd).st_size - self._read
            if new < 0:
                raise _broken(path)
            data = os.pread(fd, new, self._read)
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                self._files.truncate(fd, self._read + whole)
            found = [_LINE.fullmatch(line) for line in data[:whole].split(b"\n")[:-1]]
            if None in found:
                raise _broken(path)
            self._take([Entry(m[1].decode(), m[2].decode()) for m in found if m])
            self._read += whole
            yield fd
        finally:
            self._files.close(fd)

    def _take(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._index[entry] = len(self.entries)
            self.entries.append(entry)
            self.tree.append(entry.leaf)


def _broken(path: Path) -> CheckFailed:
    return CheckFailed("log.broken", f"{path.name} isn't what the coordinator wrote.",
                       "Restore the file from a copy; sites sign only what continues what they saw.")
