"""A client believes the coordinator nothing that someone else signed; a failed check leaves every file as it was."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from control_kit import HOST, RUN, Running, World, approval, running, secrets_of
from evidence_fixture import statement_path

from conf.settings import SiteSettings
from fl_client.approval import hand_in
from fl_client.control import ControlClient
from privacy import ca
from privacy.bundle import read_bundle
from privacy.canonical import canonical, parse
from privacy.control import MAX_APPROVAL_BYTES
from privacy.control import consilo_control_pb2 as pb
from privacy.control import consilo_control_pb2_grpc as rpc
from privacy.control.reasons import reason
from privacy.errors import CheckFailed, ConsiloError, Refused, Unreachable, UsageError
from privacy.identity import Role, create_request
from privacy.verify import verify_bundle


def snapshot(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def code(error: type[ConsiloError], call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return caught.value.code


@pytest.fixture
def own(world: World, tmp_path: Path) -> Iterator[Running]:
    """Listeners of which a test may change what they serve."""
    with running(world, tmp_path / "own") as made:
        yield made


# --- roster and revocation lists ------------------------------------------------------------------------------------

def lists_at(world: World, at: datetime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CA signs its lists as if at that time."""
    with monkeypatch.context() as patch:
        patch.setattr(ca, "_now", lambda: at.replace(microsecond=0))
        ca.refresh_crls(world.ca)


def hand_over(control: Running) -> None:
    """The coordinator's operator puts the CA's present lists in place."""
    for pem in control.world.ca.glob("crl-*.pem"):
        shutil.copy(pem, control.trust)


