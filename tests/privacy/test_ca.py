"""The CA issues only what is proved, records before it hands out, and its roster can't be forged; fl-ca's contract."""

import json
import os
import ssl
import stat
import subprocess
import sys
from base64 import b64decode, b64encode
from datetime import UTC, datetime, timedelta

import pytest
import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from privacy import ca, ca_cli, cli_edge, identity, statements
from privacy.canonical import canonical, parse
from privacy.errors import CheckFailed, Refused, RoundVoid, UsageError
from privacy.identity import Role, create_request, fingerprint, load_certificate, load_key
from privacy.trust import TrustStore

NOW = datetime.now(UTC) + timedelta(hours=1)  # of collection: what the CA makes later must be valid by then


@pytest.fixture
def folder(tmp_path):
    ca.init(tmp_path / "ca", "Consortium")
    return tmp_path / "ca"


def enrol(folder, name="hospital-a", organisation="Hospital A", role=Role.SITE, **kwargs):
    return ca.issue(folder, create_request(folder.parent / name, name, organisation), role, **kwargs)


def code(error, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return caught.value.code


def request(tls_key=None, sign_key=None, tls_name=("hospital-a", "A"), sign_name=("hospital-a", "A")):
    builder = x509.CertificateSigningRequestBuilder
    tls = builder().subject_name(identity.subject(*tls_name)).sign(
        tls_key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    sign_key = sign_key or ed25519.Ed25519PrivateKey.generate()
    sign = builder().subject_name(identity.subject(*sign_name)).sign(
        sign_key, None if isinstance(sign_key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    return document(*(r.public_bytes(serialization.Encoding.PEM) for r in (tls, sign)))


def document(tls: bytes, sign: bytes) -> bytes:
    return canonical({"schema_version": "consilo.request/1", "tls": tls.decode(), "sign": sign.decode()})


# --- init ---------------------------------------------------------------------------------------------------------

def test_init_makes_a_trust_folder_and_private_keys(folder):
    keys = sorted((folder / "keys").iterdir())
    assert [k.name for k in keys] == sorted(["root.key", *(f"issuing-{r}.key" for r in Role)])
    assert all(stat.S_IMODE(k.stat().st_mode) == 0o600 for k in keys)
    trust = TrustStore.load(folder)
    assert list(trust.issuing) == list(Role)
    root = load_certificate((folder / "root.pem").read_bytes())
    der = root.public_bytes(serialization.Encoding.DER)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    assert (folder / "ca.sha256").read_text() == digest.finalize().hex() + "\n" == trust.fingerprint + "\n"


def test_init_never_overwrites(folder):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert code(Refused, ca.init, folder, "Consortium") == "ca.exists"
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_interrupted_init_does_not_reuse_its_keys(tmp_path):
    ca.init(tmp_path, "C")
    (tmp_path / "root.pem").unlink()
    assert code(Refused, ca.init, tmp_path, "C") == "key.exists"


# --- issue --------------------------------------------------------------------------------------------------------

def test_issued_folder_is_all_that_an_operator_copies(folder):
    issued = enrol(folder)
    assert sorted(p.name for p in issued.folder.iterdir()) == ["sign.pem", "tls.pem", "trust"]
    trust = TrustStore.load(issued.folder / "trust")
    for usage, file, want in (("tls", "tls.pem", issued.tls_fingerprint), ("signing", "sign.pem",
                                                                            issued.sign_fingerprint)):
        cert = load_certificate((issued.folder / file).read_bytes())
        assert trust.check(cert, Role.SITE, usage=usage, at=NOW).fingerprint == want
    assert not any("key" in p.name for p in issued.folder.rglob("*"))


def test_attack_swapped_key_in_a_request(folder):
    """Mallory puts the hospital's public key, or her own, into a request that another key signed."""
    honest, mallory = parse(request()), parse(request())
    for part in ("tls", "sign"):
        der = x509.load_pem_x509_csr(honest[part].encode()).public_bytes(serialization.Encoding.DER)
        old, new = (x509.load_pem_x509_csr(r[part].encode()).public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo) for r in (honest, mallory))
        assert old in der
        swapped = x509.load_der_x509_csr(der.replace(old, new)).public_bytes(serialization.Encoding.PEM).decode()
        assert code(Refused, ca.issue, folder, canonical({**honest, part: swapped}), Role.SITE) == "ca.request"
    assert parse((folder / "index.json").read_bytes())["issued"] == []


def test_planted_without_proof_of_possession_the_swap_gets_in(folder, monkeypatch):
    honest = parse(request())
    der = x509.load_pem_x509_csr(honest["sign"].encode()).public_bytes(serialization.Encoding.DER)
    old = x509.load_pem_x509_csr(honest["sign"].encode()).public_key().public_bytes_raw()
    swapped = x509.load_der_x509_csr(der.replace(old, ed25519.Ed25519PrivateKey.generate().public_key()
                                                 .public_bytes_raw()))
    assert not swapped.is_signature_valid
    forged = canonical({**honest, "sign": swapped.public_bytes(serialization.Encoding.PEM).decode()})
    assert code(Refused, ca.issue, folder, forged, Role.SITE) == "ca.request"
    read = ca.read_request
    monkeypatch.setattr(ca, "read_request", lambda data: (read(canonical(honest))[0], swapped))
    ca.issue(folder, forged, Role.SITE)


def test_requests_that_do_not_fit_together(folder):
    p256 = ec.generate_private_key(ec.SECP256R1())
    cases = [request(sign_name=("hospital-b", "A")), request(sign_name=("hospital-a", "B")),
             request(tls_key=p256, sign_key=p256), request(sign_key=p256), document(b"x", b"y")]
    for data in cases:
        assert code(Refused, ca.issue, folder, data, Role.SITE) == "ca.request"
    weak = request(tls_key=ec.generate_private_key(ec.SECP384R1()))
    assert code(Refused, ca.issue, folder, weak, Role.SITE) == "identity.weak_key"


def test_malformed_requests(folder):
    good = parse(request())
    for data, want in ((b"{", "json.invalid"), (b'{"a":1,"a":2}', "json.invalid"), (b" " * 70_000, "json.invalid"),
                       (canonical({**good, "more": 1}), "config.unknown_key"),
                       (canonical({**good, "schema_version": "consilo.request/2"}), "config.invalid")):
        assert code(UsageError, ca.issue, folder, data, Role.SITE) == want


def test_one_name_one_organisation_and_role(folder):
    enrol(folder)
    assert code(Refused, ca.issue, folder, request(), Role.SITE) == "ca.name_taken"
    same = request(tls_name=("hospital-a", "Hospital A"), sign_name=("hospital-a", "Hospital A"))
    assert code(Refused, ca.issue, folder, same, Role.ENGINEER) == "ca.name_taken"
    ca.issue(folder, same, Role.SITE)


def test_one_key_one_name_and_no_revoked_key_again(folder):
    tls, sign = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
    mine = request(tls, sign)
    ca.issue(folder, mine, Role.SITE)
    other = {"tls_name": ("b", "B"), "sign_name": ("b", "B")}
    for data in (request(tls, **other), request(sign_key=sign, **other)):
        assert code(Refused, ca.issue, folder, data, Role.SITE) == "ca.key_reused"
    ca.issue(folder, mine, Role.SITE)
    ca.revoke(folder, "hospital-a")
    assert code(Refused, ca.issue, folder, mine, Role.SITE) == "ca.key_reused"
    ca.issue(folder, request(), Role.SITE)


@pytest.mark.parametrize(("role", "hosts"), [(Role.COORDINATOR, []), (Role.SITE, ["localhost"]),
                                             (Role.COORDINATOR, ["a b"]), (Role.COORDINATOR, ["*.example.org"]),
                                             (Role.COORDINATOR, ["-a"]), (Role.COORDINATOR, [""])])
def test_hosts(folder, role, hosts):
    assert code(UsageError, ca.issue, folder, request(), role, hosts=hosts) == "ca.hosts"


def test_two_fl_ca_at_once(folder):
    with ca._locked(folder):
        for call in (lambda: ca.issue(folder, request(), Role.SITE), lambda: ca.refresh_crls(folder)):
            assert code(Refused, call) == "file.leased"
    ca.issue(folder, request(), Role.SITE)


def test_crash_while_writing_leaves_the_record_and_a_second_try_works(folder, monkeypatch):
    data, write = request(), ca.FileLayer.write_atomic

    def dies(self, path, content, **kwargs):
        if path.name == "tls.pem":
            raise OSError("killed")
        write(self, path, content, **kwargs)

    monkeypatch.setattr(ca.FileLayer, "write_atomic", dies)
    with pytest.raises(OSError, match="killed"):
        ca.issue(folder, data, Role.SITE)
    monkeypatch.undo()
    assert ca.revoke(folder, "hospital-a") == 2  # what was signed can be revoked although nobody got it
    ca.issue(folder, request(), Role.SITE)


def test_revoke_needs_something_to_revoke(folder):
    enrol(folder)
    assert code(UsageError, ca.revoke, folder, "nobody") == "ca.no_such_name"
    assert ca.revoke(folder, "hospital-a") == 2
    assert code(UsageError, ca.revoke, folder, "hospital-a") == "ca.no_such_name"
    assert code(UsageError, ca.revoke, folder.parent, "hospital-a") == "ca.missing"


def test_revocation_lists_are_not_extended_by_an_old_one(folder):
    enrol(folder)
    ca.revoke(folder, "hospital-a")
    ca.refresh_crls(folder)
    crl = x509.load_pem_x509_crl((folder / "crl-site.pem").read_bytes())
    assert len(list(crl)) == 2
    assert crl.next_update_utc - NOW > timedelta(days=29)


# --- TLS as the transport uses it ---------------------------------------------------------------------------------

def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """TLS in memory; raises ssl.SSLError of whichever side refuses."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    for _ in range(6):
        for side in sides:
            try:
                side.do_handshake()
                side.read(1)
            except ssl.SSLWantReadError:
                pass


def context(protocol, own, key, trust, ca_role):
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= (ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF)
    context.load_cert_chain(own / "tls.pem", key / "tls.key")
    context.load_verify_locations(trust / f"issuing-{ca_role}.pem")
    context.load_verify_locations(trust / f"crl-{ca_role}.pem")
    return context


@pytest.fixture
def parties(folder):
    coordinator = enrol(folder, "coordinator", "Host", Role.COORDINATOR, hosts=["fl.example.org", "127.0.0.1"])
    site, engineer = enrol(folder), enrol(folder, "engineer", "Lab", Role.ENGINEER)

    def client(who):
        return context(ssl.PROTOCOL_TLS_CLIENT, who.folder, folder.parent / who.name, folder, "coordinator")

    def server():
        return context(ssl.PROTOCOL_TLS_SERVER, coordinator.folder, folder.parent / "coordinator", folder, "site")

    return client, server, site, engineer


def test_certificates_work_for_mutual_tls(parties):
    client, server, site, _ = parties
    for host in ("fl.example.org", "127.0.0.1"):
        handshake(server(), client(site), host)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(server(), client(site), "elsewhere.example.org")


def test_attack_wrong_role_at_the_handshake(parties):
    client, server, _, engineer = parties
    with pytest.raises(ssl.SSLError, match="unable to get local issuer"):
        handshake(server(), client(engineer), "fl.example.org")


def test_attack_revoked_certificate_at_the_handshake(parties, folder):
    client, server, site, _ = parties
    ca.revoke(folder, site.name)
    with pytest.raises(ssl.SSLError, match="revoked"):
        handshake(server(), client(site), "fl.example.org")


# --- roster -------------------------------------------------------------------------------------------------------

def test_roster_lists_the_current_certificates(folder):
    old, _ = enrol(folder), enrol(folder, "auditor", "Audit", Role.AUDITOR)
    same = ("hospital-a", "Hospital A")
    new = ca.issue(folder, request(tls_name=same, sign_name=same), Role.SITE)
    entries = ca.verify_roster(ca.roster(folder), TrustStore.load(folder))
    assert [(e.name, e.role) for e in entries] == [("auditor", Role.AUDITOR), ("hospital-a", Role.SITE)]
    assert entries[1].sign_fingerprint == new.sign_fingerprint != old.sign_fingerprint
    assert fingerprint(entries[1].tls) == entries[1].tls_fingerprint == new.tls_fingerprint


def test_revoked_sites_leave_the_roster_even_an_old_one(folder):
    enrol(folder), enrol(folder, "hospital-b", "Hospital B")
    before, data = TrustStore.load(folder), ca.roster(folder)
    ca.revoke(folder, "hospital-a")
    assert [e.name for e in ca.verify_roster(data, before)] == ["hospital-a", "hospital-b"]
    assert [e.name for e in ca.verify_roster(data, TrustStore.load(folder))] == ["hospital-b"]
    assert [e.name for e in ca.verify_roster(ca.roster(folder), before)] == ["hospital-b"]


def test_expired_sites_leave_the_roster(folder, monkeypatch):
    enrol(folder, days=1), enrol(folder, "hospital-b", "Hospital B")
    data, trust, later = ca.roster(folder), TrustStore.load(folder), NOW + timedelta(days=2)
    assert [e.name for e in ca.verify_roster(data, trust, at=later)] == ["hospital-b"]
    monkeypatch.setattr(ca, "_now", lambda: later)
    assert b"hospital-a" not in b64decode(parse(ca.roster(folder))["payload"])


class Forger:
    """Signs rosters with whatever key it got hold of."""

    def __init__(self, key, certificate, shown=None):
        self.key, self.certificate, self.fingerprint = key, certificate, fingerprint(shown or certificate)

    def sign(self, data):
        if isinstance(self.key, ed25519.Ed25519PrivateKey):
            return self.key.sign(data)
        return self.key.sign(data, ec.ECDSA(hashes.SHA256()))


def test_attack_forged_roster(folder):
    site = enrol(folder)
    trust, data = TrustStore.load(folder), ca.roster(folder)
    envelope = parse(data)
    payload = b64decode(envelope["payload"])
    site_ca = load_certificate((folder / "issuing-site.pem").read_bytes())
    site_cert = load_certificate((site.folder / "sign.pem").read_bytes())
    engineer_ca = load_certificate((folder / "issuing-engineer.pem").read_bytes())
    engineer_key = load_key(folder / "keys" / "issuing-engineer.key")
    site_key = load_key(folder.parent / "hospital-a" / "sign.key")
    edited = canonical({**envelope, "payload": b64encode(payload.replace(b"Hospital A", b"Hospital B")).decode()})
    unknown = [statements.seal(Forger(site_key, site_cert), ca.ROSTER_TYPE, payload),
               statements.seal(Forger(engineer_key, engineer_ca), ca.ROSTER_TYPE, payload)]
    signed = [edited, *(statements.seal(Forger(k, c, site_ca), ca.ROSTER_TYPE, payload)
                        for k, c in ((site_key, site_cert), (engineer_key, engineer_ca)))]
    assert [code(CheckFailed, ca.verify_roster, d, trust) for d in unknown] == ["statement.key"] * 2
    assert [code(CheckFailed, ca.verify_roster, d, trust) for d in signed] == ["statement.signature"] * 3
    no_sites = TrustStore((folder / "root.pem").read_bytes(), [])
    assert code(CheckFailed, ca.verify_roster, data, no_sites) == "statement.key"


def test_roster_entries_must_fit_their_certificates(folder, monkeypatch):
    """Even the sites' CA can't list a certificate under another name, role or organisation, or twice."""
    tls, sign, renewal = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate(), request()
    ca.issue(folder, request(tls, sign), Role.SITE), enrol(folder, "hospital-b", "Hospital B")
    monkeypatch.setattr(ca, "_check_owner", lambda *_: None)
    ca.issue(folder, request(tls, sign, ("same-keys", "C"), ("same-keys", "C")), Role.SITE)
    trust = TrustStore.load(folder)
    body = parse(b64decode(parse(ca.roster(folder))["payload"]))
    signer = ca._CaSigner(*ca._issuer(folder, Role.SITE))

    def verify(*entries):
        return ca.verify_roster(statements.seal(signer, ca.ROSTER_TYPE, canonical({**body, "entries": entries})), trust)

    a, b, same_keys = body["entries"]
    ca.issue(folder, renewal, Role.SITE)
    renewed = parse(b64decode(parse(ca.roster(folder))["payload"]))["entries"][0]
    assert len(verify(a, b)) == len(verify(renewed, b)) == 2
    for twice in ((a, a), (a, renewed), (a, same_keys)):
        assert code(CheckFailed, verify, *twice) == "roster.invalid"
    for bad in ({**a, "name": "hospital-c"}, {**a, "organisation": "X"}, {**a, "sign_fingerprint": "0" * 64},
                {**a, "sign": b["sign"], "sign_fingerprint": b["sign_fingerprint"]}):
        assert code(CheckFailed, verify, bad) == "roster.invalid"
    assert code(Refused, verify, {**a, "role": "engineer"}) == "identity.role"
    assert code(Refused, verify, {**a, "tls": a["sign"], "tls_fingerprint": a["sign_fingerprint"]}) == "identity.usage"


# --- command line -------------------------------------------------------------------------------------------------

def fl_ca(capsys, *argv):
    status = cli_edge.run(ca_cli.app, [str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_fl_ca_from_init_to_roster(tmp_path, capsys):
    folder, out = tmp_path / "ca", tmp_path / "roster.json"

    def ok(*argv):
        status, text, err = fl_ca(capsys, *argv, "--json")
        assert (status, err) == (0, "")
        return json.loads(text.splitlines()[-1])

    root = ok("init", folder, "--organisation", "Consortium")["ca"]
    assert (folder / "ca.sha256").read_text().strip() == root
    create_request(tmp_path / "c", "coordinator", "Host")
    create_request(tmp_path / "a", "hospital-a", "Hospital A")
    ok("issue", folder, "--request", tmp_path / "c/request.json", "--role", "coordinator", "--host", "localhost",
       "--host", "127.0.0.1")
    issued = ok("issue", folder, "--request", tmp_path / "a/request.json", "--role", "site")
    assert ok("revoke", folder, "--name", "coordinator") == {"name": "coordinator", "revoked": 2}
    entries = ok("roster", folder, "--out", out)["entries"]
    assert [e["name"] for e in entries] == ["hospital-a"] and entries[0]["sign"] == issued["sign"]
    assert len(ca.verify_roster(out.read_bytes(), TrustStore.load(folder))) == 1


def test_exit_codes_and_error_objects(folder, capsys):
    for argv, status, want in ((("init", folder, "--organisation", "C"), 3, "ca.exists"),
                               (("revoke", folder, "--name", "x"), 2, "ca.no_such_name"),
                               (("revoke", folder), 2, "cli.usage"), (("nonsense",), 2, "cli.usage"),
                               (("init", "/dev/null/ca", "--organisation", "C"), 2, "file.io"),
                               (("issue", folder, "--request", folder / "no", "--role", "site"), 2, "file.missing"),
                               (("issue", folder, "--request", "x", "--role", "king"), 2, "cli.usage")):
        got, out, err = fl_ca(capsys, *argv)
        assert (got, out) == (status, "") and err.startswith(f"{want}: ") and err.count("\n") == 1
        got, out, err = fl_ca(capsys, *argv, "--json")
        assert (got, err) == (status, "")
        error = json.loads(out.splitlines()[-1])["error"]
        assert error["code"] == want and error.keys() == {"code", "cause", "mend"}


def edge_app():
    app = typer.Typer()

    @app.command()
    def fail(how: str, as_json: bool = typer.Option(False, "--json")) -> None:
        if how == "void":
            raise RoundVoid("round.void", "Too few sites\nanswered.", "Try again.")
        if how == "verdict":
            cli_edge.emit({"verdict": "FAIL"}, as_json, "FAIL")
            raise typer.Exit(1)
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "disk":
            raise OSError(28, "CANARY-8c21")
        raise ValueError("CANARY-8c21 patient record")

    return app


def test_bug_shows_its_type_only(capsys, monkeypatch):
    monkeypatch.delenv("CONSILO_DEBUG", raising=False)
    for argv in (["bug"], ["bug", "--json"]):
        assert cli_edge.run(edge_app(), argv) == 70
        out, err = capsys.readouterr()
        assert "internal.bug" in out + err and "ValueError" in out + err
        assert "CANARY" not in out + err and "Traceback" not in out + err
    assert cli_edge.run(edge_app(), ["disk"]) == 70
    assert capsys.readouterr().err.startswith("internal.bug: An unexpected OSError")
    monkeypatch.setenv("CONSILO_DEBUG", "1")
    assert cli_edge.run(edge_app(), ["bug"]) == 70
    assert "CANARY" in capsys.readouterr().err


def test_verdicts_and_voids_have_their_exit_codes(capsys):
    assert cli_edge.run(edge_app(), ["verdict", "--json"]) == 1
    assert capsys.readouterr().out == '{"verdict": "FAIL"}\n'
    assert cli_edge.run(edge_app(), ["void"]) == 5
    assert capsys.readouterr().err == "round.void: Too few sites answered. Mend: Try again.\n"
    assert cli_edge.run(edge_app(), ["interrupt"]) == 130


def test_emit_refuses_numbers_that_json_lacks():
    with pytest.raises(ValueError, match="JSON"):
        cli_edge.emit({"epsilon": float("inf")}, True, "")


def test_help_imports_neither_torch_nor_flower(tmp_path):
    script = ("import sys; from privacy.ca_cli import main\nsys.argv = ['fl-ca', '--help']\nassert main() == 0\n"
              "bad = {'torch', 'flwr', 'hydra', 'numpy'} & sys.modules.keys()\nassert not bad, bad")
    root = os.path.dirname(os.path.dirname(ca.__file__))  # noqa: PTH120
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=root)


def test_canary_private_keys_are_in_no_output_and_in_no_issued_file(tmp_path, capsys):
    folder = tmp_path / "ca"
    fl_ca(capsys, "init", folder, "--organisation", "C")
    create_request(tmp_path / "a", "hospital-a", "Hospital A")
    output = ""
    for argv in (("issue", folder, "--request", tmp_path / "a/request.json", "--role", "site"),
                 ("issue", folder, "--request", tmp_path / "a/sign.key", "--role", "site"),
                 ("roster", folder, "--out", tmp_path / "roster.json"), ("roster", folder, "--json"),
                 ("revoke", folder, "--name", "hospital-a")):
        output += "".join(fl_ca(capsys, *argv)[1:])
    keys = [*(tmp_path / "a").glob("*.key"), *(folder / "keys").iterdir()]
    secrets = [key.read_text().splitlines()[1] for key in keys]
    assert len(secrets) == 7
    public = [p for p in tmp_path.rglob("*") if p.is_file() and p not in keys]
    for secret in secrets:
        assert secret not in output
        assert not [p for p in public if secret.encode() in p.read_bytes()]
