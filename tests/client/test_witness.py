"""A site as witness against coordinators that roll back, fork, omit and pose as others, and against its own disk."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fl_client.app import StageRefused
from fl_client.witness import CONFLICT, HEAD, Witness
from privacy import ca
from privacy.canonical import canonical, parse
from privacy.errors import ConsiloError, SiteCode
from privacy.files import FileLayer
from privacy.identity import FileSigner, Role, create_request, load_certificate
from privacy.ledger import Ledger
from privacy.mechanism import DpMechanism
from privacy.predicates import KINDS
from privacy.secagg.peers import certificate_check
from privacy.stages import Checkpoint, Cosigned, Included
from privacy.statements import make
from privacy.transparency import EMPTY, Entry, Head, MerkleTree, open_checkpoint, open_witness, sign_checkpoint
from privacy.trust import TrustStore

RUN, OTHER_RUN, CONTRACT = "ab" * 16, "cd" * 16, "ef" * 32
ROLES = {"hub": Role.COORDINATOR, "rival": Role.COORDINATOR, "clinic-a": Role.SITE, "clinic-b": Role.SITE,
         "lab": Role.ENGINEER}


@dataclass
class World:
    folder: Path
    signers: dict[str, FileSigner]

    @property
    def trust(self) -> TrustStore:
        return TrustStore.load(self.folder / "ca")


def enrol(folder: Path, name: str, role: Role) -> FileSigner:
    keys = folder / name
    issued = ca.issue(folder / "ca", create_request(keys, name, f"Organisation of {name}"), role,
                      hosts=["localhost"] if role is Role.COORDINATOR else [])
    return FileSigner(keys / "sign.key", issued.folder / "sign.pem")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("consortium")
    ca.init(folder / "ca", "Test")
    return World(folder, {name: enrol(folder, name, role) for name, role in ROLES.items()})


def entries(size: int, history: str = "") -> list[Entry]:
    return [Entry(RUN, f"{history}{i:04x}".rjust(64, "0")) for i in range(size)]


def tree(size: int = 40, history: str = "") -> MerkleTree:
    """A log. Another history differs from the fifth entry on."""
    return MerkleTree(e.leaf for e in [*entries(5), *entries(size, history)[5:]])


class Coordinator:
    """Asks for signatures as the real one does; each argument is a way to lie."""

    def __init__(self, world: World, log: MerkleTree, who: str = "hub") -> None:
        self.signer, self.log, self.name = world.signers[who], log, who

    def head(self, size: int) -> Head:
        return Head(log=self.name, size=size, root=self.log.root(size).hex())

    def ask(self, old: int, size: int, **changes: Any) -> Checkpoint:
        return Checkpoint(**{
            "contract": CONTRACT, "certificate": self.signer.certificate.public_bytes(Encoding.PEM).decode(),
            "checkpoint": sign_checkpoint(self.signer, self.head(size)).decode(), "old": old, "included": (), "ledger": "",
            "proof": tuple(part.hex() for part in self.log.consistency(old, size)) if old <= size else (), **changes})

    def included(self, index: int, size: int) -> Included:
        path = tuple(part.hex() for part in self.log.inclusion(index, size))
        return Included(sha256=entries(index + 1)[index].sha256, index=index, path=path)


class Site:
    """One folder; `restart` is a new process on it."""

    def __init__(self, world: World, folder: Path, files: FileLayer | None = None, name: str = "clinic-a") -> None:
        self.world, self.folder, self.name = world, folder, name
        self.restart(files)

    def restart(self, files: FileLayer | None = None) -> None:
        self.witness = Witness(self.folder, self.name, self.world.signers[self.name],
                               certificate_check(self.world.trust, Role.COORDINATOR), files)

    def sign(self, asked: Checkpoint, ledger: Ledger | None = None, run: str = RUN) -> Cosigned:
        return self.witness.cosign(asked, run, ledger)

    def refuses(self, asked: Checkpoint, ledger: Ledger | None = None, run: str = RUN) -> str:
        """The error's code. Nothing was signed, and the head that was seen is still the same."""
        before = self.seen()
        with pytest.raises((ConsiloError, StageRefused)) as caught:
            self.sign(asked, ledger, run)
        assert self.seen() == before
        return str(caught.value.code)

    def seen(self) -> Any:
        return parse((self.folder / HEAD).read_bytes()) if (self.folder / HEAD).exists() else None

    def conflict(self) -> Any:
        return parse((self.folder / CONFLICT).read_bytes()) if (self.folder / CONFLICT).exists() else None


