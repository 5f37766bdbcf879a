"""Enrolment and renewal end to end over loopback: site, relay and CA, and what a thief, a relay or a proxy may try."""

from __future__ import annotations

import io
import json
import logging
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from control_kit import HOST, Running, World, running, secrets_of

from fl_client import cli as client_cli
from fl_client import enrol as site
from fl_server.control_enrol import KEPT, MAX_WAITING, Relay
from privacy import ca, ca_cli, ca_enrol, cli_edge, enrol
from privacy.canonical import canonical, parse
from privacy.control import MAX_ENROLMENT_BYTES
from privacy.errors import ConsiloError, Refused, Unreachable, UsageError
from privacy.files import FileLayer
from privacy.identity import FileSigner, Role, create_request, fingerprint, load_certificate, load_key, make_request
from privacy.trust import TrustStore

NAME, ORGANISATION = "hospital-x", "Hospital X"


def code(error: type[ConsiloError], call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return caught.value.code


def never_waits(_: float) -> None:
    raise AssertionError("it waited")


@pytest.fixture
def control(world: World, tmp_path: Path) -> Iterator[Running]:
    with running(world, tmp_path / "control") as made:
        yield made


@pytest.fixture
def token(world: World) -> Iterator[enrol.Token]:
    """Whatever is certified under the name is revoked afterwards: the CA is shared."""
    yield ca_enrol.make_token(world.ca, NAME, ORGANISATION)[0]
    with suppress(UsageError):
        ca.revoke(world.ca, NAME)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def operators(control: Running, change: Callable[[bytes], bytes] = lambda document: document) -> Callable[[float], None]:
    """The CA's operator, who answers while the site waits. change: what the relay does to a request on its way."""

    def answer(_: float) -> None:
        for waiting in (control.store.root / "enrolments").iterdir():
            issued = ca_enrol.issue(control.world.ca, change((waiting / "request.json").read_bytes()))
            (waiting / "answer.json").write_bytes((issued.folder / "answer.json").read_bytes())

    return answer


def enroll(control: Running, token: enrol.Token, folder: Path, **changes: Any) -> None:
    settings: dict[str, Any] = {"url": control.enrol_url, "token": token, "ca": control.world.parties.fingerprint,
                                "folder": folder, "name": NAME, "organisation": ORGANISATION, "wait_s": 60.0,
                                "pause": operators(control)}
    site.enroll(**{**settings, **changes})


def waiting(control: Running) -> list[Path]:
    return sorted((control.store.root / "enrolments").iterdir())


# --- the good case ----------------------------------------------------------------------------------------------------

def test_enrolment_from_token_to_a_working_certificate(control: Running, token: enrol.Token, folder: Path) -> None:
    enroll(control, token, folder)
    assert {p.name for p in folder.iterdir()} == {"request.json", "sign.key", "sign.pem", "tls.key", "tls.pem", "trust"}
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.glob("*.key")} == {0o600}
    trust = TrustStore.load(folder / "trust")
    peer = trust.check(load_certificate((folder / "tls.pem").read_bytes()), Role.SITE, usage="tls", at=datetime.now(UTC))
    assert (peer.name, peer.organisation, trust.fingerprint) == (NAME, ORGANISATION, control.world.parties.fingerprint)
    assert FileSigner(folder / "sign.key", folder / "sign.pem").sign(b"x")
    from fl_client.control import ControlClient

    assert NAME not in {e.name for e in ControlClient(control.url, folder, folder).roster()}  # not signed anew yet


def test_an_interrupted_enrolment_goes_on(control: Running, token: enrol.Token, folder: Path) -> None:
    """The operator is slow: the command ends with 4; repeated, it sends the same bytes and finds the answer."""
    assert code(Unreachable, enroll, control, token, folder, wait_s=0.0, pause=never_waits) == "enrol.pending"
    keys = {p.name: p.read_bytes() for p in folder.iterdir()}
    first = (waiting(control)[0] / "request.json").read_bytes()
    operators(control)(0)
    enroll(control, token, folder, pause=never_waits)
    assert {name: (folder / name).read_bytes() for name in keys} == keys
    assert len(waiting(control)) == 1 and (waiting(control)[0] / "request.json").read_bytes() == first
    assert code(UsageError, enroll, control, token, folder, name="hospital-y") == "enrol.other_name"


