"""A ledger's file: leased to one process, appended durably. Every failure of the disk becomes `ledger.write_failed`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from privacy.errors import Refused
from privacy.files import FileLayer


class LedgerFile:
    """Holds the lease until `close`. Raises Refused `file.leased`, `ledger.write_failed`."""

    def __init__(self, path: Path, files: FileLayer) -> None:
        self._files, self._folder = files, path.parent
        with _writing():
            self._fd = files.open_append(path)

    def read(self) -> bytes:
        """All bytes of the leased file: through its descriptor, so that no other file can take its place."""
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def append(self, line: bytes) -> None:
        """On disk when it returns."""
        with _writing():
            self._files.append(self._fd, line)

    def sync(self) -> None:
        """Make what was found durable: its writer may have been killed before it was."""
        self.append(b"")

    def truncate(self, size: int) -> None:
        with _writing():
            self._files.truncate(self._fd, size)

    def sync_name(self) -> None:
        """Make a new file's name durable."""
        with _writing():
            self._files.sync_folder(self._folder)

    def close(self) -> None:
        """Give the lease back; again is harmless."""
        if self._fd >= 0:
            self._files.close(self._fd)
        self._fd = -1


def begun(path: Path) -> bool:
    """Whether the file holds a record. One whose creation was interrupted doesn't, and nothing was granted from it."""
    return path.is_file() and b"\n" in path.read_bytes()


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise Refused("ledger.write_failed", f"The ledger can't be written ({e.strerror or type(e).__name__}).",
                      "Free or repair the disk, then start the job again.") from e
