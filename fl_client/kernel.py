"""What the trainer's sandbox asks of Linux, through ctypes: a network namespace, Landlock, a seccomp filter, prctl.

Each call binds the calling thread and all that it starts later, for good; none needs root. Raises OSError where this
kernel, its configuration or a container's profile refuses. user_namespaces(7), landlock(7), seccomp(2), prctl(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

CLONE_NEWUSER, CLONE_NEWNET, CLONE_THREAD = 0x10000000, 0x40000000, 0x10000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38

# Landlock's rights on files, by bit. Executing is in no grant, so the trainer starts no program.
READ_FILE, LIST = 1 << 2, 1 << 3
READ = READ_FILE | LIST
DEVICE = READ_FILE | 1 << 1 | 1 << 15  # read, write, ioctl
# write, remove, make folders, files and links (no sockets, no devices), move, truncate
WRITE = READ | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13 | 1 << 14
_OF_FILES = 1 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_FILE_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # ABI -> number of rights; 16 from 5 on
_TCP, _SCOPES = 0b11, 0b11  # ABI 4: bind, connect; ABI 6: abstract UNIX sockets, signals

# What the filter answers with EPERM: numbers on x86_64 and aarch64, 0 where a machine doesn't have the call.
_DENIED = {
    "socket": (41, 198), "io_uring_setup": (425, 425),  # a socket of any family
    "fork": (57, 0), "vfork": (58, 0), "execve": (59, 221), "execveat": (322, 281),  # another process or program
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "unshare": (272, 97), "setns": (308, 268),  # no more namespaces
    "chmod": (90, 0), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),  # Landlock lets these through
    "chown": (92, 0), "fchown": (93, 55), "lchown": (94, 0), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),  # access lists
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466)}
_MACHINES = {"x86_64": 0, "aarch64": 1}
_AUDIT_ARCH, _SECCOMP, _CLONE, _CLONE3 = (0xC000003E, 0xC00000B7), (317, 277), (56, 220), 435
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def prctl(option: int, value: int) -> None:
    _check(_libc.prctl(ctypes.c_long(option), *(ctypes.c_ulong(n) for n in (value, 0, 0, 0))))


def enter_empty_network() -> None:
    """A network namespace without an interface that is up, in a user namespace of our own (or as root without one).

    The process must have one thread. Owner and group stay what they were where the kernel lets us say so.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNET))
    except OSError:
        _check(_libc.unshare(CLONE_NEWNET))
        return
    with suppress(OSError):  # an AppArmor profile may refuse the maps; the namespaces hold all the same
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)


def drop_capabilities() -> None:
    """None is left: neither root's nor those inside a new user namespace."""
    _check(_libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)))


def landlock_abi() -> int:
    """0 where there is no Landlock."""
    return max(0, int(_libc.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint(1))))


def restrict_files(grants: Mapping[Path, int]) -> None:
    """Only what is granted, on a path and all below it, and no TCP and no signals to others where the ABI has that.

    Paths that don't exist are left out.
    """
    abi = landlock_abi()
    handled = (1 << _FILE_BITS.get(abi, 16)) - 1
    attributes = struct.pack("=QQQ", handled, _TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    ruleset = _check(_libc.syscall(ctypes.c_long(444), attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)))
    try:
        for path, rights in grants.items():
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                _grant(ruleset, path, rights & handled)
        _check(_libc.syscall(ctypes.c_long(446), ctypes.c_int(ruleset), ctypes.c_uint(0)))
    finally:
        os.close(ruleset)


def _grant(ruleset: int, path: Path, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        _check(_libc.syscall(ctypes.c_long(445), ctypes.c_int(ruleset), ctypes.c_int(1), struct.pack("=Qi", rights, fd),
                             ctypes.c_uint(0)))
    finally:
        os.close(fd)


def filter_system_calls() -> None:
    """No socket, no process, no program, no look into another process, no change of modes or owners. Threads are free."""
    if platform.machine() not in _MACHINES:
        raise OSError(errno.ENOSYS, "no table of system calls for this machine")
    machine = _MACHINES[platform.machine()]
    program = b"".join(_instructions(machine))
    code = ctypes.create_string_buffer(program, len(program))
    # SECCOMP_FILTER_FLAG_SPEC_ALLOW: kernels before 5.16 would slow the process down, for a danger that isn't ours
    _check(_libc.syscall(ctypes.c_long(_SECCOMP[machine]), ctypes.c_uint(1), ctypes.c_uint(4),
                         struct.pack("@HP", len(program) // 8, ctypes.addressof(code))))


def _instructions(machine: int) -> Iterator[bytes]:
    """Classic BPF over `struct seccomp_data`: number at 0, architecture at 4, first argument at 16."""

    def op(code: int, k: int, then: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("=HBBI", code, then, otherwise, k)

    refuse = op(_RETURN, _ERRNO | errno.EPERM)
    yield from (op(_LOAD, 4), op(_EQUAL, _AUDIT_ARCH[machine], 1), refuse)
    yield from (op(_LOAD, 0), op(_AT_LEAST, 0x40000000, 0, 1), refuse)  # x32, the other table of x86_64
    yield from (op(_EQUAL, _CLONE3, 0, 1), op(_RETURN, _ERRNO | errno.ENOSYS))  # its flags can't be seen; libc uses clone
    for numbers in _DENIED.values():
        if numbers[machine]:
            yield from (op(_EQUAL, numbers[machine], 0, 1), refuse)
    yield from (op(_EQUAL, _CLONE[machine], 0, 2), op(_LOAD, 16), op(_ANY_BIT, CLONE_THREAD, 0, 1))
    yield from (op(_RETURN, _ALLOW), refuse)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