def test_waiting_is_bounded(control: Running, token: enrol.Token, folder: Path) -> None:
    pauses: list[float] = []
    assert code(Unreachable, enroll, control, token, folder, wait_s=25.0, pause=pauses.append) == "enrol.pending"
    assert pauses == [10.0, 10.0, 5.0]


# --- the token --------------------------------------------------------------------------------------------------------

def document(world: World, token: enrol.Token, where: Path, name: str = NAME, organisation: str = ORGANISATION) -> bytes:
    return enrol.enrolment(token, create_request(where, name, organisation), world.parties.fingerprint)


def test_token_is_long_and_shown_nowhere(world: World, token: enrol.Token, tmp_path: Path) -> None:
    assert len(token.key) == 32 and repr(token) == str(token) == f"Token(id={token.id!r})"
    assert enrol.Token.parse(token.text()) == token
    record = world.ca / "tokens" / f"{token.id}.json"
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    for bad in (b"", b"consilo-token-1.00.00", token.text()[:-3], token.text().replace(b"-1.", b"-2."), b"\xff" * 100,
                token.text() + b".x"):
        with pytest.raises(UsageError) as caught:
            enrol.Token.parse(bad)
        assert caught.value.code == "enrol.token" and token.key.hex()[:8] not in str(caught.value)


def test_attack_token_used_twice(world: World, token: enrol.Token, tmp_path: Path) -> None:
    """A thief with the token comes after the site, or before it: one of them is refused, and everybody knows."""
    first, second = document(world, token, tmp_path / "a"), document(world, token, tmp_path / "b")
    ca_enrol.issue(world.ca, first)
    assert code(Refused, ca_enrol.issue, world.ca, second) == "enrol.token_used"
    assert code(Refused, ca_enrol.issue, world.ca, first) == "enrol.token_used"


