"""Bugs that somebody could make, planted into the product one at a time: what chaos must find. Each is a patch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fl_client.round as round_module
import fl_server.roll_call
import fl_server.run
import privacy.files
import privacy.secagg.site as site_module
from fl_client.journal import SiteJournal
from fl_client.replies import Replies
from fl_client.round import SiteRound
from fl_client.statements import SiteStatements
from fl_client.witness import Witness
from fl_server.journal import read_events
from fl_server.recovery import recover
from privacy.bundle import BundleWriter
from privacy.files import FileLayer
from privacy.ledger import Ledger
from privacy.ledger_file import LedgerFile
from privacy.secagg.site import SiteSession

Plant = Callable[[pytest.MonkeyPatch], None]


def _unsynced(layer: FileLayer, fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[privacy.files.os.write(fd, view):]


def reserves_not_synced(patch: pytest.MonkeyPatch) -> None:
    """The ledger's records are left to the kernel."""
    patch.setattr(LedgerFile, "append", lambda self, line: _unsynced(self._files, self._fd, line))


def journal_not_synced(patch: pytest.MonkeyPatch) -> None:
    """The site's journal is left to the kernel."""
    append = SiteJournal._append

    def lazy(self: SiteJournal, event: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(FileLayer, "append", _unsynced)
            append(self, event)

    patch.setattr(SiteJournal, "_append", lazy)


def no_fsync_of_the_folder(patch: pytest.MonkeyPatch) -> None:
    """A file is replaced, and its new name left to the kernel."""
    def write_atomic(layer: FileLayer, path: Path, data: bytes, *, mode: int = 0o644) -> None:
        tmp = path.with_name(f".{path.name}.{privacy.files.os.getpid()}.tmp")
        os_ = privacy.files.os
        fd = os_.open(tmp, os_.O_WRONLY | os_.O_CREAT | os_.O_TRUNC, mode)
        layer.append(fd, data)
        os_.close(fd)
        tmp.replace(path)

    patch.setattr(FileLayer, "write_atomic", write_atomic)


def names_not_synced(patch: pytest.MonkeyPatch) -> None:
    """New logs are durable, their names aren't."""
    patch.setattr(FileLayer, "sync_folder", lambda layer, folder: None)


def drawn_before_the_reserve(patch: pytest.MonkeyPatch) -> None:
    """Noise is drawn first, and paid for afterwards."""
    charged = SiteRound._charged

    def early(self: SiteRound, offer: Any, train: Callable[[], Any]) -> Any:
        delta = train()
        return charged(self, offer, lambda: delta)

    patch.setattr(SiteRound, "_charged", early)


def errors_of_the_disk_ignored(patch: pytest.MonkeyPatch) -> None:
    """A reserve that didn't reach the disk is granted all the same."""
    def append(self: LedgerFile, line: bytes) -> None:
        with suppress(OSError):
            self._files.append(self._fd, line)

    patch.setattr(LedgerFile, "append", append)


def refunded_after_a_restart(patch: pytest.MonkeyPatch) -> None:
    """What was reserved and never committed is given back when the ledger is opened."""
    honest = Ledger.open.__func__  # type: ignore[attr-defined]

    def opened(cls: type[Ledger], path: Path, signer: Any, files: FileLayer | None = None) -> Ledger:
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and lines[-1].endswith(b"\n") and json.loads(lines[-1])["body"]["kind"] == "reserve":
            (files or FileLayer()).write_atomic(path, b"".join(lines[:-1]))
        return honest(cls, path, signer, files)

    patch.setattr(Ledger, "open", classmethod(opened))


def applied_twice(patch: pytest.MonkeyPatch) -> None:
    """A restarted coordinator believes its journal: a round that was stated, but not journaled as done, is done again."""
    def forgetful(contract: Any, spec: Any, folder: Path, events: Any, bundle: BundleWriter) -> Any:
        at = recover(contract, spec, folder, events, bundle)
        journaled = sum(e["event"] == "done" for e in read_events(folder / "journal.jsonl"))
        at.attempt = at.attempt if at.done == journaled else 1 + at.attempt
        at.done = journaled
        return at

    patch.setattr(fl_server.run, "recover", forgetful)


def change_lost(patch: pytest.MonkeyPatch) -> None:
    """A restarted coordinator starts from the first adapter, though rounds were done."""
    def first(contract: Any, spec: Any, folder: Path, events: Any, bundle: BundleWriter) -> Any:
        at = recover(contract, spec, folder, events, bundle)
        at.adapter = recover(contract, spec, folder, [], bundle).adapter
        return at

    patch.setattr(fl_server.run, "recover", first)


def momentum_lost(patch: pytest.MonkeyPatch) -> None:
    """A restarted coordinator forgets the server optimiser's state."""
    def zero(contract: Any, spec: Any, folder: Path, events: Any, bundle: BundleWriter) -> Any:
        at = recover(contract, spec, folder, events, bundle)
        at.state = recover(contract, spec, folder, [], bundle).state
        return at

    patch.setattr(fl_server.run, "recover", zero)


def attempts_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A restarted coordinator numbers attempts from 0 again."""
    def from_zero(contract: Any, spec: Any, folder: Path, events: Any, bundle: BundleWriter) -> Any:
        at = recover(contract, spec, folder, events, bundle)
        at.attempt, at.torn = 0, False
        return at

    patch.setattr(fl_server.run, "recover", from_zero)


def secrets_kept_for_a_retry(patch: pytest.MonkeyPatch) -> None:
    """A site takes the secrets of the attempt before: what hid it then may be known by now."""
    kept: dict[tuple[str, int], bytes] = {}
    m3 = SiteSession._m3

    def dealing(self: SiteSession, own: Any, m2: Any) -> bytes:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(site_module.secrets, "token_bytes",
                          lambda n: kept.setdefault((self.offer.run, self.index), os.urandom(n)))
            return m3(self, own, m2)

    patch.setattr(SiteSession, "_m3", dealing)


def masks_out_of_context(patch: pytest.MonkeyPatch) -> None:
    """One long-lived seed for each site, and a mask key that isn't bound to the attempt."""
    patch.setattr(site_module.secrets, "token_bytes", lambda n: bytes(n))
    patch.setattr(site_module.tr, "self_mask_info", lambda view, u: b"self" + bytes([u]))


def replies_made_anew(patch: pytest.MonkeyPatch) -> None:
    """A repeated message is handled as if it were new."""
    once = Replies.once

    def never(self: Replies, name: str, handler: Any) -> Any:
        run = once(self, name, handler)

        def anew(body: bytes, arrays: Any) -> Any:
            self._stored.pop(name, None)
            return run(body, arrays)

        return anew

    patch.setattr(Replies, "once", never)


def rounded_anew(patch: pytest.MonkeyPatch) -> None:
    """A repeated M4 is answered with the update, encoded and masked again."""
    m5 = SiteSession.m5
    plain: dict[int, Any] = {}

    def again(self: SiteSession, m4: bytes, encoded: Any) -> Any:
        if self._next == "m7":
            self._next, self._last = "m5", None
            encoded = plain[id(self)].copy()
            encoded[:1] += 1  # as another rounding would
        plain[id(self)] = encoded.copy()
        return m5(self, m4, encoded)

    replies_made_anew(patch)
    patch.setattr(SiteSession, "m5", again)


def begun_again(patch: pytest.MonkeyPatch) -> None:
    """After a restart, or for a repeated offer, an attempt is begun a second time."""
    patch.setattr(SiteJournal, "last", lambda self, run: (0, -1, 0))
    patch.setattr(SiteJournal, "spent_from", lambda self, adapter: False)
    replies_made_anew(patch)


def started_is_not_journaled(patch: pytest.MonkeyPatch) -> None:
    """A crash after M1, and the attempt could be begun again."""
    patch.setattr(SiteJournal, "started", lambda self, *args: None)


def spent_is_not_journaled(patch: pytest.MonkeyPatch) -> None:
    """A crash after M5, and without noise the adapter could be trained from again."""
    patch.setattr(SiteJournal, "spent", lambda self, *args: None)


def unmasked_is_not_journaled(patch: pytest.MonkeyPatch) -> None:
    """Nobody can say later which sums a site let be known."""
    patch.setattr(SiteJournal, "unmasked", lambda self, *args: None)


def drawn_twice(patch: pytest.MonkeyPatch) -> None:
    """The site trains again when it is not content with the first update: two draws for one charge."""
    charged = SiteRound._charged

    def again(self: SiteRound, offer: Any, train: Callable[[], Any]) -> Any:
        return charged(self, offer, lambda: (train(), train())[1])

    patch.setattr(SiteRound, "_charged", again)


def not_committed(patch: pytest.MonkeyPatch) -> None:
    """The update leaves with its reserve alone."""
    patch.setattr(Ledger, "commit", lambda self, seq, steps: None)


def epsilon_halved(patch: pytest.MonkeyPatch) -> None:
    """Sites claim half of what they spent."""
    honest = Ledger.epsilon
    patch.setattr(Ledger, "epsilon", lambda self: honest(self) / 2)


def untyped_error(patch: pytest.MonkeyPatch) -> None:
    """A garbled message raises whatever the parser raises."""
    load = round_module._load

    def careless(model: Any, body: bytes) -> Any:
        json.loads(body)
        return load(model, body)

    patch.setattr(round_module, "_load", careless)


def unsealed_by_an_error(patch: pytest.MonkeyPatch) -> None:
    """What was stated counts as logged, whether or not the log took it, and a failing disk ends the run for good."""
    def publish(self: Any, *, without: Any = ()) -> None:
        stated, self._stated = self._stated, []
        self._witnessing.publish(stated, without=without)

    patch.setattr(fl_server.run.Run, "_publish", publish)
    patch.setattr(fl_server.run, "OSError", ZeroDivisionError, raising=False)


def statements_not_kept(patch: pytest.MonkeyPatch) -> None:
    """A site signs, and keeps no copy for its own evidence."""
    init = SiteStatements.__init__
    patch.setattr(SiteStatements, "__init__", lambda self, *a: init(self, *a[:-1], lambda kind, envelope: None))


def witness_forgets(patch: pytest.MonkeyPatch) -> None:
    """The head is kept in memory only."""
    cosign = Witness.cosign

    def unkept(self: Witness, *args: Any) -> Any:
        files, self._files = self._files, _Nothing()  # type: ignore[assignment]
        try:
            return cosign(self, *args)
        finally:
            self._files = files

    patch.setattr(Witness, "cosign", unkept)


class _Nothing:
    def write_atomic(self, path: Path, data: bytes) -> None:
        pass


def head_before_entries(patch: pytest.MonkeyPatch) -> None:
    """The log's head is signed and sent before its entries are durable."""
    append = FileLayer.append

    def unsynced(layer: FileLayer, fd: int, data: bytes) -> None:
        if data[:32].isalnum() and data[32:33] == b" ":
            _unsynced(layer, fd, data)
        else:
            append(layer, fd, data)

    patch.setattr(FileLayer, "append", unsynced)


def one_site_more(patch: pytest.MonkeyPatch) -> None:
    """The statement of a round names a site that isn't in its sum."""
    state = fl_server.run.Run._state

    def stated(self: Any, kind: str, subject: Any, predicate: Any) -> None:
        if kind == "round" and predicate["outcome"] == "done":
            predicate = {**predicate, "sites": sorted({*predicate["sites"], *(s.name for s in self.contract.sites)})}
        state(self, kind, subject, predicate)

    patch.setattr(fl_server.run.Run, "_state", stated)


def two_agents(patch: pytest.MonkeyPatch) -> None:
    """Nobody takes the lease."""
    def open_append(layer: FileLayer, path: Path) -> int:
        flags = privacy.files.os.O_RDWR | privacy.files.os.O_CREAT | privacy.files.os.O_APPEND
        return int(privacy.files.os.open(path, flags, 0o600))

    patch.setattr(FileLayer, "open_append", open_append)


def refusals_pile_up(patch: pytest.MonkeyPatch) -> None:
    """Every message makes the journal grow, whoever sent it."""
    once = Replies.once

    def noisy(self: Replies, name: str, handler: Any) -> Any:
        run = once(self, name, handler)

        def logged(body: bytes, arrays: Any) -> Any:
            for _ in range(60):
                handler.__self__._journal.stated("noise", "x")
            return run(body, arrays)

        return logged

    patch.setattr(Replies, "once", noisy)


def key_created_in_place(patch: pytest.MonkeyPatch) -> None:
    """A key file is opened under its name, and written then."""
    def write_private(path: Path, data: bytes) -> None:
        os = privacy.files.os
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(fd, data)
        os.fsync(fd)
        os.close(fd)

    patch.setattr("fl_client.lineage.write_private", write_private)


def torn_creation(patch: pytest.MonkeyPatch) -> None:
    """A ledger whose creation was interrupted counts as one."""
    patch.setattr("fl_client.agent.begun", lambda path: path.exists() and path.stat().st_size > 0)


def asked_once(patch: pytest.MonkeyPatch) -> None:
    """A site whose closing statement was lost signs the log's last head all the same."""
    patch.setattr(fl_server.roll_call, "TRIES", 1)
    publish = fl_server.run.Run._publish
    patch.setattr(fl_server.run.Run, "_publish", lambda self, *, without=(): publish(self))