@pytest.fixture
def site(world: World, tmp_path: Path) -> Site:
    return Site(world, tmp_path)


@pytest.fixture
def hub(world: World) -> Coordinator:
    return Coordinator(world, tree())


def says(site: Site, got: Cosigned, head: Head) -> bool:
    """Whether the answer is this site's signature on that head."""
    signer = site.world.signers[site.name]
    said = open_witness(got.statement.encode(), {signer.fingerprint: signer.certificate})
    return got.size == head.size and said.model_dump() == {"site": site.name, **head.model_dump()}


# An honest log -------------------------------------------------------------------------------------------------------

def test_signs_a_log_that_grows(site: Site, hub: Coordinator) -> None:
    old = 0
    for size in (0, 1, 2, 7, 8, 8, 9, 33):
        asked = hub.ask(old, size, included=tuple(hub.included(i, size) for i in range(old, min(size, old + 16))))
        assert says(site, site.sign(asked), hub.head(size))
        kept = site.seen()["hub"]
        assert (kept["head"], kept["run"]) == (hub.head(size).model_dump(), RUN)
        assert (kept["checkpoint"], kept["certificate"]) == (asked.checkpoint, asked.certificate)
        old = size
    assert site.conflict() is None
    site.witness.require_trust()


def test_goes_on_after_a_restart(site: Site, hub: Coordinator) -> None:
    site.sign(hub.ask(0, 6))
    site.restart()
    assert says(site, site.sign(hub.ask(6, 9)), hub.head(9))


def test_tells_its_size_if_the_coordinator_knows_another(site: Site, hub: Coordinator) -> None:
    """Two runs at a time may ask in any order; nothing of that is a conflict, and nothing is signed."""
    site.sign(hub.ask(0, 6))
    before = site.seen()
    for asked in (hub.ask(0, 9), hub.ask(5, 9), hub.ask(7, 9), hub.ask(9, 9), hub.ask(0, 4), hub.ask(4, 5), hub.ask(0, 0)):
        assert site.sign(asked) == Cosigned(size=6, statement="")
    assert (site.seen(), site.conflict()) == (before, None)
    for old in (0, 4, 6):
        assert says(site, site.sign(hub.ask(old, 6)), hub.head(6)), "the same head again needs no proof, and reads none"
    assert says(site, site.sign(hub.ask(6, 9)), hub.head(9))


def test_logs_of_two_coordinators_are_two_logs(site: Site, hub: Coordinator, world: World) -> None:
    rival = Coordinator(world, tree(history="9"), "rival")
    site.sign(hub.ask(0, 9))
    assert says(site, site.sign(rival.ask(0, 12), run=OTHER_RUN), rival.head(12))
    assert says(site, site.sign(hub.ask(9, 10)), hub.head(10))
    assert set(site.seen()) == {"hub", "rival"}


# A coordinator that lies ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("first", "then"), [(9, 9), (9, 20), (6, 7), (8, 16), (16, 17)])
def test_fork_is_kept_as_proof_and_ends_it(first: int, then: int, site: Site, hub: Coordinator, world: World) -> None:
    fork = Coordinator(world, tree(history="f"))
    site.sign(hub.ask(0, first))
    assert site.refuses(fork.ask(first, then)) == "log.split_view"
    found, key = site.conflict(), {hub.signer.fingerprint: hub.signer.certificate}
    assert open_checkpoint(found["seen"]["checkpoint"].encode(), key) == hub.head(first)
    assert open_checkpoint(found["shown"]["checkpoint"].encode(), key) == fork.head(then)
    assert {load_certificate(found[x]["certificate"].encode()) for x in ("seen", "shown")} == {hub.signer.certificate}
    assert found["proof"] == [part.hex() for part in fork.log.consistency(first, then)]
    for _ in range(2):
        with pytest.raises(StageRefused) as caught:
            site.witness.require_trust()
        assert caught.value.code == SiteCode.HISTORY
        assert site.refuses(hub.ask(first, first + 1)) == SiteCode.HISTORY, "nor is the true log signed any more"
        site.restart()


