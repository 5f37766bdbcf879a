"""The file layer: durable writes, append-only logs, private keys. All that must survive kill -9 goes through here.

`FileLayer` is an object so that tests can put a failing one in its place.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from privacy.errors import Refused, UsageError

MAX_INPUT_BYTES = 64 * 2**20


class FileLayer:
    """POSIX calls behind the ledger and the journals. Each method is one durable step."""

    def open_append(self, path: Path) -> int:
        """Open (create with mode 0600) for appending and take an exclusive lease. Raises Refused `file.leased`."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            raise Refused("file.leased", f"{path.name} is held by another process.",
                          "Stop the other process, or wait for its job to end.") from e
        return fd

    def sync_folder(self, folder: Path) -> None:
        """Make the names of new files in a folder durable."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def append(self, fd: int, data: bytes) -> None:
        """Append all bytes and fsync. A short write is completed; an error propagates with nothing promised."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
        os.fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def write_atomic(self, path: Path, data: bytes, *, mode: int = 0o644) -> None:
        """Replace a file: temporary file, fsync, rename, fsync of the folder."""
        tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            self.append(fd, data)
        finally:
            os.close(fd)
        tmp.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_private(path: Path, data: bytes) -> None:
    """Create a key file, mode 0600, whole or not at all. Raises Refused `key.exists` rather than overwrite."""
    layer, tmp = FileLayer(), path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.unlink(missing_ok=True)
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            layer.append(fd, data)
        finally:
            os.close(fd)
        os.link(tmp, path)
    except FileExistsError as e:
        raise Refused("key.exists", f"{path.name} exists already.", "Move the old key away first.") from e
    finally:
        tmp.unlink(missing_ok=True)
    layer.sync_folder(path.parent)


def read_private(path: Path) -> bytes:
    """Read a key file. Raises Refused `key.permissions` if group or others may read it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as e:
        raise UsageError("key.missing", f"The key file {path.name} can't be read.", "Check the path.") from e
    if mode & 0o077:
        raise Refused("key.permissions", f"{path.name} is open to others (mode {mode:04o}).",
                      f"chmod 600 {path.name}, and treat the key as disclosed.")
    return path.read_bytes()


def read_file(path: Path, *, limit: int = MAX_INPUT_BYTES) -> bytes:
    """Read an input file up to a limit. Raises UsageError `file.missing`, `file.too_large`."""
    try:
        if path.stat().st_size > limit:
            raise UsageError("file.too_large", f"{path.name} is larger than {limit} bytes.", "Give the right file.")
        return path.read_bytes()
    except OSError as e:
        raise UsageError("file.missing", f"{path.name} can't be read.", "Check the path.") from e
