"""A trainer that turned against its site: it enters its sandbox as the real one does, then does what a test asks for.

`python -P turned.py [NAME ...]`: only these of MECHANISMS work, as if the kernel lacked the others; "-" for none of them.
A request {"do": name, "with": {...}} is answered with {"got": ...}: what the attempt gave, or its error's name.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from fl_client import kernel, trainer
from privacy import errors

MECHANISMS = {"namespace": "enter_empty_network", "landlock": "restrict_files", "filter": "filter_system_calls"}
SPEC = {"shapes": [["w", [3]]], "trained": ["w"]}
ROUNDS = {2: "spin", 3: "stop", 4: "exit"}  # 6 answers too little, any other with the adapter that it got


def send(family: int, kind: int, address: Any) -> str:
    with socket.socket(family, kind) as s:
        s.connect(tuple(address) if isinstance(address, list) else address.replace("@", "\0"))
        s.send(b"canary")
    return "sent"


def resolve(name: str) -> str:
    try:
        socket.getaddrinfo(name, 443)
    except socket.gaierror:
        return "gaierror"
    return "resolved"


def fork(then: str = "", **more: Any) -> Any:
    """The attempt in a child: its result, which is a string."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(sink, str(attempt(then, more) if then else "forked").encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(source, 1000).decode()


def write(path: str) -> str:
    Path(path).write_text("changed")
    return "written"


def link(path: str, to: str) -> str:
    Path(to).hardlink_to(path)
    return Path(to).read_text()


def symlink(path: str, to: str) -> str:
    Path(to).symlink_to(path)
    return Path(to).read_text()


def exceed(mib: int) -> str:
    try:
        return f"got {len(bytearray(mib * 2**20))}"
    except MemoryError:
        return "MemoryError"


def seize(pid: int) -> str:
    """PTRACE_SEIZE: it doesn't stop the other process, and ends with this one."""
    if ctypes.CDLL(None, use_errno=True).ptrace(0x4206, pid, None, None):
        raise OSError(ctypes.get_errno(), "")
    return "seized"


def call(number: int) -> str:
    if ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 5) < 0:
        raise OSError(ctypes.get_errno(), "")
    return "done"


def foreign_socket(table: str) -> str:
    """socket(AF_INET, SOCK_STREAM, 0) on x86-64, as x32 or 32-bit code would call it."""
    if table == "x32":
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.syscall(ctypes.c_long(0x40000000 | 41), 2, 1, 0)
        number = ctypes.get_errno()
    else:
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        # push rbx; mov eax, 359; mov ebx, 2; mov ecx, 1; xor edx, edx; int 0x80; pop rbx; ret
        page.write(bytes.fromhex("53 b867010000 bb02000000 b901000000 31d2 cd80 5b c3"))
        result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        number = -result
    if result < 0:
        raise OSError(number, "")
    return "made"


def leave_child() -> int:
    """It keeps the pipes open."""
    child = os.fork()
    while child == 0:
        signal.pause()
    return child


def spin() -> NoReturn:
    while True:
        pass


def refuse(kind: str) -> NoReturn:
    raise getattr(errors, kind)("lora.targets", "cause", "mend")


def fail(text: str) -> NoReturn:
    raise ValueError(text)


ATTEMPTS: dict[str, Any] = {
    "tcp": lambda address: send(socket.AF_INET, socket.SOCK_STREAM, address),
    "udp": lambda address: send(socket.AF_INET, socket.SOCK_DGRAM, address),
    "unix": lambda address: send(socket.AF_UNIX, socket.SOCK_STREAM, address),
    "resolve": resolve,
    "fork": fork,
    "execute": lambda: subprocess.run(["/bin/sh", "-c", "exit 0"], check=True).returncode,
    "read": lambda path: Path(path).read_text(),
    "list": lambda path: len([*Path(path).iterdir()]),
    "write": write,
    "truncate": lambda path: os.truncate(path, 0),
    "empty": lambda path: os.close(os.open(path, os.O_RDONLY | os.O_TRUNC)),
    "remove": lambda path: Path(path).unlink(),
    "rename": lambda path: str(Path(path).rename(path + ".moved")),
    "make": lambda path: Path(path).mkdir(),
    "chmod": lambda path: Path(path).chmod(0o666),
    "xattr": lambda path: os.setxattr(path, "user.x", b"x"),
    "link": link,
    "symlink": symlink,
    "signal": lambda pid: os.kill(pid, 0),
    "seize": seize,
    "exceed": exceed, "call": call, "foreign_socket": foreign_socket,
    "limits": lambda: {"core": resource.getrlimit(resource.RLIMIT_CORE)[1], "nice": os.nice(0),
                       "files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
                       "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
                       "status": Path("/proc/self/status").read_text()},
    "descriptors": lambda: sorted(int(path.name) for path in Path("/proc/self/fd").iterdir()),
    "environment": lambda: dict(os.environ),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(1),
    "spin": spin, "leave_child": leave_child, "fail": fail, "refuse": refuse,
}


def attempt(do: str, more: dict[str, Any]) -> Any:
    try:
        return ATTEMPTS[do](**more)
    except OSError as e:
        return errno.errorcode[e.errno or 0]


def obey(request: dict[str, Any], payload: bytes) -> tuple[bool, trainer.Reply]:
    """Loading answers with SPEC, a round with the adapter; a test's own request with what the attempt gave."""
    do = request.get("do", ROUNDS.get(request.get("round", 0)))
    return True, ({"got": attempt(do, request.get("with", {}))} if do else SPEC, payload[request.get("round") == 6:])


def refused(*_: Any) -> None:
    raise OSError(errno.ENOSYS, "planted")


def main() -> None:
    if sys.argv[1:]:
        for name in MECHANISMS.keys() - set(sys.argv[1:]):
            setattr(kernel, MECHANISMS[name], refused)
    trainer._load = obey  # type: ignore[assignment]
    trainer._train = lambda _, request, payload: obey(request, payload)  # type: ignore[assignment, return-value]
    trainer.main()


if __name__ == "__main__":
    main()