def test_proof_of_another_log_or_none_is_a_fork(site: Site, hub: Coordinator) -> None:
    site.sign(hub.ask(0, 6))
    assert site.refuses(hub.ask(6, 9, proof=())) == "log.split_view"


def test_head_of_nothing_has_one_root(site: Site, hub: Coordinator) -> None:
    head = Head(log="hub", size=0, root="12" * 32)
    assert hub.head(0).root == EMPTY.hex()
    assert site.refuses(hub.ask(0, 0, checkpoint=sign_checkpoint(hub.signer, head).decode())) == "log.split_view"


def test_rolled_back_log_is_never_signed(site: Site, hub: Coordinator, world: World) -> None:
    """The coordinator forgets entries and goes on: silent until the log is longer again, then a conflict."""
    site.sign(hub.ask(0, 9))
    again = Coordinator(world, tree(history="b"))
    for size in range(9):
        assert site.sign(again.ask(min(size, 5), size)).statement == ""
    assert site.refuses(again.ask(9, 10)) == "log.split_view"


def test_wrong_proof_that_a_statement_is_included(site: Site, hub: Coordinator) -> None:
    good = hub.included(3, 9)
    bad = [good.model_copy(update=change) for change in (
        {"sha256": "00" * 32}, {"index": 4}, {"index": 9}, {"path": good.path[:-1]}, {"path": (*good.path, "00" * 32)})]
    for each in bad:
        assert site.refuses(hub.ask(0, 9, included=(good, each))) == "log.inclusion"
    assert site.refuses(hub.ask(0, 9, included=(good,)), run=OTHER_RUN) == "log.inclusion", "an entry of another run"
    assert site.conflict() is None
    assert says(site, site.sign(hub.ask(0, 9, included=(good,))), hub.head(9))


def test_checkpoint_of_another_log_than_its_signers(site: Site, hub: Coordinator) -> None:
    head = hub.head(3).model_copy(update={"log": "rival"})
    assert site.refuses(hub.ask(0, 3, checkpoint=sign_checkpoint(hub.signer, head).decode())) == "log.form"


def test_one_run_in_the_logs_of_two_coordinators(site: Site, hub: Coordinator, world: World) -> None:
    """Or each of two histories could have all its witnesses, in a log of its own."""
    site.sign(hub.ask(0, 3))
    site.restart()
    assert site.refuses(Coordinator(world, tree(), "rival").ask(0, 3)) == "log.form"


def test_signed_by_another_than_its_certificate(site: Site, hub: Coordinator, world: World) -> None:
    for signer in (world.signers["rival"], world.signers["clinic-a"]):  # the site's own key is no coordinator's
        assert site.refuses(hub.ask(0, 3, checkpoint=sign_checkpoint(signer, hub.head(3)).decode())) == "statement.key"


@pytest.mark.parametrize("who", ["clinic-b", "clinic-a", "lab"])
def test_who_is_no_coordinator(who: str, site: Site, world: World) -> None:
    assert site.refuses(Coordinator(world, tree(), who).ask(0, 3)).startswith("identity.")


def test_coordinator_of_another_consortium(site: Site, tmp_path: Path) -> None:
    other = World(tmp_path / "other", {})
    ca.init(other.folder / "ca", "Other")
    other.signers["hub"] = enrol(other.folder, "hub", Role.COORDINATOR)
    assert site.refuses(Coordinator(other, tree()).ask(0, 3)).startswith("identity.")


def test_revoked_coordinator(world: World, tmp_path: Path) -> None:
    mine = World(Path(shutil.copytree(world.folder, tmp_path / "c")), world.signers)
    (tmp_path / "s").mkdir()
    site, hub = Site(mine, tmp_path / "s"), Coordinator(mine, tree())
    site.sign(hub.ask(0, 3))
    ca.revoke(mine.folder / "ca", "hub")
    site.restart()
    assert site.refuses(hub.ask(3, 4)) == "identity.revoked"


