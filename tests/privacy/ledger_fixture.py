"""A signer, a mechanism, and file layers that crash, fail or forget: for the ledger's tests."""

import datetime
import errno
import os
import types

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from privacy.files import FileLayer
from privacy.identity import fingerprint
from privacy.ledger import Ledger
from privacy.mechanism import DpMechanism

LINEAGE, RUN, OTHER, CONTRACT = "1a" * 16, "2b" * 16, "3c" * 16, "4d" * 32


class SelfSigner:
    """An Ed25519 key under a certificate of its own."""

    def __init__(self, seed: bytes | None = None) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed) if seed else Ed25519PrivateKey.generate()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site")])
        start = datetime.datetime(2026, 1, 1)
        self.certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name)
                            .public_key(self._key.public_key()).serial_number(7).not_valid_before(start)
                            .not_valid_after(start + datetime.timedelta(days=3650)).sign(self._key, None))
        self.fingerprint = fingerprint(self.certificate)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)


def mechanism(**changes) -> DpMechanism:
    """Cheap to account for: narrow losses."""
    return DpMechanism(**{"trust": "local", "unit": "record", "adjacency": "add_remove", "sampler": "poisson", "q": 0.5,
                          "clip": 1.0, "sigma": 20.0, "steps": 1, "delta": 1e-5, "n_decl": 500, **changes})


def create(path, signer, *, cap=8.0, files=None, kind=Ledger, lineage=LINEAGE):
    return kind.create(path, signer, lineage=lineage, unit="record", adjacency="add_remove", delta=1e-5, cap=cap,
                       files=files)


def encumber(ledger, rounds=12, *, run=RUN, cap=None, **changes):
    return ledger.encumber(run, [[(mechanism(**changes), rounds)]], contract=CONTRACT, approver="dr.a", cap=cap)


def reserve(ledger, round, *, run=RUN, attempt=0, hold=True, **changes):
    """hold: a run that has encumbered nothing yet encumbers a dozen such rounds first."""
    if hold and run not in {e.run for e in ledger.summary().encumbrances}:
        encumber(ledger, run=run, **changes)
    return ledger.reserve(mechanism(**changes), run=run, contract=CONTRACT, round=round, attempt=attempt, code="0.1.0",
                          approver="dr.a")


class Crash(Exception):
    """The machine stops here."""


class Disk(FileLayer):
    """Each append is four system calls: half of the bytes, the rest, fsync, return. What was not synced is lost at
    will after a crash. `stop_at` counts system calls; `error` makes that one fail instead of stopping the machine."""

    def __init__(self, stop_at: int = -1, error: int | None = None) -> None:
        self.stop_at, self.error, self.calls, self.synced = stop_at, error, 0, 0
        self.events: list[str] = []

    def _call(self, name: str) -> None:
        self.calls += 1
        self.events.append(name)
        if self.calls == self.stop_at:
            raise OSError(self.error, os.strerror(self.error)) if self.error else Crash(name)

    def append(self, fd: int, data: bytes) -> None:
        half = len(data) // 2
        self._call("write")
        os.write(fd, data[:half])
        self._call("write")
        os.write(fd, data[half:])
        self._call("fsync")
        self.sync(fd)
        self._call("done")

    def sync(self, fd: int) -> None:
        os.fsync(fd)
        self.synced = os.fstat(fd).st_size

    def truncate(self, fd: int, size: int) -> None:
        self._call("truncate")
        super().truncate(fd, size)
        self.synced = size

    def lose_power(self, path, keep: float) -> None:
        """Keep what was synced and a share of what was not."""
        size = path.stat().st_size
        os.truncate(path, self.synced + int(keep * (size - self.synced)))


class NoSync(Disk):
    """Planted bug: an append that does not sync."""

    def sync(self, fd: int) -> None:
        pass


class Late(Ledger):
    """Planted bug: a ledger that grants first and writes later, or never."""

    def _append(self, body):
        if body.kind != "reserve":
            return super()._append(body)
        file = self._file
        self._file = types.SimpleNamespace(append=lambda line: None)
        try:
            return super()._append(body)
        finally:
            self._file = file


FULL, BROKEN = errno.ENOSPC, errno.EIO
