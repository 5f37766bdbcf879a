"""The trainer's sandbox: no network, only its own files, no other process. docs/sandbox.md says what enforces which part.

Three walls. `network`: no connection to anything, by an empty network namespace and by a filter of system calls; either
is enough. `files`: model, data and installation are readable, one scratch folder is writable, by Landlock. `limits`: no
process and no program is started, no core is dumped, the process ends with its parent.
What doesn't hold on a machine is reported with a reason, and refused if it is required. A wall counts as holding only
after an attempt to pass it has failed. Nothing here imports more than the standard library, so that there is one thread.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from fl_client import kernel
from privacy.errors import Refused

Wall = Literal["network", "files", "limits"]
WALLS: tuple[Wall, ...] = ("network", "files", "limits")
ENFORCED = "enforced"
MENDS = {
    "network.open": "Allow user namespaces, or seccomp on x86-64 or AArch64, to the agent.",
    "files.landlock": "Use a kernel with Landlock (Linux 6.2 or newer, `landlock` in /sys/kernel/security/lsm), and a "
                      "container profile that allows its system calls.",
    "files.truncate": "Use Linux 6.2 or newer: before it, Landlock lets a process empty files.",
    "files.modes": "Allow seccomp on x86-64 or AArch64 to the agent: Landlock alone lets a process change modes.",
    "files.overlap": "Keep keys and state out of the folders of Python, of libraries, and of what the site makes readable.",
    "limits.processes": "Allow seccomp on x86-64 or AArch64 to the agent.",
}
OPEN_FILES = 4096
FIRST_TRUNCATE = 3  # Landlock ABI
OURS = ("fl_client", "privacy", "strategies")
SYSTEM = ("/usr", "/lib", "/lib64", "/proc", "/sys", "/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime",
          "/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/os-release", "/etc/nvidia")
DEVICES = ("null", "zero", "full", "random", "urandom", "nvidia*")


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """required: walls without which no model is loaded. hidden: keys and state, which must be out of reach.
    readable: files and folders beyond model, data and installation. memory_mib: of private memory; 0 is no limit.
    nice: added to the scheduling priority, 0 to 19.
    """

    required: tuple[Wall, ...] = ()
    hidden: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    memory_mib: int = 0
    nice: int = 0


def enter(sandbox: Sandbox, *, scratch: str, parent: int) -> dict[str, str]:
    """Put this process, which must still have one thread, inside for good. Returns wall -> ENFORCED or a key of MENDS.

    scratch: the one folder that stays writable; HOME and TMPDIR point there. parent: process id of who must outlive us.
    Raises Refused `sandbox.unavailable` (a required wall doesn't hold), `sandbox.unreadable` (of `readable`).
    """
    if len([*Path("/proc/self/task").iterdir()]) > 1:  # the others would stay outside
        raise Refused("sandbox.unavailable", "Something starts a thread as soon as Python does.",
                      "Remove it from site-packages: a .pth file or a sitecustomize.")
    readable = [Path(path).resolve() for path in sandbox.readable]
    _limit(sandbox)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    network = _done(kernel.enter_empty_network)
    kernel.drop_capabilities()
    _check_readable(readable)
    grants = _grants(readable, Path(scratch))
    files = kernel.landlock_abi() > 0 and _done(lambda: kernel.restrict_files(grants))
    os.chdir(scratch)
    os.environ.update(HOME=scratch, TMPDIR=scratch)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit  # it died before it could take us along
    filtered = _done(kernel.filter_system_calls)
    held = {"network": ENFORCED if (network or filtered) and not _reaches_network() else "network.open",
            "files": _why_files(sandbox, grants, files, filtered),
            "limits": ENFORCED if filtered and not _forks() else "limits.processes"}
    for wall in sandbox.required:
        if held[wall] != ENFORCED:
            raise Refused("sandbox.unavailable", f"The trainer's wall `{wall}` doesn't hold here ({held[wall]}).",
                          MENDS[held[wall]])
    return held


def _done(wall: Callable[[], object]) -> bool:
    try:
        wall()
    except OSError:
        return False
    return True


def _limit(sandbox: Sandbox) -> None:
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: OPEN_FILES}
    if sandbox.memory_mib:
        limits[resource.RLIMIT_DATA] = sandbox.memory_mib * 2**20
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
    os.nice(sandbox.nice)


def _check_readable(paths: list[Path]) -> None:
    for path in paths:
        try:
            path.stat()
        except FileNotFoundError:
            continue  # loading says so, with the right code
        except OSError:
            found = False
        else:
            found = os.access(path, os.R_OK)
        if not found:
            raise Refused("sandbox.unreadable", f"The trainer may not read {path.name}.", "Make it readable to the "
                          "agent's own user or group; root's rights over the files of others end at the sandbox.")


def _grants(readable: list[Path], scratch: Path) -> dict[Path, int]:
    """What Landlock lets through. A folder grants all below it, so /etc and the folders above the packages aren't here."""
    grants = {device: kernel.DEVICE for pattern in DEVICES for device in Path("/dev").glob(pattern)}
    for entry in map(Path, sys.path):  # imports list it; what it holds may be more than packages
        packages = entry.name in ("site-packages", "dist-packages") or entry.suffix == ".zip"
        grants[entry] = kernel.READ if packages else kernel.LIST
    libraries = [Path(path) for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    installation = [Path(prefix) / lib for prefix in (sys.prefix, sys.base_prefix) for lib in ("lib", "lib64")]
    for path in (*map(Path, SYSTEM), *installation, *libraries, *_our_folders(), *readable, *_linked(readable)):
        grants[path] = kernel.READ
    return grants | {scratch: kernel.WRITE}


def _linked(folders: list[Path]) -> Iterator[Path]:
    """Files that the folders hold as links: a model of the Hugging Face cache is one."""
    for folder in folders:
        if folder.is_dir():
            yield from (file.resolve() for file in folder.iterdir() if file.is_symlink())


def _our_folders() -> Iterator[Path]:
    for name in OURS:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent


def _why_files(sandbox: Sandbox, grants: dict[Path, int], restricted: bool, filtered: bool) -> str:
    hidden = [Path(path).resolve() for path in sandbox.hidden]
    granted = [path.resolve() for path, rights in grants.items() if rights & kernel.READ_FILE]
    if not restricted or _done(lambda: [*Path("/").iterdir()]):
        return "files.landlock"
    if any(h.is_relative_to(g) or g.is_relative_to(h) for h in hidden for g in granted):
        return "files.overlap"
    if kernel.landlock_abi() < FIRST_TRUNCATE:
        return "files.truncate"
    return ENFORCED if filtered else "files.modes"


def _reaches_network() -> bool:
    """Connecting a UDP socket sends nothing."""

    def connect() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect(("127.0.0.1", 9))

    return _done(connect)


def _forks() -> bool:
    try:
        child = os.fork()
    except OSError:
        return False
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True