def test_statement_of_another_kind_in_the_checkpoints_place(site: Site, hub: Coordinator) -> None:
    said = make(hub.signer, "urn:consilo:witness:1", [("root", hub.head(3).root)],
                {"site": "clinic-a", **hub.head(3).model_dump()})
    assert site.refuses(hub.ask(0, 3, checkpoint=said.decode())) == "log.form"


# The site's own ledger (CASES 28) ------------------------------------------------------------------------------------

MECHANISM = DpMechanism(trust="local", unit="record", adjacency="add_remove", sampler="poisson", q=0.5, clip=1.0, sigma=20.0,
                        steps=1, delta=1e-5, n_decl=500)


def charge(ledger: Ledger, round_no: int) -> None:
    seq = ledger.reserve(MECHANISM, run=RUN, contract=CONTRACT, round=round_no, attempt=0, code="0", approver="x")
    ledger.commit(seq, 1)


@pytest.fixture
def ledger(world: World, tmp_path: Path) -> Any:
    with Ledger.create(tmp_path / "ledger.jsonl", world.signers["clinic-a"], lineage="1a" * 16, unit="record",
                       adjacency="add_remove", delta=1e-5, cap=8.0) as made:
        made.encumber(RUN, [[(MECHANISM, 9)]], contract=CONTRACT, approver="x")
        for round_no in (1, 2, 3):
            charge(made, round_no)
        yield made


def stated(ledger: Ledger, signer: FileSigner, kind: str = "round-site", **changes: Any) -> str:
    """A statement of that kind that names the ledger's head; what else it says doesn't matter here."""
    said = {"site": "clinic-a", "lineage": ledger.lineage, "ledger_seq": ledger.head.seq, "ledger_head": ledger.head.hash}
    return make(signer, KINDS[kind].predicate_type, [("view", "00" * 32)], said | changes).decode()


@pytest.mark.parametrize("kind", ["round-site", "closing"])
def test_ledger_that_goes_on_from_what_was_stated(kind: str, site: Site, hub: Coordinator, ledger: Ledger) -> None:
    word = stated(ledger, site.world.signers["clinic-a"], kind)
    assert says(site, site.sign(hub.ask(0, 3, ledger=word), ledger), hub.head(3))
    charge(ledger, 4)
    assert says(site, site.sign(hub.ask(3, 4, ledger=word), ledger), hub.head(4))
    assert site.sign(hub.ask(4, 5, ledger=word), None).statement, "a run without privacy has no ledger to compare"


def rewritten(ledger: Ledger, tmp_path: Path, world: World, rounds: tuple[int, ...]) -> Ledger:
    """Another history of the same lineage, under the site's own key."""
    copy = Ledger.create(tmp_path / f"{len(rounds)}.jsonl", world.signers["clinic-a"], lineage=ledger.lineage,
                         unit="record", adjacency="add_remove", delta=1e-5, cap=8.0)
    copy.encumber(RUN, [[(MECHANISM, 9)]], contract=CONTRACT, approver="x")
    for round_no in rounds:
        charge(copy, round_no)
    return copy


@pytest.mark.parametrize("kind", ["round-site", "closing"])
@pytest.mark.parametrize("what", ["truncated", "rolled back", "edited", "reordered", "swapped for a copy"])
def test_case_28_ledger_that_lacks_what_this_site_stated(what: str, kind: str, site: Site, hub: Coordinator, ledger: Ledger,
                                                         world: World, tmp_path: Path) -> None:
    """`Ledger.open` accepts each of these files: only what others kept shows that it isn't the newest."""
    signer, path = world.signers["clinic-a"], tmp_path / "ledger.jsonl"
    older = path.read_bytes()
    charge(ledger, 4)
    word = stated(ledger, signer, kind)
    ledger.close()
    match what:
        case "truncated":
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
        case "rolled back" | "swapped for a copy":
            path.write_bytes(older)
    now = (Ledger.open(path, signer) if what in ("truncated", "rolled back") else
           rewritten(ledger, tmp_path, world, {"edited": (1, 2, 3, 5), "reordered": (1, 3, 2, 4)}.get(what, (1, 2, 3))))
    if what == "swapped for a copy":
        charge(now, 5)  # as long as the lost one
    with now:
        assert site.refuses(hub.ask(0, 3, ledger=word), now) == "ledger.rolled_back"
        assert site.conflict() == {"ledger": word}
        site.restart()
        with pytest.raises(StageRefused):
            site.witness.require_trust()
        assert site.refuses(hub.ask(0, 3), now) == SiteCode.HISTORY


