"""The trainer's walls, tried from inside by a trainer that turned against its site (turned.py), in real processes.

Every attempt is made with each mechanism alone and with none: so each mechanism is seen to stop what it is there for, and
each attempt is seen to succeed where nothing stops it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fl_client import kernel, sandbox, supervisor
from fl_client.sandbox import ENFORCED, MENDS, WALLS, Sandbox
from privacy.errors import Refused, Unreachable

TURNED = (sys.executable, "-P", str(Path(__file__).with_name("turned.py")))
CANARY = "canary-7d20"
ALL = ("namespace", "landlock", "filter")
# what this kernel has, asked without the code that is tested
ABI = max(0, ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1))
# without capabilities, even where the tests run as root: then only the walls keep a trainer from it
NEIGHBOUR = ("import signal; from fl_client import kernel; kernel.drop_capabilities(); print('here', flush=True); "
             "signal.pause()")


class Site:
    """Folders of a site, sockets that listen, a process of the same user, and turned trainers among them."""

    def __init__(self, folder: Path, held: ExitStack) -> None:
        self.folder, self._held, self._trainers = folder, held, dict[tuple[str, ...], Turned]()
        for name in ("keys", "model", "home", "state"):
            (folder / name).mkdir()
        self.data = folder / "data.csv"
        self.data.write_text("text,label\n")
        self.sockets: dict[str, tuple[socket.socket, Any]] = {
            "tcp": self._listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "udp": self._listen(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "abstract": self._listen(socket.AF_UNIX, socket.SOCK_STREAM, f"\0consilo-{uuid.uuid4().hex}"),
            "path": self._listen(socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "home" / "socket"))}
        self.neighbour = held.enter_context(subprocess.Popen([sys.executable, "-P", "-c", NEIGHBOUR], stdout=subprocess.PIPE,
                                                             env={"CANARY": CANARY}))
        held.callback(self.neighbour.kill)
        assert self.neighbour.stdout is not None and self.neighbour.stdout.readline() == b"here\n"

    @property
    def sandbox(self) -> Sandbox:
        return Sandbox(readable=(str(self.folder / "model"), str(self.data)),
                       hidden=(str(self.folder / "keys"), str(self.folder / "state")))

    def _listen(self, family: int, kind: int, address: Any) -> tuple[socket.socket, Any]:
        s = self._held.enter_context(socket.socket(family, kind))
        s.bind(address)
        s.setblocking(False)
        if kind == socket.SOCK_STREAM:
            s.listen()
        name = s.getsockname()
        return s, name.replace(b"\0", b"@").decode() if isinstance(name, bytes) else name

    def arrived(self, name: str) -> bool:
        """Whether anything reached that socket since it was last asked."""
        try:
            self.sockets[name][0].recv(100) if name == "udp" else self.sockets[name][0].accept()[0].close()
        except BlockingIOError:
            return False
        return True

    def file(self, folder: str) -> str:
        path = self.folder / folder / uuid.uuid4().hex
        path.write_text(CANARY)
        return str(path)

    def trainer(self, *mechanisms: str, sandbox: Sandbox | None = None) -> Turned:
        """One per set of mechanisms, warm; a new one for a sandbox of its own."""
        if sandbox is not None:
            return self._start(mechanisms, sandbox)
        if mechanisms not in self._trainers:
            self._trainers[mechanisms] = self._start(mechanisms, self.sandbox)
        return self._trainers[mechanisms]

    def _start(self, mechanisms: tuple[str, ...], wanted: Sandbox) -> Turned:
        command, supervisor.COMMAND = supervisor.COMMAND, (*TURNED, *(mechanisms or "-"))
        try:
            return Turned(self._held, wanted)
        finally:
            supervisor.COMMAND = command


class Turned:
    def __init__(self, held: ExitStack, wanted: Sandbox) -> None:
        self.child = supervisor._Child(held.enter_context(ThreadPoolExecutor(1)))
        held.callback(self.child.end)
        self.walls = self.child.enter(wanted)
        self.scratch = Path(self.child._scratch)

    def __call__(self, do: str, **more: Any) -> Any:
        return self.child.ask({"do": do, "with": more}, limit_s=60)[0]["got"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as held:
        yield Site(tmp_path_factory.mktemp("site"), held)


NEEDS = {
    "namespace": (subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True).returncode == 0,
                  "user namespaces are off"),
    "landlock": (ABI >= 3, "no Landlock, or an old one"),
    "filter": (Path("/proc/sys/kernel/seccomp").exists() and platform.machine() in ("x86_64", "aarch64"),
               "no seccomp filter for this machine"),
}


def needs(*mechanisms: str, abi: int = 0) -> None:
    for name in mechanisms:
        if not NEEDS[name][0]:
            pytest.skip(NEEDS[name][1])
    if abi > ABI and "landlock" in mechanisms:
        pytest.skip(f"Landlock's ABI is {ABI}, this needs {abi}")


def to(name: str) -> Callable[[Site, Turned], dict[str, Any]]:
    return lambda site, _: {"address": site.sockets[name][1]}


def on(folder: str) -> Callable[[Site, Turned], dict[str, Any]]:
    return lambda site, _: {"path": site.file(folder)}


def into_scratch(site: Site, trainer: Turned) -> dict[str, Any]:
    return {"path": site.file("keys"), "to": str(trainer.scratch / uuid.uuid4().hex)}


def of_neighbour(file: str) -> Callable[[Site, Turned], dict[str, Any]]:
    return lambda site, _: {"path": f"/proc/{site.neighbour.pid}/{file}"}


def nothing(site: Site, trainer: Turned) -> dict[str, Any]:
    return {}


# attempt, its arguments, and what stops it alone: mechanism -> first ABI of Landlock that does
Row = tuple[str, Callable[[Site, Turned], dict[str, Any]], dict[str, int]]
FILES = {"landlock": 1}
ROWS: dict[str, Row] = {
    "connect by TCP": ("tcp", to("tcp"), {"namespace": 0, "filter": 0, "landlock": 4}),
    "send a datagram": ("udp", to("udp"), {"namespace": 0, "filter": 0}),
    "connect to an abstract socket": ("unix", to("abstract"), {"namespace": 0, "filter": 0, "landlock": 6}),
    "connect to a socket's path": ("unix", to("path"), {"filter": 0}),
    "fork": ("fork", nothing, {"filter": 0}),
    "start a program": ("execute", nothing, {"filter": 0, "landlock": 1}),
    "read a key": ("read", on("keys"), FILES),
    "read the state": ("read", on("state"), FILES),
    "read the home folder": ("read", on("home"), FILES),
    "list the keys": ("list", lambda site, _: {"path": str(site.folder / "keys")}, FILES),
    "write to the data": ("write", lambda site, _: {"path": str(site.data)}, FILES),
    "write to the model": ("write", on("model"), FILES),
    "write to the home folder": ("write", on("home"), FILES),
    "make a folder at home": ("make", lambda site, _: {"path": str(site.folder / "home" / uuid.uuid4().hex)}, FILES),
    "remove from the model": ("remove", on("model"), FILES),
    "rename in the model": ("rename", on("model"), FILES),
    "truncate": ("truncate", on("home"), {"landlock": 3}),
    "empty by opening": ("empty", on("home"), {"landlock": 3}),
    "link a key into scratch": ("link", into_scratch, FILES),
    "read a key by a symbolic link": ("symlink", into_scratch, FILES),
    "open a key to others": ("chmod", on("keys"), {"filter": 0}),
    "set an attribute": ("xattr", on("home"), {"filter": 0}),
    "read another process's environment": ("read", of_neighbour("environ"), {"landlock": 1, "namespace": 0}),
    "go through another process's root": ("list", of_neighbour("root"), {"landlock": 1, "namespace": 0}),
    "trace another process": ("seize", lambda site, _: {"pid": site.neighbour.pid}, {"filter": 0, "landlock": 1}),
    "signal another process": ("signal", lambda site, _: {"pid": site.neighbour.pid}, {"landlock": 6}),
}
ALONE = [(name, mechanism) for name, row in ROWS.items() for mechanism in row[2]]


def stopped(got: Any) -> bool:
    return got in errno.errorcode.values()


@pytest.mark.parametrize("name", ROWS)
def test_attack_is_stopped_by_the_sandbox(site: Site, name: str) -> None:
    do, more, stoppers = ROWS[name]
    if set(stoppers) == {"landlock"}:
        needs("landlock", abi=stoppers["landlock"])
    else:
        needs("filter")
    trainer = site.trainer(*ALL)
    assert stopped(trainer(do, **more(site, trainer)))
    assert not any(site.arrived(s) for s in site.sockets)


@pytest.mark.parametrize(("name", "mechanism"), ALONE)
def test_attack_is_stopped_by_one_mechanism_alone(site: Site, name: str, mechanism: str) -> None:
    do, more, stoppers = ROWS[name]
    needs(mechanism, abi=stoppers[mechanism])
    trainer = site.trainer(mechanism)
    assert stopped(trainer(do, **more(site, trainer)))
    assert not any(site.arrived(s) for s in site.sockets)


@pytest.mark.parametrize("name", ROWS)
def test_attempt_succeeds_where_nothing_stops_it(site: Site, name: str) -> None:
    """Without this the tests above could pass for any reason."""
    do, more, _ = ROWS[name]
    trainer = site.trainer()
    if do == "seize" and Path("/proc/sys/kernel/yama/ptrace_scope").exists():
        pytest.skip("Yama stops it already")
    got = trainer(do, **more(site, trainer))
    if do == "xattr" and got == "EOPNOTSUPP":
        pytest.skip("the file system has no attributes")
    assert not stopped(got)
    sent = {"tcp": "tcp", "udp": "udp", "unix": "abstract" if "abstract" in name else "path"}.get(do)
    assert {s for s in site.sockets if site.arrived(s)} == ({sent} if sent else set())


@pytest.mark.parametrize(("mechanisms", "name"), [
    (("namespace",), "connect by TCP"), (("namespace",), "send a datagram"), (("landlock",), "read a key"),
    (("landlock",), "write to the data"), (("landlock",), "start a program")])
def test_attack_from_a_child_is_stopped_too(site: Site, mechanisms: tuple[str, ...], name: str) -> None:
    """Where no filter forbids children, they are inside the same walls."""
    needs(*mechanisms)
    do, more, _ = ROWS[name]
    trainer = site.trainer(*mechanisms)
    assert stopped(trainer("fork", then=do, **more(site, trainer)))
    assert trainer("fork") == "forked"
    assert not any(site.arrived(s) for s in site.sockets)


# from asm/unistd_64.h, all with arguments that no kernel accepts
CALLS = {"socket": 41, "io_uring_setup": 425, "execve": 59, "execveat": 322, "ptrace": 101, "process_vm_readv": 310,
         "process_vm_writev": 311, "pidfd_getfd": 438, "shmget": 29, "shmat": 30, "msgget": 68, "semget": 64, "mq_open": 240,
         "unshare": 272, "setns": 308, "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92,
         "fchown": 93, "lchown": 94, "fchownat": 260, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "setxattrat": 463,
         "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "removexattrat": 466}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")
def test_each_system_call_of_the_list_is_refused(site: Site) -> None:
    needs("filter")
    trainer = site.trainer("filter")
    assert {name: trainer("call", number=number) for name, number in CALLS.items()} == dict.fromkeys(CALLS, "EPERM")
    assert trainer("call", number=435) == "ENOSYS", "libc falls back to clone"
    assert trainer("call", number=57) == trainer("call", number=58) == "EPERM", "fork and vfork"
    assert CALLS.keys() | {"fork", "vfork"} == kernel._DENIED.keys()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has other tables of system calls")
@pytest.mark.parametrize("table", ["x32", "i386"])
def test_attack_a_socket_by_another_table_of_system_calls(site: Site, table: str) -> None:
    needs("filter")
    try:
        assert site.trainer("filter", sandbox=site.sandbox)("foreign_socket", table=table) == "EPERM"
    except Unreachable:
        assert table == "i386", "a kernel without 32-bit code kills it"


def test_names_are_not_resolved(site: Site) -> None:
    needs("filter")
    assert site.trainer(*ALL)("resolve", name="consilo.invalid") == "gaierror"


def test_what_training_needs_is_left(site: Site) -> None:
    trainer = site.trainer(*ALL)
    assert trainer("read", path=str(site.data)) == site.data.read_text()
    assert trainer("read", path=site.file("model")) == CANARY
    assert trainer("list", path=str(site.folder / "model")) > 0
    note = trainer.scratch / "note"
    assert trainer("write", path=str(note)) == "written"
    assert trainer("rename", path=str(note)) == f"{note}.moved"
    assert trainer("write", path="/dev/null") == "written"
    environment = trainer("environment")
    assert environment["HOME"] == environment["TMPDIR"] == str(trainer.scratch)


def test_model_of_links_is_readable(site: Site) -> None:
    """A folder of the Hugging Face cache holds links to files elsewhere; only those become readable."""
    needs("landlock")
    cached = site.folder / "cached"
    cached.mkdir()
    target = Path(site.file("home"))
    (cached / "model.safetensors").symlink_to(target)
    trainer = site.trainer(*ALL, sandbox=Sandbox(readable=(str(cached),)))
    assert trainer("read", path=str(cached / "model.safetensors")) == CANARY
    assert stopped(trainer("read", path=site.file("home")))


def test_folder_of_the_import_path_is_listed_and_not_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH may name a folder that holds more than packages."""
    needs("landlock")
    home = site.folder / "home"
    monkeypatch.setenv("PYTHONPATH", str(home), prepend=":")
    trainer = site.trainer(*ALL, sandbox=Sandbox(hidden=(str(home),)))
    assert trainer.walls["files"] == ENFORCED
    assert trainer("list", path=str(home)) > 0
    assert stopped(trainer("read", path=site.file("home")))


