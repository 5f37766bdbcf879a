"""The log on disk, shared and torn; and the gathering of witnesses among sites that saw other heads, lie or are silent."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fl_client.app import StageRefused, build_app
from fl_client.witness import Witness
from fl_server.exchange import Answer, Exchange
from fl_server.log import TransparencyLog
from fl_server.witnessing import Witnessing
from privacy import ca, stages
from privacy.bundle import BundleWriter
from privacy.canonical import canonical, parse
from privacy.contract import Contract, load_contract, validate
from privacy.errors import CheckFailed, ConsiloError, Refused, SiteCode
from privacy.files import FileLayer
from privacy.identity import FileSigner, Role, create_request
from privacy.secagg.peers import certificate_check
from privacy.transparency import Entry, Frontier, Head, MerkleTree, open_checkpoint, open_witness, sign_witness
from privacy.trust import TrustStore
from simulations.inprocess import InProcessGrid

RUN, OTHER_RUN = "ab" * 16, "cd" * 16
SITES = ("clinic-a", "clinic-b", "clinic-c", "clinic-d")


@dataclass
class World:
    folder: Path
    signers: dict[str, FileSigner] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ca.init(self.folder / "ca", "Test")
        for name in ("hub", *SITES):
            role, keys = Role.COORDINATOR if name == "hub" else Role.SITE, self.folder / name
            issued = ca.issue(self.folder / "ca", create_request(keys, name, f"Organisation of {name}"), role,
                              hosts=["localhost"] if name == "hub" else [])
            self.signers[name] = FileSigner(keys / "sign.key", issued.folder / "sign.pem")

    def log(self, folder: Path, files: FileLayer | None = None) -> TransparencyLog:
        return TransparencyLog(folder, "hub", self.signers["hub"], files)

    def read(self, checkpoint: bytes) -> Head:
        hub = self.signers["hub"]
        return open_checkpoint(checkpoint, {hub.fingerprint: hub.certificate})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("consortium"))


def entries(begin: int, end: int, run: str = RUN) -> list[Entry]:
    return [Entry(run, f"{i:064x}") for i in range(begin, end)]


def root(wanted: Sequence[Entry]) -> str:
    return MerkleTree(e.leaf for e in wanted).root(len(wanted)).hex()


# On disk -------------------------------------------------------------------------------------------------------------

def test_appends_signs_and_goes_on_after_a_restart(world: World, tmp_path: Path) -> None:
    log = world.log(tmp_path / "log")
    assert log.extend([])[0] == Head(log="hub", size=0, root=root([]))
    for size in (3, 4):
        head, checkpoint = log.extend(entries(0, size))  # those that are there already are not logged again
        assert world.read(checkpoint) == head == Head(log="hub", size=size, root=root(entries(0, size)))
        log = world.log(tmp_path / "log")
    assert log.entries == entries(0, 4)
    assert [log.index(e) for e in entries(0, 4)] == [0, 1, 2, 3]
    assert (tmp_path / "log/entries.txt").read_text() == "".join(f"{RUN} {i:064x}\n" for i in range(4))
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700


def test_an_entry_is_logged_once(world: World, tmp_path: Path) -> None:
    log, twice = world.log(tmp_path), entries(0, 2)
    log.extend([*twice, *twice, twice[0]])
    log.extend(twice)
    assert log.entries == twice
    log.extend(entries(0, 1, OTHER_RUN))
    assert log.entries == [*twice, *entries(0, 1, OTHER_RUN)], "the same digest in another run is another entry"


def test_frontier_goes_on_to_the_whole(world: World, tmp_path: Path) -> None:
    log = world.log(tmp_path)
    log.extend(entries(0, 11))
    for size in range(12):
        left = log.frontier(size)
        assert (left.size, left.root.hex(), left.holds_together()) == (size, root(entries(0, size)), True)
        for entry in log.entries[size:]:
            left.append(entry.leaf)
        assert left.root.hex() == root(entries(0, 11))


def test_two_instances_share_a_folder(world: World, tmp_path: Path) -> None:
    first, second = world.log(tmp_path), world.log(tmp_path)
    first.extend(entries(0, 2))
    head, _ = second.extend(entries(0, 1, OTHER_RUN))
    mixed = [*entries(0, 2), *entries(0, 1, OTHER_RUN)]
    assert (head.size, head.root) == (3, root(mixed))
    head, _ = first.extend(entries(2, 3))
    assert (head.size, head.root) == (4, root([*mixed, *entries(2, 3)]))
    assert second.extend([])[0] == head
    assert first.entries == second.entries


def _fill(world: World, folder: Path, run: str) -> None:
    log = world.log(folder)
    for i in range(25):
        head, _ = log.extend(entries(i, i + 1, run))
        assert head.root == root(log.entries)
        log.keep_ledger_heads({f"{run} {i}": "x"})


def test_two_processes_share_a_folder(world: World, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(world, tmp_path, run)) for run in (RUN, OTHER_RUN)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    log = world.log(tmp_path)
    for run in (RUN, OTHER_RUN):
        assert [e for e in log.entries if e.run == run] == entries(0, 25, run)
    assert len(log.ledger_heads()) == 50, "no process overwrites what the other kept"


class Watch(FileLayer):
    """Notes each call; fails at an append after half of the bytes, once."""

    def __init__(self, fail: int = -1) -> None:
        self.calls, self.appends, self.fail = list[str](), 0, fail

    def __getattribute__(self, name: str) -> Any:
        if name in ("open_append", "sync_folder", "append", "truncate", "write_atomic", "close"):
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def append(self, fd: int, data: bytes) -> None:
        self.appends += 1
        if self.appends == self.fail:
            os.write(fd, data[:len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        super().append(fd, data)


def test_name_and_entry_are_durable_before_the_head_is_signed(world: World, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    watch, hub = Watch(), world.signers["hub"]

    class Signer:
        certificate, fingerprint = hub.certificate, hub.fingerprint

        def sign(self, data: bytes) -> bytes:
            watch.calls.append("SIGN")
            return hub.sign(data)

    log = TransparencyLog(tmp_path / "log", "hub", Signer(), watch)
    log.extend(entries(0, 2))
    assert watch.calls == ["open_append", "sync_folder", "close", "open_append", "append", "close", "SIGN"]


@pytest.mark.parametrize("new", [1, 3])
def test_torn_entries_are_in_no_checkpoint_and_cut_off(new: int, world: World, tmp_path: Path) -> None:
    log = world.log(tmp_path, Watch(fail=2))
    log.extend(entries(0, 2))
    with pytest.raises(OSError, match="No space"):
        log.extend(entries(2, 2 + new))
    whole = 2 + new // 2  # half of three lines is one and a half
    for each in (world.log(tmp_path), log):  # another process, and this one
        assert each.extend([])[0] == Head(log="hub", size=whole, root=root(entries(0, whole)))
    assert (tmp_path / "entries.txt").read_bytes().count(b"\n") == whole
    head, _ = log.extend(entries(2, 2 + new))
    assert (head.size, head.root) == (2 + new, root(entries(0, 2 + new)))
    assert world.log(tmp_path).entries == entries(0, 2 + new)


@pytest.mark.parametrize("line", [
    b"hello\n", b"\n", RUN.encode() + b" " + b"0" * 63 + b"\n", RUN.encode() + b" " + b"A" * 64 + b"\n",
    RUN.encode() + b"  " + b"0" * 64 + b"\n", RUN.encode() + b" " + b"0" * 64 + b"\r\n",
    RUN.encode() + b" " + b"0" * 64 + b"\r" + RUN.encode() + b" " + b"1" * 64 + b"\n",
    "١".encode() * 32 + b" " + b"0" * 64 + b"\n"])
def test_foreign_line_is_refused(line: bytes, world: World, tmp_path: Path) -> None:
    log = world.log(tmp_path)
    log.extend(entries(0, 2))
    with (tmp_path / "entries.txt").open("ab") as file:
        file.write(line)
    with pytest.raises(CheckFailed, match=r"log\.broken"):
        log.extend(entries(2, 3))
    with pytest.raises(CheckFailed, match=r"log\.broken"):
        world.log(tmp_path)


def test_log_that_shrank_under_its_writer(world: World, tmp_path: Path) -> None:
    log = world.log(tmp_path)
    log.extend(entries(0, 3))
    os.truncate(tmp_path / "entries.txt", 98)
    with pytest.raises(CheckFailed, match=r"log\.broken"):
        log.extend(entries(3, 4))


def test_held_by_another_for_too_long(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.log.LEASE_S", -1.0)
    log, files = world.log(tmp_path), FileLayer()
    fd = files.open_append(tmp_path / "entries.txt")
    with pytest.raises(Refused, match=r"file\.leased"):
        log.extend(entries(0, 1))
    files.close(fd)
    assert log.extend(entries(0, 1))[0].size == 1


def test_ledger_heads_are_kept_and_the_newest_wins(world: World, tmp_path: Path) -> None:
    first, second = world.log(tmp_path), world.log(tmp_path)
    assert first.ledger_heads() == {}
    first.keep_ledger_heads({"a 1": "old", "b 2": "x"})
    second.keep_ledger_heads({"a 1": "new"})
    assert first.ledger_heads() == {"a 1": "new", "b 2": "x"} == world.log(tmp_path).ledger_heads()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"a 1":7}', b'{"a":"x","a":"y"}'])
def test_ledger_heads_that_nobody_wrote(data: bytes, world: World, tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_bytes(data)
    with pytest.raises(CheckFailed, match=r"log\.broken"):
        world.log(tmp_path).ledger_heads()


# Gathering witnesses -------------------------------------------------------------------------------------------------

class Recording(Exchange):
    """Notes of each question how many answers will do, and which answers did."""

    def __init__(self, grid: Any, nodes: dict[str, int]) -> None:
        super().__init__(grid, nodes)
        self.asked: list[tuple[list[str], int, list[str]]] = []

    def ask(self, stage: str, notes: Any, **how: Any) -> dict[str, Answer]:
        take, did = how.pop("on_answer"), list[str]()
        self.asked.append((sorted(notes), how["quorum"], did))

        def on_answer(site: str, answer: Answer) -> bool:
            did.extend([site] * (good := take(site, answer)))
            return bool(good)

        return super().ask(stage, notes, on_answer=on_answer, **how)


class Hub:
    """A coordinator's run among real witnesses, over Flower's messages in this process."""

    def __init__(self, world: World, folder: Path, run: str = RUN) -> None:
        self.world, self.folder = world, folder
        self.contract: Contract = load_contract(canonical({
            "run": run, "purpose": "test", "code_version": "0", "code": "0" * 64, "expires": "2099-01-01T00:00:00Z",
            "model": {"weights": "0" * 64, "tokenizer": "1" * 64}, "data": {"name": "d", "labels": ["a", "b"]}, "lora": {},
            "rule": {}, "privacy": {"rounds": 3}, "secagg": {"threshold": 3, "survivors": 3, "range": 10.0},
            "sites": [{"name": n, "signer": world.signers[n].fingerprint, "n_decl": 100, "delta": 1e-5, "sigma": 1.0}
                      for n in SITES]}))
        self.shown: list[tuple[str, stages.Checkpoint]] = []
        self.lies: dict[str, Callable[[stages.Checkpoint, stages.Cosigned], Any]] = {}
        self.silent: set[str] = set()
        check = certificate_check(TrustStore.load(world.folder / "ca"), Role.COORDINATOR)
        self.witnesses = {}
        for name in SITES:
            (folder / "sites" / name).mkdir(parents=True, exist_ok=True)
            self.witnesses[name] = Witness(folder / "sites" / name, name, world.signers[name], check)
        self.log = world.log(folder / "log")
        self.start()

    def start(self) -> None:
        """As a new process: the log's length is the beginning of what this run accounts for."""
        nodes = {name: i for i, name in enumerate(SITES, 1)}
        grid = InProcessGrid({nodes[name]: build_app({"query.witness": self._handler(name)}) for name in SITES},
                             drop=lambda node, message, k: "request" if SITES[node - 1] in self.silent else None)
        self.exchange = Recording(grid, nodes)
        self.bundle = BundleWriter(self.folder / "evidence", self.contract.run, self.contract.to_bytes(), b"root", {}, {})
        self.witnessing = Witnessing(self.log, self.bundle, self.exchange, self.contract, signer=self.world.signers["hub"],
                                     certificates={n: self.world.signers[n].certificate for n in SITES}, deadline_s=5.0)

    def _handler(self, name: str) -> Callable[..., Any]:
        def handle(body: bytes, arrays: Any) -> Any:
            asked = validate(stages.Checkpoint, parse(body))
            self.shown.append((name, asked))
            try:
                got = self.witnesses[name].cosign(asked, self.contract.run, None)
            except ConsiloError as e:
                raise StageRefused(SiteCode.HISTORY) from e
            return self.lies.get(name, lambda _, said: stages.dump(said))(asked, got), {}

        return handle

    def publish(self, *envelopes: bytes, kind: str = "round-site", who: str = "clinic-a") -> list[str]:
        return self.witnessing.publish([(kind, who, envelope) for envelope in envelopes])

    def heads(self) -> dict[int, set[str]]:
        """By size, those whose own signature on that head the bundle holds."""
        found = {}
        for path in sorted((self.folder / "evidence/log").glob("[0-9]*.json")):
            said = parse(path.read_bytes())
            head = self.world.read(said["checkpoint"].encode())
            for name, data in said["witnesses"].items():
                signer = self.world.signers[name]
                seen = open_witness(data.encode(), {signer.fingerprint: signer.certificate})
                assert seen.model_dump() == {"site": name, **head.model_dump()}
            found[int(path.stem)] = set(said["witnesses"])
            assert head.size == int(path.stem)
        return found

    def written(self) -> tuple[Frontier, list[Entry]]:
        before = parse((self.folder / "evidence/log/before.json").read_bytes())
        lines = (self.folder / "evidence/log/entries.txt").read_text().splitlines()
        return (Frontier(before["size"], [bytes.fromhex(p) for p in before["peaks"]]),
                [Entry(*line.split(" ")) for line in lines])