def test_token_is_marked_before_anything_is_issued(world: World, token: enrol.Token, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The CA's machine dies while it issues: the same request goes on afterwards, another one does not get in."""
    first, second = document(world, token, tmp_path / "a"), document(world, token, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(ca, "issue", lambda *_, **__: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            ca_enrol.issue(world.ca, first)
    assert code(Refused, ca_enrol.issue, world.ca, second) == "enrol.token_used"
    assert ca_enrol.issue(world.ca, first).name == NAME


def test_mark_that_can_not_be_written_issues_nothing(world: World, token: enrol.Token, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    write = FileLayer.write_atomic

    def full(self: FileLayer, path: Path, data: bytes, **kwargs: Any) -> None:
        if path.parent.name == "tokens":
            raise OSError("disk full")
        write(self, path, data, **kwargs)

    index = (world.ca / "index.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(FileLayer, "write_atomic", full)
        with pytest.raises(OSError, match="disk full"):
            ca_enrol.issue(world.ca, document(world, token, tmp_path / "a"))
    assert (world.ca / "index.json").read_bytes() == index


def test_attack_stolen_token_of_another_site(world: World, token: enrol.Token, tmp_path: Path) -> None:
    for i, (name, organisation) in enumerate([("hospital-y", ORGANISATION), (NAME, "Hospital Y"), ("clinic-a", "Mallory")]):
        asked = document(world, token, tmp_path / str(i), name, organisation)
        assert code(Refused, ca_enrol.issue, world.ca, asked) == "enrol.name"
    ca_enrol.issue(world.ca, document(world, token, tmp_path / "good"))  # the token was not spent by that


def test_expired_token(world: World, token: enrol.Token, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = document(world, token, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(ca_enrol, "_now", lambda: datetime.now(UTC) + timedelta(days=7, seconds=5))
        assert code(Refused, ca_enrol.issue, world.ca, asked) == "enrol.token_expired"
    for days in (0, 91):
        assert code(UsageError, ca_enrol.make_token, world.ca, NAME, ORGANISATION, days=days) == "ca.days"


def test_attack_guessed_token(world: World, tmp_path: Path, token: enrol.Token) -> None:
    unknown = enrol.Token.new()
    assert code(Refused, ca_enrol.issue, world.ca, document(world, unknown, tmp_path / "a")) == "enrol.token_unknown"
    wrong_key = replace(token, key=unknown.key)
    assert code(Refused, ca_enrol.issue, world.ca, document(world, wrong_key, tmp_path / "b")) == "enrol.mac"


@pytest.mark.parametrize("field", ["request", "ca", "token", "mac"])
def test_attack_relay_changes_a_field(world: World, token: enrol.Token, tmp_path: Path, field: str) -> None:
    """The relay replaces the request by its own, or any other field: the HMAC fails, the token stays unused."""
    asked, mallory = (parse(document(world, token, tmp_path / who)) for who in ("site", "mallory"))
    other = ca_enrol.make_token(world.ca, NAME, ORGANISATION)[0]
    change = {"request": mallory["request"], "ca": "0" * 64, "token": other.id, "mac": "0" * 64}[field]
    assert code(Refused, ca_enrol.issue, world.ca, canonical({**asked, field: change})) == "enrol.mac"
    ca_enrol.issue(world.ca, canonical(asked))


def test_attack_request_for_another_consortium(world: World, token: enrol.Token, tmp_path: Path) -> None:
    asked = enrol.enrolment(token, create_request(tmp_path / "a", NAME, ORGANISATION), "0" * 64)
    assert code(Refused, ca_enrol.issue, world.ca, asked) == "enrol.other_ca"


def test_attack_swapped_request_through_the_relay(control: Running, token: enrol.Token, folder: Path,
                                                  tmp_path: Path) -> None:
    """End to end: nobody is certified, and the site learns that nothing came."""
    mallory = parse(document(control.world, enrol.Token.new(), tmp_path / "mallory"))

    def swap(document: bytes) -> bytes:
        return canonical({**parse(document), "request": mallory["request"]})

    index = (control.world.ca / "index.json").read_bytes()
    assert code(Refused, enroll, control, token, folder, pause=operators(control, swap)) == "enrol.mac"
    assert (control.world.ca / "index.json").read_bytes() == index
    assert not list(folder.glob("*.pem"))


# --- the server -------------------------------------------------------------------------------------------------------

def test_attack_proxy_in_the_middle(world: World, token: enrol.Token, folder: Path, tmp_path: Path) -> None:
    """It opens TLS with its own certificate, of its own CA or of a site, and even hands out the true CAs and lists: it
    gets neither request nor HMAC."""
    ca.init(tmp_path / "mallory", "Test consortium")
    hers = ca.issue(tmp_path / "mallory", create_request(tmp_path / "m", "hub", "Organisation of hub"), Role.COORDINATOR,
                    hosts=[HOST])
    shown = ((tmp_path / "m", hers.folder), (world.keys("clinic-a"), world.issued("clinic-a")))
    for i, (key, certificate) in enumerate(shown):
        with running(world, tmp_path / f"p{i}", key=key / "tls.key", certificate=certificate / "tls.pem") as proxy:
            assert code(Refused, enroll, proxy, token, folder, pause=never_waits) == "control.untrusted"
            assert waiting(proxy) == []
    own_trust = tmp_path / "own-trust"
    own_trust.mkdir()
    for pem in (tmp_path / "mallory").glob("*.pem"):
        (own_trust / pem.name).write_bytes(pem.read_bytes())
    with running(world, tmp_path / "q", key=tmp_path / "m" / "tls.key", certificate=hers.folder / "tls.pem",
                 trust=own_trust) as proxy:
        assert code(Refused, enroll, proxy, token, folder, pause=never_waits) == "identity.root"
        assert waiting(proxy) == []


def test_wrong_fingerprint(control: Running, token: enrol.Token, folder: Path) -> None:
    wrong = fingerprint(load_certificate((control.world.ca / "issuing-site.pem").read_bytes()))
    assert code(Refused, enroll, control, token, folder, ca=wrong, pause=never_waits) == "identity.root"
    assert waiting(control) == []


@pytest.mark.parametrize("role", [Role.COORDINATOR, Role.AUDITOR])
def test_attack_stale_or_missing_lists(control: Running, token: enrol.Token, folder: Path, role: Role,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Without current lists nobody could tell who was revoked, the coordinator first of all."""
    with monkeypatch.context() as patch:
        patch.setattr(ca, "_now", lambda: datetime.now(UTC).replace(microsecond=0) - timedelta(days=31))
        ca.refresh_crls(control.world.ca)
    stale = (control.world.ca / f"crl-{role}.pem").read_bytes()
    ca.refresh_crls(control.world.ca)
    (control.trust / f"crl-{role}.pem").write_bytes(stale)
    assert code(Refused, enroll, control, token, folder, pause=never_waits) == "identity.crl_stale"
    if role is Role.COORDINATOR:  # without one of those who call the coordinator would not serve
        (control.trust / f"crl-{role}.pem").unlink()
        assert code(Refused, enroll, control, token, folder, pause=never_waits) == "identity.crl_missing"
    assert waiting(control) == []


# --- the answer -------------------------------------------------------------------------------------------------------

def test_attack_certificates_of_another_site(control: Running, token: enrol.Token, folder: Path) -> None:
    other = enrol.answer(control.world.issued("clinic-a"))

    def relay(_: float) -> None:
        for each in waiting(control):
            (each / "answer.json").write_bytes(other)

    assert code(Refused, enroll, control, token, folder, pause=relay) == "enrol.other_keys"
    assert not list(folder.rglob("*.pem"))


def test_attack_certificates_of_a_thief_under_the_sites_name(control: Running, token: enrol.Token, folder: Path,
                                                             tmp_path: Path) -> None:
    """He had another token for that name, or the CA certified the site's keys under his: neither is installed."""
    world = control.world
    assert code(Unreachable, enroll, control, token, folder, wait_s=0.0) == "enrol.pending"
    keys = [load_key(folder / f"{which}.key") for which in ("tls", "sign")]
    his = ca.issue(world.ca, create_request(tmp_path / "thief", NAME, ORGANISATION), Role.SITE)
    answers = [enrol.answer(his.folder)]
    for name, organisation in (("hospital-y", ORGANISATION), (NAME, "Hospital Y")):
        forgetful = shutil.copytree(world.ca, tmp_path / f"{name} {organisation}")
        (forgetful / "index.json").write_bytes(canonical({"schema_version": "consilo.ca-index/1", "issued": []}))
        ours = ca.issue(forgetful, make_request(name, organisation, *keys), Role.SITE)
        answers.append(enrol.answer(ours.folder))
    for answer in answers:
        (waiting(control)[0] / "answer.json").write_bytes(answer)
        assert code(Refused, enroll, control, token, folder) == "enrol.other_keys"
    assert not list(folder.rglob("*.pem"))


@pytest.mark.parametrize("kind", ["another root", "own keys under another CA", "swapped role", "mixed", "no lists",
                                  "garbage", "too large"])
def test_attack_answers_that_are_not_installed(control: Running, token: enrol.Token, folder: Path, tmp_path: Path,
                                               kind: str) -> None:
    world = control.world
    assert code(Unreachable, enroll, control, token, folder, wait_s=0.0) == "enrol.pending"
    request = (folder / "request.json").read_bytes()
    operators(control)(0)
    good = parse((waiting(control)[0] / "answer.json").read_bytes())
    ca.init(tmp_path / "other", "Test consortium")
    rogue = ca.issue(tmp_path / "other", request, Role.SITE)
    hers = parse(enrol.answer(rogue.folder))
    engineer = ca.issue(tmp_path / "other", create_request(tmp_path / "e", "engineer", "E"), Role.ENGINEER)
    assert engineer.role is Role.ENGINEER
    bad, want = {
        "another root": (hers, "identity.root"),
        "own keys under another CA": ({**good, "tls": hers["tls"], "sign": hers["sign"]}, "identity.untrusted"),
        "swapped role": ({**good, "tls": (world.issued("engineer") / "tls.pem").read_text()}, "identity.role"),
        "mixed": ({**good, "sign": (world.issued("clinic-a") / "sign.pem").read_text()}, "enrol.other_keys"),
        "no lists": ({**good, "crls": []}, "identity.crl_missing"),
        "garbage": ({**good, "tls": "no certificate"}, "identity.malformed"),
        "too large": ({**good, "tls": "x" * 2**16}, "json.invalid")}[kind]
    (waiting(control)[0] / "answer.json").write_bytes(canonical(bad))
    assert code(ConsiloError, enroll, control, token, folder) == want
    assert not list(folder.rglob("*.pem"))
    (waiting(control)[0] / "answer.json").write_bytes(canonical(good))
    enroll(control, token, folder)


# --- the relay --------------------------------------------------------------------------------------------------------

def test_attack_relay_is_bounded(tmp_path: Path) -> None:
    now = [datetime.now(UTC)]
    relay = Relay(tmp_path / "r", clock=lambda: now[0])
    for i in range(MAX_WAITING):
        relay.submit(f"{i:032x}", b"x" * 10)
    assert code(Unreachable, relay.submit, "f" * 32, b"x") == "enrol.full"
    relay.submit(f"{0:032x}", b"x" * 10)
    assert code(Refused, relay.submit, f"{0:032x}", b"y") == "enrol.taken"
    assert (tmp_path / "r" / f"{0:032x}" / "request.json").read_bytes() == b"x" * 10
    for size in (0, MAX_ENROLMENT_BYTES + 1):
        assert code(UsageError, relay.submit, "e" * 32, bytes(size)) == "control.too_large"
    for number in ("", "..", "../x", "F" * 32, "0" * 31, "0" * 33, "0" * 31 + "\n"):
        assert code(UsageError, relay.submit, number, b"x") == "control.malformed"
        assert code(UsageError, relay.poll, number) == "enrol.unknown"
    assert relay.poll(f"{0:032x}") == b"" and code(UsageError, relay.poll, "f" * 32) == "enrol.unknown"
    now[0] += KEPT + timedelta(days=1)
    relay.submit("f" * 32, b"x")
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["f" * 32]


def test_attack_someone_takes_the_place_of_a_token(control: Running, token: enrol.Token, folder: Path) -> None:
    """Whoever knows the number may send before the site does: the site is told."""
    Relay(control.store.root / "enrolments").submit(token.id, b"mine")
    assert code(Refused, enroll, control, token, folder, pause=never_waits) == "enrol.taken"


# --- renewal ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def enrolled(control: Running, token: enrol.Token, folder: Path) -> Path:
    enroll(control, token, folder)
    for each in waiting(control):
        for file in each.iterdir():
            file.unlink()
        each.rmdir()
    return folder


def test_renewal_replaces_the_tls_key_and_keeps_the_signing_key(control: Running, enrolled: Path) -> None:
    before = {p.relative_to(enrolled).as_posix(): p.read_bytes() for p in enrolled.rglob("*") if p.is_file()}
    site.renew(control.enrol_url, enrolled, wait_s=60.0, pause=operators(control))
    after = {p.relative_to(enrolled).as_posix(): p.read_bytes() for p in enrolled.rglob("*") if p.is_file()}
    assert after.keys() == before.keys() and after["sign.key"] == before["sign.key"]
    assert all(after[name] != before[name] for name in ("tls.key", "tls.pem", "sign.pem"))
    assert stat.S_IMODE((enrolled / "tls.key").stat().st_mode) == 0o600
    certificate = load_certificate(after["tls.pem"])
    assert load_key(enrolled / "tls.key").public_key() == certificate.public_key()
    peer = TrustStore.load(enrolled / "trust").check(certificate, Role.SITE, usage="tls", at=datetime.now(UTC))
    assert (peer.name, peer.organisation) == (NAME, ORGANISATION)
    assert FileSigner(enrolled / "sign.key", enrolled / "sign.pem").fingerprint != fingerprint(
        load_certificate(before["sign.pem"]))


def test_an_interrupted_renewal_goes_on(control: Running, enrolled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it waits, then in the middle of its installation: repeated, it ends with what was issued."""
    assert code(Unreachable, site.renew, control.enrol_url, enrolled, wait_s=0.0) == "enrol.pending"
    key = (enrolled / "renewal" / "tls.key").read_bytes()
    operators(control)(0)
    write = FileLayer.write_atomic

    def dies(self: FileLayer, path: Path, data: bytes, **kwargs: Any) -> None:
        if path == enrolled / "tls.pem":
            raise OSError("killed")
        write(self, path, data, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FileLayer, "write_atomic", dies)
        with pytest.raises(OSError, match="killed"):
            site.renew(control.enrol_url, enrolled, wait_s=0.0)
    site.renew(control.enrol_url, enrolled, wait_s=0.0)
    assert (enrolled / "tls.key").read_bytes() == key and not (enrolled / "renewal").exists()
    assert load_key(enrolled / "tls.key").public_key() == load_certificate((enrolled / "tls.pem").read_bytes()).public_key()


def renewal(world: World, folder: Path, where: Path, name: str = NAME, organisation: str = ORGANISATION) -> bytes:
    signer = FileSigner(folder / "sign.key", folder / "sign.pem")
    return enrol.renewal(signer, create_request(where, name, organisation), world.parties.fingerprint)


def test_attack_renewal_for_another_name_or_by_another_site(control: Running, enrolled: Path, tmp_path: Path) -> None:
    world = control.world
    for i, who in enumerate([("hospital-y", ORGANISATION), (NAME, "Hospital Y"), ("clinic-a", "Organisation of clinic-a")]):
        assert code(Refused, ca_enrol.issue, world.ca, renewal(world, enrolled, tmp_path / str(i), *who)) == "enrol.name"
    thief = enrol.renewal(world.parties.signers["clinic-a"], create_request(tmp_path / "t", NAME, ORGANISATION),
                          world.parties.fingerprint)
    assert code(Refused, ca_enrol.issue, world.ca, thief) == "enrol.name"


def test_attack_renewal_replayed_revoked_or_expired(control: Running, enrolled: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    world = control.world
    first, second = (renewal(world, enrolled, tmp_path / x) for x in "ab")
    with monkeypatch.context() as patch:
        patch.setattr(ca, "_now", lambda: datetime.now(UTC).replace(microsecond=0) + timedelta(days=366))
        assert code(Refused, ca_enrol.issue, world.ca, first) == "ca.not_current"
    ca_enrol.issue(world.ca, first)
    for again in (first, second):  # signed under a certificate that has been replaced
        assert code(Refused, ca_enrol.issue, world.ca, again) == "ca.not_current"


def test_attack_renewal_after_revocation(control: Running, enrolled: Path, tmp_path: Path) -> None:
    asked = renewal(control.world, enrolled, tmp_path / "a")
    ca.revoke(control.world.ca, NAME)
    try:
        assert code(Refused, ca_enrol.issue, control.world.ca, asked) == "ca.not_current"
    finally:
        ca.issue(control.world.ca, create_request(tmp_path / "b", NAME, ORGANISATION), Role.SITE)  # for the fixture


def test_attack_renewal_signed_by_the_wrong_key_or_for_another_ca(control: Running, enrolled: Path, tmp_path: Path) -> None:
    world = control.world
    asked = parse(renewal(world, enrolled, tmp_path / "a"))
    other = parse(renewal(world, enrolled, tmp_path / "b"))
    assert code(ConsiloError, ca_enrol.issue, world.ca, canonical({**asked, "payload": other["payload"]})) == (
        "statement.signature")
    signer = FileSigner(enrolled / "sign.key", enrolled / "sign.pem")
    stray = enrol.renewal(signer, create_request(tmp_path / "c", NAME, ORGANISATION), "0" * 64)
    assert code(Refused, ca_enrol.issue, world.ca, stray) == "enrol.other_ca"


@pytest.mark.parametrize("junk", [b"", b"{}", b"[]", b"\xff", b'{"payloadType":1}', b"{" * 100, b" " * 2**17,
                                  b'{"schema_version":"consilo.enrolment/1"}'])
def test_malformed_documents(world: World, junk: bytes) -> None:
    with pytest.raises(ConsiloError) as caught:
        ca_enrol.issue(world.ca, junk)
    assert caught.value.exit_code in (1, 2)


# --- command line -----------------------------------------------------------------------------------------------------

def call(capsys: pytest.CaptureFixture[str], app: Any, *argv: Any) -> tuple[int, dict[str, Any], str]:
    status = cli_edge.run(app, [*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]), out + err


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_case_31_commands_show_the_token_nowhere(control: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                 caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
                                                 way: str) -> None:
    """fl-ca token, fl-client enroll (which ends with 4), fl-ca issue --enrolment, enroll again, renew: what they print and
    log, and all that lies at the coordinator, never holds the token's key or a line of the site's keys."""
    caplog.set_level(logging.DEBUG)
    world, path, folder, shown = control.world, tmp_path / "token.txt", tmp_path / "keys", ""
    status, said, text = call(capsys, ca_cli.app, "token", world.ca, "--name", NAME, "--organisation", ORGANISATION,
                              "--out", path)
    assert status == 0 and stat.S_IMODE(path.stat().st_mode) == 0o600
    shown += text
    key = enrol.Token.read(path).key.hex()
    arguments = ["enroll", "--token-file", path if way == "file" else "-", "--ca-fingerprint",
                 world.parties.fingerprint.upper(), "--url", control.enrol_url, "--name", NAME, "--organisation",
                 ORGANISATION, "--folder", folder, "--wait", 0]

    def enroll_again() -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
        return call(capsys, client_cli.app, *arguments)

    status, said, text = enroll_again()
    assert (status, said["error"]["code"]) == (4, "enrol.pending")
    shown += text
    at_coordinator = waiting(control)[0]
    status, said, text = call(capsys, ca_cli.app, "issue", world.ca, "--enrolment", at_coordinator / "request.json")
    assert (status, said["name"], said["role"]) == (0, NAME, "site")
    shown += text
    (at_coordinator / "answer.json").write_bytes((Path(said["folder"]) / "answer.json").read_bytes())
    status, said, text = enroll_again()
    assert (status, said) == (0, {"folder": str(folder), "name": NAME})
    shown += text
    status, said, text = call(capsys, client_cli.app, "renew", "--url", control.enrol_url, "--folder", folder, "--wait", 0)
    assert (status, said["error"]["code"]) == (4, "enrol.pending")
    shown += text + caplog.text
    left = b"".join(p.read_bytes() for p in control.root.rglob("*") if p.is_file())
    secrets = [key.encode(), bytes.fromhex(key), *secrets_of(folder)]
    assert len(secrets) == 11  # two keys, and the renewal's
    assert not any(secret in left or secret in shown.encode() for secret in secrets)
    ca.revoke(world.ca, NAME)


def test_token_file_open_to_others(control: Running, tmp_path: Path, token: enrol.Token,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "token.txt"
    path.write_bytes(token.text())
    path.chmod(0o644)
    status, said, text = call(capsys, client_cli.app, "enroll", "--token-file", path, "--ca-fingerprint", "0" * 64, "--url",
                              control.enrol_url, "--name", NAME, "--organisation", ORGANISATION, "--folder", tmp_path / "k")
    assert (status, said["error"]["code"]) == (3, "key.permissions")
    assert token.key.hex() not in text and not (tmp_path / "k").exists()


def test_token_is_no_argument() -> None:
    """The command has no option that takes the token itself."""
    import typer

    command = typer.main.get_command(client_cli.app).commands["enroll"]  # type: ignore[attr-defined]
    assert {o for p in command.params for o in p.opts} == {
        "--token-file", "--ca-fingerprint", "--url", "--name", "--organisation", "--folder", "--wait", "--proxy", "--json"}


def test_fl_ca_issue_takes_one_road(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = tmp_path / "request.json"
    request.write_bytes(b"{}")
    for wrong in ([], ["--request", request], ["--role", "site"], ["--enrolment", request, "--role", "site"],
                  ["--enrolment", request, "--request", request, "--role", "site"]):
        status, said, _ = call(capsys, ca_cli.app, "issue", world.ca, *wrong)
        assert (status, said["error"]["code"]) == (2, "cli.usage")
    assert code(UsageError, ca_enrol.issue, tmp_path, b"{}") == "ca.missing"


def test_two_operators_at_once(world: World, token: enrol.Token, tmp_path: Path) -> None:
    asked = document(world, token, tmp_path / "a")
    with ca_enrol._locked(world.ca):
        assert code(Refused, ca_enrol.issue, world.ca, asked) == "file.leased"


@pytest.mark.parametrize("program, command", [("fl-client", "enroll"), ("fl-client", "renew"), ("fl-server", "control"),
                                              ("fl-ca", "token"), ("fl-ca", "issue")])
def test_help_imports_no_grpc(program: str, command: str) -> None:
    module = {"fl-client": "fl_client.cli", "fl-server": "fl_server.cli", "fl-ca": "privacy.ca_cli"}[program]
    script = (f"import sys, resource; from {module} import app; from privacy.cli_edge import run; run(app, [{command!r}, "
              "'--help']); used = resource.getrusage(resource.RUSAGE_SELF);"
              "sys.exit(any(m in sys.modules for m in ('grpc', 'google.protobuf', 'torch', 'flwr')))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "--" in done.stdout, done.stderr