def test_roster_and_lists_are_renewed(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client, folder = own.client("clinic-b"), own.root / "at-clinic-b"
    lists_at(own.world, datetime.now(UTC) + timedelta(seconds=90), monkeypatch)
    hand_over(own)
    names = {e.name for e in client.roster()}
    assert {"auditor", "engineer", "hub", "outsider", "clinic-a", "clinic-d"} < names and "gone" not in names
    assert (folder / "roster.json").read_bytes() == (own.store.root / "roster.json").read_bytes()
    assert all((folder / "trust" / pem.name).read_bytes() == pem.read_bytes() for pem in own.world.ca.glob("crl-*.pem"))


def test_roster_helps_a_site_whose_lists_have_run_out(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else works then, for good reason."""
    client, folder = own.client("clinic-b"), own.root / "at-clinic-b"
    now = datetime.now(UTC)
    lists_at(own.world, now - timedelta(days=31), monkeypatch)
    for pem in own.world.ca.glob("crl-*.pem"):
        shutil.copy(pem, folder / "trust")
    assert code(Refused, client.contracts) == "identity.crl_stale"
    lists_at(own.world, now, monkeypatch)
    hand_over(own)
    client.roster()
    assert client.contracts() == [own.world.contract.digest]


def test_attack_older_lists_hide_a_revocation(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client, folder = own.client("clinic-b"), own.root / "at-clinic-b"
    lists_at(own.world, datetime.now(UTC) + timedelta(seconds=90), monkeypatch)
    shutil.copy(own.world.ca / "crl-site.pem", folder / "trust")
    before = snapshot(folder)
    assert code(Refused, client.roster) == "control.older"
    assert snapshot(folder) == before


@pytest.mark.parametrize("name, want", [
    ("roster of another CA", (CheckFailed, "statement.key")), ("edited roster", (CheckFailed, "statement.signature")),
    ("no roster", (Unreachable, "control.store"))])
def test_attack_forged_roster(own: Running, tmp_path: Path, name: str, want: tuple[type[ConsiloError], str]) -> None:
    client, folder, path = own.client("clinic-b"), own.root / "at-clinic-b", own.store.root / "roster.json"
    if name == "roster of another CA":
        ca.init(tmp_path / "other", "Test consortium")
        path.write_bytes(ca.roster(tmp_path / "other"))
    elif name == "edited roster":
        envelope = parse(path.read_bytes())
        path.write_bytes(canonical({**envelope, "payload": envelope["payload"][:-8] + "AAAA" + envelope["payload"][-4:]}))
    else:
        path.unlink()
    before = snapshot(folder)
    assert code(want[0], client.roster) == want[1]
    assert snapshot(folder) == before


class Evil(rpc.RosterServicer, rpc.ContractsServicer, rpc.EvidenceServicer, rpc.AdaptersServicer):
    """A coordinator with a genuine certificate that answers whatever a test wants."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def Get(self, request: Any, context: Any) -> Any:
        return self.answers["get"]

    def List(self, request: Any, context: Any) -> Any:
        context.abort(self.answers["status"], self.answers["details"])

    def Fetch(self, request: Any, context: Any) -> Any:
        yield from self.answers["chunks"]


@contextmanager
def evil(world: World, where: Path, add: Callable[..., None], name: str = "clinic-b", **answers: Any,
         ) -> Iterator[ControlClient]:
    tls = grpc.ssl_server_credentials([((world.keys("hub") / "tls.key").read_bytes(),
                                        (world.issued("hub") / "tls.pem").read_bytes())])
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        add(Evil(**answers), server)
        port = server.add_secure_port(f"{HOST}:0", tls)
        server.start()
        folder = where if where.exists() else world.folder(name, where)
        try:
            yield ControlClient(f"https://{HOST}:{port}", folder, folder)
        finally:
            server.stop(0).wait()


@pytest.mark.parametrize("lists, want", [
    ([], "control.older"), (["site", "site"], "identity.untrusted"), (["site", "engineer"], "control.older"),
    (["garbage"], "identity.malformed"), (["other"], "identity.untrusted")])
def test_attack_lists_left_out_doubled_or_of_another_ca(world: World, tmp_path: Path, lists: list[str], want: str) -> None:
    ca.init(tmp_path / "other", "Test consortium")
    known = {"garbage": b"-----BEGIN X509 CRL-----\nAA==\n-----END X509 CRL-----\n",
             "other": (tmp_path / "other/crl-site.pem").read_bytes()}
    reply = pb.RosterReply(roster=ca.roster(world.ca),
                           crls=[known.get(x) or (world.ca / f"crl-{x}.pem").read_bytes() for x in lists])
    with evil(world, tmp_path / "b", rpc.add_RosterServicer_to_server, get=reply) as client:
        before = snapshot(tmp_path / "b")
        assert code(ConsiloError, client.roster) == want
        assert snapshot(tmp_path / "b") == before


def test_attack_text_of_the_coordinator_is_never_shown(world: World, tmp_path: Path) -> None:
    """A status that isn't of the closed list, or does not go with its code, is said in our own words."""
    for status, details, want in (("NOT_FOUND", "canary\n\x1b[31m", "internal.bug"),
                                  ("PERMISSION_DENIED", "control.role", "control.role"),
                                  ("OUT_OF_RANGE", "control.role", "internal.bug"),
                                  ("RESOURCE_EXHAUSTED", "canary", "control.busy"),
                                  ("UNIMPLEMENTED", "canary", "control.version"),
                                  ("UNAVAILABLE", "canary", "control.refused"),
                                  ("DEADLINE_EXCEEDED", "canary", "control.deadline")):
        with evil(world, tmp_path / "b", rpc.add_ContractsServicer_to_server, status=grpc.StatusCode[status],
                  details=details) as client, pytest.raises(ConsiloError) as caught:
            client.contracts()
        assert caught.value.code == want
        chain = [caught.value, caught.value.__cause__]
        assert "canary" not in "".join(map(str, chain))


# --- the server's certificate -----------------------------------------------------------------------------------------

def test_attack_server_with_a_certificate_of_another_role(world: World, tmp_path: Path) -> None:
    """A site plays the coordinator; so does a CA of the same name, and a coordinator at another host."""
    folder = world.folder("clinic-b", tmp_path / "b")
    ca.init(tmp_path / "other", "Test consortium")
    rogue = ca.issue(tmp_path / "other", create_request(tmp_path / "r", "hub", "Organisation of hub"), Role.COORDINATOR,
                     hosts=[HOST])
    elsewhere = ca.issue(world.ca, create_request(tmp_path / "e", "hub-2", "Second hub"), Role.COORDINATOR,
                         hosts=["elsewhere.example.org"])
    ca.revoke(world.ca, "hub-2")
    for key, certificate in ((world.keys("clinic-a"), world.issued("clinic-a")), (tmp_path / "r", rogue.folder),
                             (tmp_path / "e", elsewhere.folder)):
        with running(world, tmp_path / f"s{key.name}", key=key / "tls.key", certificate=certificate / "tls.pem") as control:
            client = ControlClient(control.url, folder, folder)
            for call in (client.roster, client.contracts):
                assert code(Refused, call) == "control.untrusted"


@pytest.mark.parametrize("known", [True, False])
def test_attack_revoked_coordinator(world: World, tmp_path: Path, known: bool) -> None:
    """The site has the list that revokes it, or gets that list from the revoked one itself: nothing is written."""
    who = f"hub-{known}".lower()
    world.parties.enrol(who, Role.COORDINATOR)
    del world.parties.signers[who]
    ca.revoke(world.ca, who)
    folder = world.folder("clinic-b", tmp_path / "b")
    if known:
        shutil.copy(world.ca / "crl-coordinator.pem", folder / "trust")
    before = snapshot(folder)
    with running(world, tmp_path / "s", key=world.keys(who) / "tls.key",
                 certificate=world.issued(who) / "tls.pem") as control:
        assert code(Refused, ControlClient(control.url, folder, folder).roster) == "identity.revoked"
    assert snapshot(folder) == before


# --- contracts --------------------------------------------------------------------------------------------------------

def test_contract_with_its_signature(control: Running) -> None:
    digest = control.world.contract.digest
    assert control.client("auditor").contract(digest) == (control.world.contract.to_bytes(), b"signed by the engineer")
    for wrong in ("0" * 64, "../" + digest, "", digest.upper()):
        assert code(UsageError, control.client("auditor").contract, wrong) == "control.not_found"


def test_attack_another_contract_under_the_same_digest(own: Running) -> None:
    digest = own.world.contract.digest
    path = own.store.root / "contracts" / digest / "contract.json"
    path.write_bytes(path.read_bytes().replace(b'"rounds":3', b'"rounds":4'))
    assert code(CheckFailed, own.client("clinic-a").contract, digest) == "control.digest"


def test_approval_counts_once(own: Running) -> None:
    digest, client = own.world.contract.digest, own.client("clinic-a")
    envelope = approval(own.world.parties.signers["clinic-a"], digest)
    client.approve(digest, envelope)
    client.approve(digest, envelope)
    assert code(Refused, client.approve, digest, envelope + b" ") == "control.approved"
    own.client("clinic-b").approve(digest, b"another's")
    folder = own.store.root / "contracts" / digest / "approvals"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"clinic-a.json": envelope, "clinic-b.json": b"another's"}
    for size in (0, MAX_APPROVAL_BYTES + 1):
        assert code(UsageError, own.client("clinic-c").approve, digest, bytes(size)) == "control.too_large"
    assert code(UsageError, own.client("clinic-c").approve, "0" * 64, b"x") == "control.not_found"
    assert code(Refused, own.client("engineer").approve, digest, b"x") == "control.role"


def test_an_approval_is_handed_in_or_the_reason_is_told(own: Running, tmp_path: Path) -> None:
    contract, at = own.world.contract, own.root / "at-clinic-a"
    own.client("clinic-a")
    site = SiteSettings(control_url=own.url, keys=str(at), certificates=str(at))
    path = tmp_path / "approval.json"
    path.write_bytes(approval(own.world.parties.signers["clinic-a"], contract.digest))
    assert hand_in(site, contract, path) is None
    kept = own.store.root / "contracts" / contract.digest / "approvals" / "clinic-a.json"
    assert kept.read_bytes() == path.read_bytes()
    path.write_bytes(b"another")
    assert hand_in(site, contract, path) == "control.approved"
    assert hand_in(site.model_copy(update={"control_url": "https://localhost:1"}), contract, path) == "control.unreachable"


def test_only_a_contract_with_its_own_digest_is_published(own: Running) -> None:
    assert code(UsageError, own.store.publish_contract, "0" * 64, b"{}") == "control.digest"


# --- evidence and adapter ---------------------------------------------------------------------------------------------

def test_evidence_and_adapter_arrive_whole(control: Running, tmp_path: Path) -> None:
    client, source = control.client("clinic-a"), control.world.root / "run"
    client.evidence(RUN, tmp_path / "evidence")
    assert read_bundle(tmp_path / "evidence").files == read_bundle(source / "evidence").files
    assert verify_bundle(tmp_path / "evidence", control.world.parties.fingerprint).verdict == "PASS"
    client.adapter(RUN, tmp_path / "with", tmp_path / "evidence")
    control.client("engineer").adapter(RUN, tmp_path / "without")
    assert snapshot(tmp_path / "with") == snapshot(tmp_path / "without") == snapshot(source / "adapter")
    assert code(UsageError, client.evidence, RUN, tmp_path / "evidence") == "control.exists"
    assert code(Refused, control.client("auditor").adapter, RUN, tmp_path / "x") == "control.role"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evidence", "with", "without"]


@pytest.mark.parametrize("run", ["0" * 32, "../" + RUN, "", RUN.upper(), "."])
def test_runs_that_are_not_there(control: Running, tmp_path: Path, run: str) -> None:
    assert code(UsageError, control.client("auditor").evidence, run, tmp_path / "x") == "control.not_found"
    assert list(tmp_path.iterdir()) == []


def test_attack_paths_in_place_of_a_run_or_digest(own: Running, tmp_path: Path) -> None:
    """What they would lead to is there, and may even be read by the caller."""
    shutil.copytree(own.world.root / "run", own.store.root / "private")
    shutil.copy(own.store.root / "private/evidence/contract.json", own.store.root / "private")
    for path in ("../private", f"{RUN}/../../private", str(own.store.root / "private")):
        fetch = pb.FetchRequest(run=path).SerializeToString()
        approve = pb.ApproveRequest(digest=path, envelope=b"x").SerializeToString()
        for method, body in (("Evidence/Fetch", fetch), ("Adapters/Fetch", fetch), ("Contracts/Approve", approve),
                             ("Contracts/Get", pb.ContractRequest(digest=path).SerializeToString())):
            assert own.raw("clinic-a", f"/consilo.control.v1.{method}", body) == ("NOT_FOUND", "control.not_found")
    assert not (own.store.root / "private" / "approvals").exists()


def other_run(own: Running, change: Callable[[Path], object]) -> None:
    """Serve a changed copy of the run in its place."""
    shutil.copytree(own.world.root / "run", own.root / "copy")
    change(own.root / "copy")
    (own.store.root / "runs" / RUN).unlink()
    own.store.publish_run(RUN, own.root / "copy")


def test_a_run_is_served_once_its_evidence_is_sealed(own: Running, tmp_path: Path) -> None:
    other_run(own, lambda copy: (copy / "evidence/manifest.json").unlink())
    client = own.client("clinic-a")
    assert code(UsageError, client.evidence, RUN, tmp_path / "x") == "control.not_found"
    assert code(UsageError, client.adapter, RUN, tmp_path / "x") == "control.not_found"


def edit_statement(copy: Path) -> None:
    path = statement_path(copy / "evidence", "closing", "clinic-a")
    path.write_bytes(path.read_bytes().replace(b"sig", b"gis"))


@pytest.mark.parametrize("change", [
    edit_statement, lambda copy: (copy / "evidence/ledgers/clinic-a.jsonl").unlink(),
    lambda copy: (copy / "evidence/extra.json").write_bytes(b"{}")])
def test_attack_evidence_that_does_not_verify_is_not_kept(own: Running, tmp_path: Path,
                                                          change: Callable[[Path], object]) -> None:
    other_run(own, change)
    assert code(CheckFailed, own.client("auditor").evidence, RUN, tmp_path / "x") == "control.evidence"
    assert list(tmp_path.iterdir()) == [own.root]


def swap_tensors(copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "adapter/head.safetensors")
    tensors["bias"][0] += 1
    save_file(tensors, copy / "adapter/head.safetensors")


@pytest.mark.parametrize("change", [
    swap_tensors, lambda copy: (copy / "adapter/head.safetensors").unlink(),
    lambda copy: (copy / "adapter/adapter_model.safetensors").write_bytes(b"\xff" * 100)])
def test_attack_adapter_other_than_the_released_one(own: Running, tmp_path: Path, change: Callable[[Path], object]) -> None:
    other_run(own, change)
    assert code(CheckFailed, own.client("engineer").adapter, RUN, tmp_path / "x") == "control.adapter"
    assert list(tmp_path.iterdir()) == [own.root]


def test_attack_adapter_of_a_run_that_released_none(own: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_run(own, lambda copy: (copy / "adapter/adapter_model.safetensors").write_bytes(b"\xff" * 100))
    monkeypatch.setattr(type(own.client("engineer")), "_release", lambda *_: "")
    assert code(CheckFailed, own.client("engineer").adapter, RUN, tmp_path / "x") == "control.adapter"


def test_attack_pickle_among_the_adapter(own: Running, tmp_path: Path) -> None:
    other_run(own, lambda copy: (copy / "adapter/adapter_model.bin").write_bytes(b"\x80\x04"))
    assert code(CheckFailed, own.client("engineer").adapter, RUN, tmp_path / "x") == "control.transfer"


def test_links_and_hidden_files_of_a_run_are_not_served(own: Running, tmp_path: Path) -> None:
    def plant(copy: Path) -> None:
        (copy / "evidence/zz.json").symlink_to(own.world.keys("hub") / "tls.key")
        (copy / "evidence/zz").symlink_to(own.world.keys("hub"), target_is_directory=True)
        (copy / "evidence/.secret").write_bytes(b"x")

    other_run(own, plant)
    own.client("auditor").evidence(RUN, tmp_path / "x")
    assert read_bundle(tmp_path / "x").files == read_bundle(own.world.root / "run/evidence").files


def chunk(name: str, data: bytes = b"x", *, last: bool = True, whole: bytes | None = None) -> pb.Chunk:
    """whole: what the file's digest is of; default: data."""
    return pb.Chunk(name=name, data=data, last=last, sha256=hashlib.sha256(data if whole is None else whole).digest())


@pytest.mark.parametrize("chunks", [
    [chunk("../escape")], [chunk("/etc/escape")], [chunk("a/../escape")], [chunk("a/b/c")], [chunk(".hidden")], [chunk("")],
    [chunk("b"), chunk("a")], [chunk("a"), chunk("a")], [chunk("a", last=False), chunk("b", whole=b"xx")],
    [chunk("a", last=False)], [chunk("a", whole=b"no")], [], [chunk(f"{i:06d}") for i in range(2001)],
    [*(chunk("a", bytes(2**20), last=False) for _ in range(8)), chunk("a", whole=bytes(2**23) + b"x")]],
    ids=["up", "absolute", "up inside", "deep", "hidden", "nameless", "backwards", "twice", "mixed", "cut", "digest",
         "nothing", "too many", "too large"])
def test_attack_files_that_do_not_belong(world: World, tmp_path: Path, chunks: list[pb.Chunk],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from privacy import bundle

    monkeypatch.setattr(bundle, "MAX_FILES", 2000)
    monkeypatch.setattr(bundle, "MAX_BUNDLE_BYTES", 8 * 2**20)
    (tmp_path / "out").mkdir()
    with evil(world, tmp_path / "b", rpc.add_EvidenceServicer_to_server, chunks=chunks) as client:
        assert code(CheckFailed, client.evidence, RUN, tmp_path / "out" / "x") == "control.transfer"
    assert list((tmp_path / "out").iterdir()) == [] and not list(tmp_path.rglob("escape"))


def test_a_transfer_that_is_cut_goes_on_after_the_last_whole_file(own: Running, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends every stream after its third file, wherever it began; nothing is sent twice."""
    parts, sent = own.store.parts, []

    def cut(*args: Any) -> Any:
        for i, part in enumerate(parts(*args)):
            if i == 3:
                raise reason("control.store")
            sent.append(part[0])
            yield part

    monkeypatch.setattr(own.store, "parts", cut)
    own.client("auditor").evidence(RUN, tmp_path / "x")
    assert sent == sorted(read_bundle(tmp_path / "x").files)


def test_case_31_nothing_secret_is_served(own: Running, tmp_path: Path) -> None:
    """Whatever the coordinator serves to an engineer holds none of its keys."""
    client = own.client("engineer")
    client.roster()
    client.adapter(RUN, tmp_path / "adapter")
    client.evidence(RUN, tmp_path / "evidence")
    folders = tmp_path / "adapter", tmp_path / "evidence", own.root / "at-engineer" / "trust"
    served = b"".join(p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file())
    secrets = secrets_of(own.world.keys("hub"))
    assert len(secrets) == 6 and not any(secret in served for secret in secrets)