def test_limits(site: Site) -> None:
    trainer = site.trainer(*ALL, sandbox=Sandbox(memory_mib=512, nice=5))
    got = trainer("limits")
    status = dict(line.split(":\t", 1) for line in got["status"].splitlines() if ":\t" in line)
    assert (got["core"], got["dumpable"], got["files"]) == (0, 0, sandbox.OPEN_FILES)
    assert got["nice"] == 5 + os.nice(0)
    assert (status["NoNewPrivs"], status["CapPrm"], status["CapEff"]) == ("1", "0" * 16, "0" * 16)
    assert status["Uid"].split()[0] == str(os.getuid())
    assert trainer("exceed", mib=256) == "got 268435456"
    assert trainer("exceed", mib=600) == "MemoryError"
    assert site.trainer(*ALL)("exceed", mib=600) == "got 629145600", "no limit unless it is asked for"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads any process")
@pytest.mark.parametrize("file", ["mem", "environ", "maps"])
def test_other_processes_of_the_user_do_not_see_into_the_trainer(site: Site, file: str) -> None:
    trainer = site.trainer(*ALL)
    with pytest.raises(PermissionError):
        Path(f"/proc/{trainer.child._process.pid}/{file}").open("rb").close()


def test_nothing_is_inherited_but_the_pipes_and_the_log(site: Site) -> None:
    """Descriptors 0 to 2 and the pipe of replies; the last one is the listing's own."""
    source, sink = os.pipe()
    os.set_inheritable(sink, True)
    try:
        trainer = site.trainer(*ALL, sandbox=site.sandbox)
        assert trainer("descriptors") == [0, 1, 2, 3, 4]
    finally:
        os.close(source)
        os.close(sink)