@pytest.fixture
def hub(world: World, tmp_path: Path) -> Hub:
    return Hub(world, tmp_path)


def test_all_sites_sign_each_head(hub: Hub) -> None:
    for i in range(3):
        assert hub.publish(b"one %d" % i, b"two %d" % i) == list(SITES)
    assert hub.heads() == {2: set(SITES), 4: set(SITES), 6: set(SITES)}
    before, logged = hub.written()
    assert (before.size, logged) == (0, hub.log.entries)
    assert len(hub.shown) == 12, "nobody is asked twice"
    assert [(len(c.included), n) for n, c in hub.shown if c.included] == [(2, "clinic-a")] * 3


def test_entries_of_other_runs_before_and_meanwhile(hub: Hub) -> None:
    hub.log.extend(entries(0, 5, OTHER_RUN))
    hub.start()
    hub.publish(b"one")
    hub.world.log(hub.folder / "log").extend(entries(5, 7, OTHER_RUN))
    assert hub.publish(b"two") == list(SITES)
    before, logged = hub.written()
    assert (before.size, before.root.hex(), [e.run for e in logged]) == (
        5, root(entries(0, 5, OTHER_RUN)), [RUN, OTHER_RUN, OTHER_RUN, RUN])


def test_what_another_run_appends_after_the_head_waits_for_the_next(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the last head would not cover the log that the bundle shows."""
    real = TransparencyLog.keep_ledger_heads

    def meanwhile(log: TransparencyLog, newest: Any) -> None:
        hub.world.log(hub.folder / "log").extend(entries(0, 1, OTHER_RUN))
        real(log, newest)

    monkeypatch.setattr(TransparencyLog, "keep_ledger_heads", meanwhile)
    hub.witnessing.accepted("clinic-a", "1a" * 16)
    assert hub.publish(b"one") == list(SITES)
    assert len(hub.written()[1]) == max(hub.heads()) == 1
    assert len(hub.log.entries) == 2


def test_a_run_begun_before_accounts_for_what_it_stated_then(hub: Hub) -> None:
    """A coordinator that was killed starts the same run again: nothing may vanish into the part before it."""
    hub.log.extend(entries(0, 3, OTHER_RUN))
    hub.publish(b"one")
    hub.start()
    assert hub.publish(b"two") == list(SITES)
    before, logged = hub.written()
    assert (before.size, [e.run for e in logged]) == (3, [RUN, RUN])


def test_site_that_has_seen_a_shorter_head_than_the_coordinator_thinks(hub: Hub, world: World) -> None:
    """As after its state was lost and it began anew: it is asked again, from where it is."""
    hub.publish(b"one")
    state = hub.folder / "sites/clinic-b"
    (state / "witness.json").unlink()
    hub.witnesses["clinic-b"] = Witness(state, "clinic-b", world.signers["clinic-b"],
                                        certificate_check(TrustStore.load(world.folder / "ca"), Role.COORDINATOR))
    hub.shown.clear()
    assert hub.publish(b"two") == list(SITES)
    assert [(n, c.old) for n, c in hub.shown] == [(n, 1) for n in SITES] + [("clinic-b", 0)]


def test_site_that_has_seen_more_than_this_run_knows_of(hub: Hub) -> None:
    """Another run of the same log was first: a new process starts from nothing, and asks again."""
    hub.publish(b"one", b"two", b"three")
    hub.start()
    hub.shown.clear()
    assert hub.publish(b"four") == list(SITES)
    assert [(n, c.old) for n, c in hub.shown] == [(n, 0) for n in SITES] + [(n, 3) for n in SITES]


def test_site_that_has_seen_a_longer_head(hub: Hub, tmp_path: Path) -> None:
    """Two runs race: this one's head is older than what the site signed meanwhile. It signs the next."""
    real = hub.witnesses["clinic-c"]

    class Ahead:
        def cosign(self, asked: stages.Checkpoint, run: str, ledger: Any) -> stages.Cosigned:
            return stages.Cosigned(size=99, statement="")

    hub.witnesses["clinic-c"] = Ahead()  # type: ignore[assignment]
    assert hub.publish(b"one") == ["clinic-a", "clinic-b", "clinic-d"]
    assert [c.old for n, c in hub.shown if n == "clinic-c"] == [0, 1], "asked again, once"
    hub.witnesses["clinic-c"] = real
    assert hub.publish(b"two") == list(SITES)
    assert hub.heads() == {1: set(SITES) - {"clinic-c"}, 2: set(SITES)}


def test_a_log_restored_from_an_old_copy_gets_no_witness(hub: Hub) -> None:
    """And the sites keep the proof once it has grown past what they saw."""
    hub.publish(*(b"%d" % i for i in range(6)))
    os.truncate(hub.folder / "log/entries.txt", 2 * 98)
    hub.log = hub.world.log(hub.folder / "log")
    hub.start()
    assert hub.publish(b"a") == []
    assert hub.publish(*(b"x%d" % i for i in range(6))) == []
    assert all((hub.folder / "sites" / name / "witness-conflict.json").exists() for name in SITES)


def test_silent_and_lying_sites_do_not_spoil_the_evidence(hub: Hub, world: World) -> None:
    def signed_by(other: str, site: str) -> Callable[..., bytes]:
        def lie(asked: stages.Checkpoint, got: stages.Cosigned) -> bytes:
            head = world.read(asked.checkpoint.encode())
            return stages.dump(got.model_copy(update={
                "statement": sign_witness(world.signers[other], site, head).decode()}))
        return lie

    def another(change: dict[str, Any]) -> Callable[..., bytes]:
        def lie(asked: stages.Checkpoint, got: stages.Cosigned) -> bytes:
            head = world.read(asked.checkpoint.encode()).model_copy(update=change)
            return stages.dump(got.model_copy(update={
                "statement": sign_witness(world.signers["clinic-b"], "clinic-b", head).decode()}))
        return lie

    hub.silent = {"clinic-d"}
    lies = [signed_by("clinic-a", "clinic-b"), signed_by("clinic-a", "clinic-a"), signed_by("clinic-b", "clinic-a"),
            another({"size": 99}), another({"root": "00" * 32}), another({"log": "hub-2"}),
            lambda *_: b"{}", lambda *_: b"[", lambda *_: stages.dump(stages.Cosigned(size=1, statement="x")),
            lambda asked, _: stages.dump(stages.Cosigned(size=1, statement=asked.checkpoint))]
    for i, lie in enumerate(lies):
        hub.lies = {"clinic-b": lie}
        assert hub.publish(b"%d" % i) == ["clinic-a", "clinic-c"], i
    assert set(map(frozenset, hub.heads().values())) == {frozenset({"clinic-a", "clinic-c"})}


def test_the_rest_is_not_waited_for_once_enough_have_signed(hub: Hub) -> None:
    """The exchange counts the answers that will do: only signatures on this head."""
    hub.lies = {"clinic-b": lambda *_: stages.dump(stages.Cosigned(size=2**40, statement=""))}
    hub.publish(b"one")
    assert hub.exchange.asked == [(list(SITES), 3, ["clinic-a", "clinic-c", "clinic-d"]), (["clinic-b"], 0, [])]


def test_nothing_new_takes_no_signature_back(hub: Hub) -> None:
    hub.publish(b"one")
    hub.silent = set(SITES)
    assert hub.publish() == []
    assert hub.heads() == {1: set(SITES)}


def test_who_is_offline_is_not_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.exchange, "online", lambda: {"clinic-a", "clinic-d", "stranger"})
    assert hub.publish(b"one") == ["clinic-a", "clinic-d"]


def test_a_site_is_shown_the_newest_word_on_its_lineage_once(hub: Hub) -> None:
    lineage = "1a" * 16
    hub.log.keep_ledger_heads({f"clinic-a {lineage}": "WORD", f"clinic-a {'2b' * 16}": "of another lineage"})
    hub.start()
    hub.witnessing.accepted("clinic-a", lineage)
    hub.silent = {"clinic-a"}
    hub.publish(b"one", who="hub", kind="round")
    hub.silent = set()
    for kind in ("round-site", "closing", "acceptance"):
        hub.publish(kind.encode() + b"%d" % len(hub.shown), kind=kind)
    assert [c.ledger for n, c in hub.shown if n == "clinic-a"] == ["WORD", "", ""]
    assert all(not c.ledger for n, c in hub.shown if n != "clinic-a")
    kept = hub.log.ledger_heads()[f"clinic-a {lineage}"]
    assert kept.startswith("closing"), "what names no head is not kept"
    assert set(hub.log.ledger_heads()) == {f"clinic-a {lineage}", f"clinic-a {'2b' * 16}"}