def test_word_that_is_not_about_this_ledger_is_ignored(site: Site, hub: Coordinator, ledger: Ledger, world: World) -> None:
    signer = world.signers["clinic-a"]
    lies = {"ledger_head": "00" * 32}
    for size, word in enumerate((
            stated(ledger, signer, lineage="2b" * 16, **lies), stated(ledger, signer, "acceptance", **lies),
            stated(ledger, world.signers["clinic-b"], **lies), stated(ledger, hub.signer, **lies), "{}", "no JSON",
            stated(ledger, signer, **lies)[:-1]), 1):
        assert says(site, site.sign(hub.ask(size - 1, size, ledger=word), ledger), hub.head(size))
    assert site.conflict() is None


# Its own disk --------------------------------------------------------------------------------------------------------

def test_state_that_is_not_what_it_wrote(site: Site, hub: Coordinator) -> None:
    site.sign(hub.ask(0, 6))
    good = site.seen()

    def without(key: str) -> Any:
        return {"hub": {k: v for k, v in good["hub"].items() if k != key}}

    def with_head(**changes: Any) -> Any:
        return {"hub": {**good["hub"], "head": {**good["hub"]["head"], **changes}}}

    broken = [b"", b"{", b"[]", b"7", b"null", b'{"hub":7}', b'{"hub":{},"hub":{}}',
              *map(canonical, (without("head"), without("checkpoint"), without("certificate"), without("run"),
                               with_head(size=-1), with_head(size="6"), with_head(root="xy"), with_head(more=1)))]
    for data in broken:
        (site.folder / HEAD).write_bytes(data)
        with pytest.raises(ConsiloError) as caught:
            site.restart()
        assert caught.value.code == "witness.state", data
    (site.folder / HEAD).write_bytes(canonical(good))
    site.restart()
    assert says(site, site.sign(hub.ask(6, 7)), hub.head(7))


class FailingDisk(FileLayer):
    """The write of one file fails, before or after it took effect."""

    def __init__(self, name: str, *, after: bool) -> None:
        self.name, self.after = name, after

    def write_atomic(self, path: Path, data: bytes, *, mode: int = 0o644) -> None:
        if path.name != self.name:
            return super().write_atomic(path, data, mode=mode)
        if self.after:
            super().write_atomic(path, data, mode=mode)
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("after", [False, True])
def test_no_signature_leaves_before_the_head_is_on_disk(after: bool, world: World, tmp_path: Path, hub: Coordinator) -> None:
    site, fork = Site(world, tmp_path), Coordinator(world, tree(history="f"))
    site.sign(hub.ask(0, 6))
    site.restart(FailingDisk(HEAD, after=after))
    with pytest.raises(OSError, match="No space"):
        site.sign(hub.ask(6, 9))
    site.restart()  # whichever head is on disk, the other history isn't signed
    assert site.seen()["hub"]["head"] == hub.head(9 if after else 6).model_dump()
    assert site.refuses(fork.ask(9 if after else 6, 9)) == "log.split_view"


def test_a_failed_write_is_not_remembered_as_seen(world: World, tmp_path: Path, hub: Coordinator) -> None:
    site = Site(world, tmp_path)
    site.sign(hub.ask(0, 6))
    site.restart(FailingDisk(HEAD, after=False))
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            site.sign(hub.ask(6, 9))
    assert site.seen()["hub"]["head"]["size"] == 6


def test_a_conflict_counts_even_if_its_file_cannot_be_written(world: World, tmp_path: Path, hub: Coordinator) -> None:
    site = Site(world, tmp_path)
    site.sign(hub.ask(0, 6))
    site.restart(FailingDisk(CONFLICT, after=False))
    with pytest.raises(OSError, match="No space"):
        site.sign(Coordinator(world, tree(history="f")).ask(6, 9))
    assert site.refuses(hub.ask(6, 9)) == SiteCode.HISTORY
    site.restart()
    assert site.sign(Coordinator(world, tree(history="f")).ask(5, 9)).size == 6, "and the head that was seen stays"