# What is reported, and what is refused


def test_walls_of_this_machine() -> None:
    """Linux 6.2 or newer with Landlock, on x86-64 or AArch64: everything holds."""
    needs("landlock", "filter")
    assert supervisor.walls() == dict.fromkeys(WALLS, ENFORCED)


@pytest.mark.parametrize(("mechanisms", "reasons"), [
    (("landlock", "filter"), {}),
    (("namespace", "landlock"), {"files": "files.modes", "limits": "limits.processes"}),
    (("namespace", "filter"), {"files": "files.landlock"}),
    (("landlock",), {"network": "network.open", "files": "files.modes", "limits": "limits.processes"}),
    ((), {"network": "network.open", "files": "files.landlock", "limits": "limits.processes"})])
def test_report_names_what_is_missing(site: Site, mechanisms: tuple[str, ...], reasons: dict[str, str]) -> None:
    needs(*mechanisms)
    assert site.trainer(*mechanisms).walls == dict.fromkeys(WALLS, ENFORCED) | reasons
    assert set(reasons.values()) <= set(MENDS)


@pytest.mark.parametrize("wall", WALLS)
def test_required_wall_that_does_not_hold_is_refused(site: Site, wall: sandbox.Wall) -> None:
    with pytest.raises(Refused) as caught:
        site.trainer(sandbox=Sandbox(required=(wall,)))
    assert caught.value.code == "sandbox.unavailable"
    assert f"`{wall}`" in caught.value.cause and caught.value.mend in MENDS.values()


