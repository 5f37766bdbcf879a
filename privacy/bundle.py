"""The run bundle: its layout, and how the folder is written and read.

Guarantees: a writer that was killed goes on with the next number and never overwrites a statement; the same envelope
added twice is stored once; a sealed bundle is never written again. `read_bundle` follows no link, leaves the folder
never, reads nothing whose name isn't in the format, and stops at named limits. What it returns is UNVERIFIED; only
`privacy.verify` turns it into facts. The format is docs/evidence-format.md; what statements say is `privacy.predicates`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from privacy.canonical import MAX_JSON_BYTES, canonical
from privacy.contract import Sha256
from privacy.errors import CheckFailed, Refused, UsageError
from privacy.files import FileLayer, read_file
from privacy.identity import Signer
from privacy.predicates import KINDS, Kind, Predicate
from privacy.statements import make
from privacy.transparency import Entry, Frontier

MAX_FILES = 50_000  # 100 sites over 400 rounds, with room for void ones
MAX_FILE_BYTES = MAX_JSON_BYTES  # the largest document is a ledger extract
MAX_BUNDLE_BYTES = 512 * 2**20
MAX_STATEMENTS = 999_999  # six digits

_NAME = r"[a-z0-9][a-z0-9_.-]{0,62}"
_STATEMENT = re.compile(rf"statements/([0-9]{{6}})-({'|'.join(KINDS)})-({_NAME})\.json")
_FIXED = re.compile(rf"manifest\.json|contract\.json|certificates/{_NAME}\.pem|ledgers/{_NAME}\.jsonl"
                    r"|log/(before\.json|entries\.txt|[0-9]{8}\.json)")
FOLDERS = ("certificates", "ledgers", "log", "statements")


@dataclass(frozen=True)
class Layout:
    """Which relative paths a kind of bundle may hold: its folders, and a pattern for whole paths."""

    folders: tuple[str, ...]
    names: re.Pattern[str]


LAYOUT = Layout(FOLDERS, re.compile(f"{_FIXED.pattern}|{_STATEMENT.pattern}"))


class Manifest(Predicate):
    files: dict[str, Sha256] = Field(max_length=MAX_FILES)


MANIFEST = Kind("manifest", "urn:consilo:manifest:1", "coordinator", Manifest)


def statement_name(path: str) -> tuple[int, str, str] | None:
    """(number, kind, who) of a statement's relative path, or None for any other path."""
    match = _STATEMENT.fullmatch(path)
    return (int(match[1]), match[2], match[3]) if match else None


@dataclass(frozen=True)
class RawBundle:
    """Raw bytes by relative path (POSIX, sorted). Nothing here has been verified."""

    files: Mapping[str, bytes]

    def sha256(self, path: str) -> str:
        return hashlib.sha256(self.files[path]).hexdigest()

    def under(self, folder: str) -> dict[str, bytes]:
        """Files of one subfolder, by the name without folder and suffix."""
        return {Path(p).stem: data for p, data in self.files.items() if p.startswith(f"{folder}/")}


def read_bundle(path: Path, layout: Layout = LAYOUT) -> RawBundle:
    """Read a bundle folder (a run's, if `layout` isn't given). Raises UsageError `bundle.missing`; CheckFailed
    `bundle.layout` (a link, a special file, a name or folder that the format doesn't know) and `bundle.limits`. No error
    quotes a name found in the folder."""
    if not path.is_dir():
        raise UsageError("bundle.missing", "There is no bundle folder at that path.", "Give its folder.")
    files: dict[str, bytes] = {}
    total = 0
    for name in _names(path, layout):
        data = _read(path / name)
        total += len(data)
        if total > MAX_BUNDLE_BYTES:
            raise _limits(f"the files are larger than {MAX_BUNDLE_BYTES} bytes together")
        files[name] = data
    return RawBundle(files)


def _names(root: Path, layout: Layout) -> list[str]:
    """Relative paths of all files, sorted; everything else than the format's files and folders is refused."""
    names: list[str] = []
    for folder in ("", *layout.folders):
        here = root / folder
        if folder and here.is_symlink():
            raise _layout("a folder is a symbolic link")
        if not here.is_dir():
            continue
        with os.scandir(here) as entries:
            for entry in entries:
                if not folder and entry.name in layout.folders and entry.is_dir():
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                if not entry.is_file(follow_symlinks=False):
                    raise _layout("there is a link, a special file or a folder that doesn't belong")
                if not layout.names.fullmatch(name):
                    raise _layout("there is a file whose name isn't in the format")
                names.append(name)
                if len(names) > MAX_FILES:
                    raise _limits(f"there are more than {MAX_FILES} files")
    return sorted(names)


