"""Who may call what: each role at each method, before anything of the request is parsed; revocation at every call."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from control_kit import HOST, RUN, Running, World, running, status_of
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fl_server.control_admission import OPEN, ROLES, RoleAdmission, WatchedTrust
from fl_server.control_guard import Guard
from privacy import ca
from privacy.control import consilo_control_pb2 as pb
from privacy.errors import Refused
from privacy.identity import Role

MALFORMED = b"\xff\xff\xff\xff"  # a field number without a value: no protobuf message
NAMES = {Role.SITE: "clinic-a", Role.ENGINEER: "engineer", Role.AUDITOR: "auditor"}
SERVED = [f"/{service.full_name}/{method.name}" for service in pb.DESCRIPTOR.services_by_name.values()
          for method in service.methods]
READERS = {Role.SITE, Role.ENGINEER, Role.AUDITOR}
WANTED = {  # written out anew: the table in the code must say the same
    "/consilo.control.v1.Roster/Get": READERS,
    "/consilo.control.v1.Contracts/List": READERS,
    "/consilo.control.v1.Contracts/Get": READERS,
    "/consilo.control.v1.Contracts/Approve": {Role.SITE},
    "/consilo.control.v1.Evidence/Fetch": READERS,
    "/consilo.control.v1.Adapters/Fetch": {Role.SITE, Role.ENGINEER},
    "/grpc.health.v1.Health/Check": READERS,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": {Role.ENGINEER},
}


def test_every_method_is_in_exactly_one_table() -> None:
    assert {m for m in ROLES if "consilo" in m} | {m for m in OPEN if "consilo" in m} == set(SERVED)
    assert not {m for m in ROLES if "consilo" in m} & set(OPEN)
    assert set(ROLES) == set(WANTED)


@pytest.mark.parametrize("method", WANTED)
@pytest.mark.parametrize("role", NAMES)
def test_each_role_at_each_method_before_parsing(control: Running, role: Role, method: str) -> None:
    """The same broken body: who may call learns that it is broken, who may not learns nothing of it."""
    want = (("INVALID_ARGUMENT", "control.malformed") if role in WANTED[method] else
            ("PERMISSION_DENIED", "control.role"))
    assert control.raw(NAMES[role], method, MALFORMED) == want


@pytest.mark.parametrize("role", NAMES)
def test_enrolment_is_not_served_on_the_port_of_certificates(control: Running, role: Role) -> None:
    for method in ("Authorities", "Submit", "Poll"):
        assert control.raw(NAMES[role], f"/consilo.control.v1.Enrolment/{method}")[0] == "UNIMPLEMENTED"


@pytest.mark.parametrize("method", sorted(set(ROLES) - set(OPEN)))
def test_without_a_certificate_nothing_else_is_served(control: Running, method: str) -> None:
    assert control.raw(None, method, MALFORMED, enrol=True)[0] == "UNIMPLEMENTED"
    assert control.raw("engineer", method, MALFORMED, enrol=True)[0] == "UNIMPLEMENTED"


def test_attack_methods_that_no_table_names(control: Running) -> None:
    assert control.raw("engineer", "/grpc.health.v1.Health/Watch") == ("PERMISSION_DENIED", "control.role")
    assert control.raw(None, "/grpc.health.v1.Health/Watch", enrol=True) == ("PERMISSION_DENIED", "control.role")
    assert control.raw("engineer", "/consilo.control.v1.Roster/Put")[0] == "UNIMPLEMENTED"


@pytest.mark.parametrize("name", [None, "hub"])
def test_attack_no_certificate_or_one_of_a_role_that_never_calls(control: Running, name: str | None) -> None:
    """Refused at the handshake."""
    assert control.raw(name, "/consilo.control.v1.Roster/Get")[0] == "UNAVAILABLE"


def test_attack_certificate_of_another_ca(control: Running, tmp_path: Path) -> None:
    from privacy.identity import create_request

    ca.init(tmp_path / "ca", "Test consortium")
    issued = ca.issue(tmp_path / "ca", create_request(tmp_path / "k", "clinic-a", "Organisation of clinic-a"), Role.SITE)
    with control.channel("clinic-a") as good:
        assert status_of(lambda: good.unary_unary("/consilo.control.v1.Roster/Get")(b"", timeout=10)) == ("OK", "")
    server, key, certificate = (path.read_bytes() for path in (
        control.world.issued("hub") / "tls.pem", tmp_path / "k/tls.key", issued.folder / "tls.pem"))
    credentials = grpc.ssl_channel_credentials(server, key, certificate)
    with grpc.secure_channel(f"{HOST}:{control.server.port}", credentials) as channel:
        assert status_of(lambda: channel.unary_unary("/consilo.control.v1.Roster/Get")(b"", timeout=10))[0] == "UNAVAILABLE"


def test_case_36_revoked_certificate_on_its_first_call_before_parsing(control: Running) -> None:
    for method in WANTED:
        if Role.SITE in WANTED[method]:
            assert control.raw("gone", method, MALFORMED) == ("UNAUTHENTICATED", "identity.revoked")


def test_case_36_revoked_while_connected(world: World, tmp_path: Path) -> None:
    """The next call on the same connection is refused once the new list is in the trust folder."""
    world.parties.enrol("leaver", Role.SITE)
    del world.parties.signers["leaver"]
    with running(world, tmp_path) as control, control.channel("leaver") as channel:
        get = channel.unary_unary("/consilo.control.v1.Roster/Get")
        assert status_of(lambda: get(b"", timeout=10)) == ("OK", "")
        ca.revoke(world.ca, "leaver")
        assert status_of(lambda: get(b"", timeout=10)) == ("OK", "")  # nobody has told the coordinator yet
        new = control.trust / "crl-site.pem.new"
        new.write_bytes((world.ca / "crl-site.pem").read_bytes())
        new.replace(control.trust / "crl-site.pem")
        assert status_of(lambda: get(MALFORMED, timeout=10)) == ("UNAUTHENTICATED", "identity.revoked")


@pytest.mark.parametrize("damage", ["missing", "garbage", "of another CA", "run out"])
def test_a_revocation_list_that_can_not_be_used_closes_the_door(world: World, tmp_path: Path, damage: str,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    with running(world, tmp_path) as control:
        path = control.trust / "crl-site.pem"
        if damage == "missing":
            path.unlink()
        elif damage == "garbage":
            path.write_bytes(b"no list")
        elif damage == "of another CA":
            ca.init(tmp_path / "other", "Test consortium")
            path.write_bytes((tmp_path / "other/crl-site.pem").read_bytes())
        else:
            with monkeypatch.context() as patch:
                patch.setattr(ca, "_now", lambda: datetime.now(UTC).replace(microsecond=0) - timedelta(days=31))
                ca.refresh_crls(world.ca)
            path.write_bytes((world.ca / "crl-site.pem").read_bytes())
            ca.refresh_crls(world.ca)
        assert control.raw("clinic-a", "/consilo.control.v1.Roster/Get") == ("UNAVAILABLE", "control.store")
        path.write_bytes((world.ca / "crl-site.pem").read_bytes())
        assert control.raw("clinic-a", "/consilo.control.v1.Roster/Get") == ("OK", "")


def test_does_not_start_without_revocation_lists(world: World, tmp_path: Path) -> None:
    trust = world.trust(tmp_path / "trust")
    (trust / "crl-auditor.pem").unlink()
    with pytest.raises(Refused) as caught:
        WatchedTrust(trust)
    assert caught.value.code == "identity.crl_missing"


def test_case_30_key_open_to_others(world: World, tmp_path: Path) -> None:
    key = tmp_path / "tls.key"
    key.write_bytes((world.keys("hub") / "tls.key").read_bytes())
    key.chmod(0o640)
    with pytest.raises(Refused) as caught, running(world, tmp_path / "x", key=key):
        pass
    assert caught.value.code == "key.permissions"


class OldTls:
    """What gRPC would say of a connection over TLS 1.2."""

    def __init__(self, pem: bytes) -> None:
        self._pem = pem

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"ssl_tls_version": [b"TLSv1.2"], "x509_pem_cert": [self._pem]}


def test_attack_tls_1_2(control: Running) -> None:
    """A handshake may succeed (gRPC can't be told otherwise from Python), a call does not."""
    admit = RoleAdmission(WatchedTrust(control.trust))
    with pytest.raises(Refused) as caught:
        admit("/consilo.control.v1.Roster/Get", OldTls((control.world.issued("clinic-a") / "tls.pem").read_bytes()))
    assert caught.value.code == "control.tls"


def test_health_and_reflection(control: Running) -> None:
    with control.channel("engineer") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=10) == b"\x08\x01"  # SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(iter(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]), timeout=10)))
        found = {service.name for service in answer.list_services_response.service}
    assert {f"consilo.control.v1.{name}" for name in ("Roster", "Contracts", "Evidence", "Adapters")} < found
    assert "consilo.control.v1.Enrolment" not in found
    with control.channel(None, enrol=True) as channel:
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10) == b"\x08\x01"