def test_required_walls_that_hold_are_accepted(site: Site) -> None:
    needs(*ALL)
    assert site.trainer(*ALL, sandbox=Sandbox(required=WALLS)).walls == dict.fromkeys(WALLS, ENFORCED)


@pytest.mark.parametrize("where", ["python", "readable", "linked"])
def test_keys_in_a_readable_folder_are_found(site: Site, where: str) -> None:
    needs("landlock", "filter")
    linked = site.folder / f"model-{where}"
    linked.mkdir()
    (linked / "x").symlink_to(site.file("keys"))
    wanted = {"python": Sandbox(hidden=(str(Path(pytest.__file__).parent / "keys"),)),
              "readable": Sandbox(hidden=(str(site.folder / "keys"),), readable=(str(site.folder),)),
              "linked": Sandbox(hidden=(str(site.folder / "keys"),), readable=(str(linked),))}[where]
    assert site.trainer(*ALL, sandbox=wanted).walls["files"] == "files.overlap"


def test_old_landlock_is_not_called_whole(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "landlock_abi", lambda: 2)
    monkeypatch.setattr(sandbox, "_done", lambda _: False)
    assert sandbox._why_files(Sandbox(), {}, True, True) == "files.truncate"


def test_a_thread_before_the_walls_is_refused(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walls bind one thread and what it starts: another one would stay outside."""
    script = tmp_path / "threaded.py"
    script.write_text("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
                      f"exec(open({TURNED[2]!r}).read())\n")
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-P", str(script)))
    with pytest.raises(Refused, match="starts a thread"):
        supervisor.walls()


def test_numpy_waits_until_the_walls_stand() -> None:
    code = "import fl_client.trainer, sys; print({'numpy', 'torch', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="the tests run as root, whose own files these are")
@pytest.mark.parametrize("closed", ["file", "folder"])
def test_file_that_the_agent_may_not_read_is_named(site: Site, tmp_path: Path, closed: str) -> None:
    path = tmp_path / "inner" / "data.csv"
    path.parent.mkdir()
    path.touch()
    barred = path if closed == "file" else path.parent
    barred.chmod(0)
    try:
        with pytest.raises(Refused) as caught:
            site.trainer(*ALL, sandbox=Sandbox(readable=(str(path),)))
    finally:
        barred.chmod(0o700)
    assert caught.value.code == "sandbox.unreadable" and path.name in caught.value.cause
