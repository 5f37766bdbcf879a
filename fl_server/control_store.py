"""What the control plane serves: files that others signed, in folders of the coordinator.

Guarantees: a name from outside is used as a path only after it matched its pattern; no link inside a run is followed; a
site has at most one approval a contract, which is never replaced; documents over their limits are refused.

    roster.json                             as `fl-ca roster --out` wrote it
    contracts/<digest>/contract.json        canonical; <digest> is its SHA-256
                       signature.json       what the engineer signed, if there is one
                       approvals/<site>.json
    runs/<run>/                             the run's output folder or a link to it: evidence/, adapter/
    enrolments/<id>/request.json            to be carried to the CA
                    answer.json             what the CA made of it, put here by the operator

The trust folder (root.pem, issuing-*.pem, crl-*.pem) lies elsewhere; it is the coordinator's own.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Literal

from privacy.canonical import parse
from privacy.control import CHUNK_BYTES, MAX_APPROVAL_BYTES
from privacy.control.reasons import reason
from privacy.errors import ConsiloError, UsageError
from privacy.files import FileLayer, read_file
from privacy.identity import Peer, Role

MAX_LISTED = 1000  # contracts
_RUN, _DIGEST = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*/)?[A-Za-z0-9][A-Za-z0-9_.-]*")
Part = tuple[str, bytes, bool, bytes]  # file, data, whether it is the file's last, then the file's SHA-256


class ControlStore:
    """`root`: the folder described above, made if it isn't there."""

    def __init__(self, root: Path, layer: FileLayer | None = None) -> None:
        self.root, self._layer, self._lock = root, layer or FileLayer(), threading.Lock()
        for name in ("contracts", "runs", "enrolments"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def roster(self) -> bytes:
        return self._read(self.root / "roster.json")

    def contracts(self, reader: Peer) -> list[str]:
        """Digests of what the reader may see, sorted."""
        found = sorted(p.name for p in (self.root / "contracts").iterdir() if _DIGEST.fullmatch(p.name))[:MAX_LISTED]
        return [digest for digest in found if _may_read(reader, self._read(self._contract(digest) / "contract.json"))]

    def contract(self, digest: str, reader: Peer) -> tuple[bytes, bytes]:
        """(contract, signature or b""). Raises UsageError `control.not_found`."""
        folder = self._contract(digest)
        data = self._read(folder / "contract.json")
        if not _may_read(reader, data):
            raise reason("control.not_found")
        signature = folder / "signature.json"
        return data, self._read(signature) if signature.exists() else b""

    def approve(self, digest: str, site: Peer, envelope: bytes) -> None:
        """Keep a site's approval; the same bytes again are no error. Raises UsageError `control.not_found`,
        `control.too_large`; Refused `control.approved`."""
        if not 0 < len(envelope) <= MAX_APPROVAL_BYTES:
            raise reason("control.too_large")
        self.contract(digest, site)
        path = self._contract(digest) / "approvals" / f"{site.name}.json"
        with self._lock:
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                self._layer.write_atomic(path, envelope)
            elif self._read(path) != envelope:
                raise reason("control.approved")

    def parts(self, kind: Literal["evidence", "adapter"], run: str, reader: Peer, after: str) -> Iterator[Part]:
        """The files of a finished run from the one after `after` on, in chunks. Raises UsageError `control.not_found`."""
        folder = self.root / "runs" / run
        evidence = folder / "evidence"
        if (not _RUN.fullmatch(run) or not (evidence / "manifest.json").is_file() or not (folder / kind).is_dir()
                or not _may_read(reader, self._read(evidence / "contract.json"))):
            raise reason("control.not_found")
        return (part for name in _names(folder / kind) if name > after for part in _parts(folder / kind, name))

    def publish_contract(self, digest: str, contract: bytes, signature: bytes = b"") -> None:
        """For the coordinator's operator. Raises UsageError `control.digest`."""
        if sha256(contract).hexdigest() != digest:
            raise UsageError("control.digest", "The contract is not the one with that digest, or not canonical.",
                             "Publish the file that `fl-server contract create` wrote.")
        folder = self.root / "contracts" / digest
        folder.mkdir(exist_ok=True)
        if signature:
            self._layer.write_atomic(folder / "signature.json", signature)
        self._layer.write_atomic(folder / "contract.json", contract)

    def publish_run(self, run: str, folder: Path) -> None:
        """Serve a run's output folder once its evidence is sealed. For the coordinator's operator."""
        link = self.root / "runs" / run
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(folder.resolve(), target_is_directory=True)

    def _contract(self, digest: str) -> Path:
        folder = self.root / "contracts" / digest
        if not _DIGEST.fullmatch(digest) or not (folder / "contract.json").is_file():
            raise reason("control.not_found")
        return folder

    def _read(self, path: Path) -> bytes:
        try:
            return read_file(path)
        except UsageError as e:
            raise reason("control.store") from e


def _may_read(reader: Peer, contract: bytes) -> bool:
    """A site reads what names it; engineers and auditors read all."""
    if reader.role is not Role.SITE:
        return True
    try:
        return reader.name in [site["name"] for site in parse(contract)["sites"]]
    except (ConsiloError, KeyError, TypeError) as e:
        raise reason("control.store") from e


def _names(folder: Path) -> list[str]:
    """Regular files, at most one folder deep, sorted."""
    there = ((path, path.relative_to(folder).as_posix()) for path in (*folder.glob("*"), *folder.glob("*/*")))
    return sorted(name for path, name in there if _FILE.fullmatch(name) and path.is_file()
                  and not path.is_symlink() and not path.parent.is_symlink())


def _parts(folder: Path, name: str) -> Iterator[Part]:
    digest = sha256()
    with _open(folder / name) as file:
        data = file.read(CHUNK_BYTES)
        while True:
            digest.update(data)
            following = file.read(CHUNK_BYTES)
            yield name, data, not following, b"" if following else digest.digest()
            if not following:
                return
            data = following


def _open(path: Path) -> BinaryIO:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise reason("control.store") from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise reason("control.store")
    return os.fdopen(fd, "rb")