def test_connections_are_tls_1_3_with_a_hybrid_key_exchange(control: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    admit = RoleAdmission.__call__

    def note(self: RoleAdmission, method: str, context: grpc.ServicerContext) -> str:
        seen.update(context.auth_context())
        return admit(self, method, context)

    monkeypatch.setattr(RoleAdmission, "__call__", note)
    control.client("clinic-a").contracts()
    assert (seen["ssl_tls_version"], seen["ssl_negotiated_key_exchange_group"]) == ([b"TLSv1.3"], [b"X25519MLKEM768"])


def test_a_sites_reach_ends_at_its_own_contracts(control: Running) -> None:
    """clinic-a is named in the contract, outsider in none: to it there is nothing."""
    digest = control.world.contract.digest
    fetch = pb.FetchRequest(run=RUN).SerializeToString()
    assert control.client("clinic-a").contracts() == [digest] == control.client("auditor").contracts()
    assert control.client("outsider").contracts() == []
    for method, body in (("Contracts/Get", pb.ContractRequest(digest=digest).SerializeToString()),
                         ("Contracts/Approve", pb.ApproveRequest(digest=digest, envelope=b"x").SerializeToString()),
                         ("Evidence/Fetch", fetch), ("Adapters/Fetch", fetch)):
        assert control.raw("outsider", f"/consilo.control.v1.{method}", body) == ("NOT_FOUND", "control.not_found")


def test_exceptions_of_a_service_do_not_travel(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> list[str]:
        raise RuntimeError("canary-55b1 /some/path")

    with running(world, tmp_path) as control:
        monkeypatch.setattr(control.store, "contracts", fails)
        assert control.raw("clinic-a", "/consilo.control.v1.Contracts/List") == ("INTERNAL", "internal.bug")
    assert "RuntimeError" in caplog.text and "canary" not in caplog.text


def test_guard_is_the_only_way_in() -> None:
    """An unknown method has no handler; every other one is wrapped."""
    guard = Guard(lambda method, context: "x")
    assert guard.intercept_service(lambda _: None, None) is None