def _read(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise _layout("a file can't be opened") from e
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _layout("there is a special file")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise _limits(f"a file is larger than {MAX_FILE_BYTES} bytes")
    return data


def _layout(why: str) -> CheckFailed:
    return CheckFailed("bundle.layout", f"The folder isn't a bundle: {why}.", "Ask for the bundle again, unchanged.")


def _limits(why: str) -> CheckFailed:
    return CheckFailed("bundle.limits", f"The bundle is too large: {why}.", "Ask for the bundle again, unchanged.")


class BundleWriter:
    """Writes a bundle as its events come, each durable before the call returns; see the module's docstring."""

    def __init__(self, folder: Path, run: str, contract_bytes: bytes, root_pem: bytes,
                 issuing_pems: Mapping[str, bytes], certificates: Mapping[str, bytes],
                 *, layer: FileLayer | None = None) -> None:
        """Create the folder, or go on with an unsealed one. `issuing_pems` by role, `certificates` by name.

        Raises Refused `bundle.sealed`, `bundle.other_run` (a document there differs), UsageError `bundle.name` (also for a
        certificate under a name that a CA's has)."""
        self._root, self._run, self._layer = folder, run, layer or FileLayer()
        self._contract_sha256 = hashlib.sha256(contract_bytes).hexdigest()
        if (folder / "manifest.json").exists():
            raise Refused("bundle.sealed", "This bundle has been sealed.", "Write to a new folder.")
        for name in ("", *FOLDERS):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for left_over in (folder / name).glob(".*.tmp"):
                left_over.unlink()
            self._layer.sync_folder(folder / name)  # a statement that is found counts, so its name must be durable
        self._fix("contract.json", contract_bytes)
        self._fix("certificates/root.pem", root_pem)
        for role, pem in issuing_pems.items():
            self._fix(f"certificates/issuing-{role}.pem", pem)
        for name, pem in certificates.items():
            if name == "root" or name.startswith("issuing-"):
                raise UsageError("bundle.name", "A party bears the name of a CA.", "Ask the CA to issue another name.")
            self._fix(f"certificates/{name}.pem", pem)
        there = sorted(f"statements/{p.name}" for p in (folder / "statements").iterdir())
        self._known = {hashlib.sha256((folder / name).read_bytes()).hexdigest(): name for name in there}
        self._next = 1 + max((parts[0] for name in there if (parts := statement_name(name))), default=0)

    def add_statement(self, kind: str, who: str, envelope_bytes: bytes) -> str:
        """Store an envelope under the next number; returns its relative path. The same bytes are stored once.

        Raises Refused `bundle.sealed`, `bundle.limits`, UsageError `bundle.name` (kind or who not in the format)."""
        sha256 = hashlib.sha256(envelope_bytes).hexdigest()
        if sha256 not in self._known:
            if self._next > MAX_STATEMENTS or len(envelope_bytes) > MAX_FILE_BYTES:
                raise Refused("bundle.limits", "The statement doesn't fit a bundle.", "End the run, and start another.")
            name = f"statements/{self._next:06d}-{kind}-{who}.json"
            if statement_name(name) != (self._next, kind, who):  # "round" by "site-a" would read as "round-site" by "a"
                raise UsageError("bundle.name", "A kind or name doesn't fit the format.", "Use a-z, 0-9 and -.")
            self._write(name, envelope_bytes)
            self._known[sha256] = name
            self._next += 1
        return self._known[sha256]

    def statements(self) -> list[tuple[str, str, bytes]]:
        """(kind, who, envelope) of all that is there, in order."""
        found = []
        for name in sorted(self._known.values()):
            parts = statement_name(name)
            if parts:
                found.append((parts[1], parts[2], (self._root / name).read_bytes()))
        return found

    def add_ledger(self, site: str, extract_bytes: bytes) -> str:
        """Store a site's ledger extract; a later one of the same site replaces it."""
        name = f"ledgers/{site}.jsonl"
        self._write(name, extract_bytes)
        return name

    def add_checkpoint(self, size: int, checkpoint: bytes, witnesses: Mapping[str, bytes]) -> None:
        """Store a signed head of the log of `size` entries, with the signatures of the sites that saw it, by name."""
        self._write(f"log/{size:08d}.json", canonical({
            "checkpoint": checkpoint.decode(), "witnesses": {name: data.decode() for name, data in witnesses.items()}}))

    def set_log(self, before: Frontier, entries: Sequence[Entry]) -> None:
        """Store the log as it is: what its part before this run left, and all entries from there on."""
        self._write("log/before.json", canonical({"size": before.size, "peaks": [p.hex() for p in before.peaks]}))
        self._write("log/entries.txt", b"".join(entry.line().encode() + b"\n" for entry in entries))

    def seal(self, coordinator_signer: Signer) -> Path:
        """Sign and write manifest.json, the digest of every file; nothing is written afterwards."""
        raw = read_bundle(self._root)
        files = {name: raw.sha256(name) for name in raw.files}
        predicate = {"run": self._run, "contract": self._contract_sha256, "files": files}
        envelope = make(coordinator_signer, MANIFEST.predicate_type, [("contract.json", self._contract_sha256)],
                        predicate)
        self._write("manifest.json", envelope)
        return self._root / "manifest.json"

    def _fix(self, name: str, data: bytes) -> None:
        """Write a document once; one that is there already must be the same."""
        path = self._root / name
        if not path.exists():
            self._write(name, data)
        elif read_file(path) != data:
            raise Refused("bundle.other_run", f"{name} in this folder belongs to another run.", "Use a new folder.")

    def _write(self, name: str, data: bytes) -> None:
        if not LAYOUT.names.fullmatch(name):
            raise UsageError("bundle.name", "A name doesn't fit the bundle's format.", "Use a-z, 0-9 and -.")
        if (self._root / "manifest.json").exists():
            raise Refused("bundle.sealed", "This bundle has been sealed.", "Write to a new folder.")
        self._layer.write_atomic(self._root / name, data)
