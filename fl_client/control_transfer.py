"""Folders that come in chunks from an untrusted server.

Guarantees: only names that are known or at most one folder deep are written, each once, in order, below the new folder;
counts and bytes are bounded; a folder appears under its name only when whatever checks it has passed.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from privacy.control import consilo_control_pb2 as pb
from privacy.errors import CheckFailed, UsageError

_PATH = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*/)?[A-Za-z0-9][A-Za-z0-9_.-]*")


class Receiver:
    """Writes chunks below `folder`. known: whether a file of that name belongs there. `last`: the last whole file.

    Raises CheckFailed `control.transfer`.
    """

    def __init__(self, folder: Path, known: Callable[[str], bool], max_files: int, max_bytes: int) -> None:
        self._folder, self._known, self._files, self._bytes = folder, known, max_files, max_bytes
        self.last = self._name = ""
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def take(self, chunk: pb.Chunk) -> None:
        if self._file is None:
            self._begin(chunk.name)
        self._bytes -= len(chunk.data)
        if self._file is None or chunk.name != self._name or self._bytes < 0:
            raise _refuse()
        self._file.write(chunk.data)
        self._digest.update(chunk.data)
        if chunk.last:
            self._file.close()
            self._file = None
            if self._digest.digest() != chunk.sha256:
                raise _refuse()
            self.last = self._name

    def end(self) -> None:
        """The stream ended as it should."""
        if self._file is not None or not self.last:
            raise _refuse()

    def drop(self) -> None:
        """Forget a file that isn't whole."""
        if self._file is not None:
            self._file.close()
            self._file = None
            (self._folder / self._name).unlink()

    def _begin(self, name: str) -> None:
        self._files -= 1
        if not _PATH.fullmatch(name) or not self._known(name) or name <= self.last or self._files < 0:
            raise _refuse()
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        self._name, self._file, self._digest = name, path.open("xb"), hashlib.sha256()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends without an error; a sibling of it is free for use.

    Raises UsageError `control.exists`.
    """
    if folder.exists():
        raise UsageError("control.exists", f"{folder.name} exists already.", "Name a new folder.")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.resolve().parent) as space:
        work = Path(space) / "new"
        work.mkdir()
        yield work
        work.rename(folder)


def adapter_tensors_digest(folder: Path) -> str:
    """`strategies.adapter.adapter_digest` of a PEFT folder, with its head if it has one; "" if it holds none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from strategies.adapter import adapter_digest

    try:
        tensors, head = load_file(folder / "adapter_model.safetensors"), folder / "head.safetensors"
        if head.exists():
            tensors |= {f"head.{name}": value for name, value in load_file(head).items()}
        return adapter_digest(tensors)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        return ""


def _refuse() -> CheckFailed:
    return CheckFailed("control.transfer", "The files that the coordinator sends are not whole, or not what belongs there.",
                       "Try again; if it fails again, tell the coordinator's operator.")
