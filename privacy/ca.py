"""The consortium's certificate authority: a folder, kept offline, never on the coordinator.

Guarantees: a certificate is issued only for a key whose holder signed the request; one name belongs to one
organisation and role, one key to one name; what was issued or revoked is recorded durably before it is handed out.

    keys/               root.key, issuing-<role>.key (0600)
    root.pem, issuing-<role>.pem, crl-<role>.pem        a trust folder: `TrustStore.load` reads it
    ca.sha256           fingerprint of the root, to be told to everyone by another way
    index.json          what was issued and revoked
    issued/<name>/      tls.pem, sign.pem and trust/, to be copied to the applicant
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from privacy.ca_certificates import alternative_names, ca_builder, ca_name, leaf_builder
from privacy.ca_requests import read_request
from privacy.canonical import canonical, parse
from privacy.contract import Name, Sha256, Terms, validate
from privacy.errors import CheckFailed, Refused, UsageError
from privacy.files import FileLayer, read_file, write_private
from privacy.identity import (
    CERTIFICATE_DAYS,
    PublicKey,
    Role,
    fingerprint,
    key_pem,
    load_certificate,
    load_key,
    public_key,
    read_subject,
    subject,
)
from privacy.statements import parse_payload, seal, unseal
from privacy.trust import TrustStore

ROSTER_TYPE = "application/vnd.consilo.roster+json"
CRL_DAYS = 30
BACKDATE = timedelta(minutes=5)  # tolerated clock difference


@dataclass(frozen=True)
class IssuedFiles:
    """What to copy to the applicant: `folder` with tls.pem, sign.pem and trust/."""

    name: str
    organisation: str
    role: Role
    folder: Path
    tls_fingerprint: str
    sign_fingerprint: str


@dataclass(frozen=True)
class RosterEntry:
    name: str
    organisation: str
    role: Role
    tls_fingerprint: str
    sign_fingerprint: str
    tls: x509.Certificate
    sign: x509.Certificate


class _Record(Terms):
    """One identity; certificates in PEM."""

    name: Name
    organisation: str
    role: Role
    tls: str
    sign: str
    tls_fingerprint: Sha256
    sign_fingerprint: Sha256


class _Issued(_Record):
    revoked: datetime | None = None


class _Index(Terms):
    schema_version: Literal["consilo.ca-index/1"] = "consilo.ca-index/1"
    issued: tuple[_Issued, ...] = ()


class _Roster(Terms):
    schema_version: Literal["consilo.roster/1"] = "consilo.roster/1"
    entries: tuple[_Record, ...]


def init(folder: Path, organisation: str, *, days: int = 1825) -> str:
    """Make the root, one issuing CA per role and empty revocation lists. Returns the root's fingerprint.

    days: validity of all CAs. Raises Refused `ca.exists`, `key.exists`; UsageError `identity.name`, `ca.days`.
    """
    subject("ca", organisation)
    if (folder / "root.pem").exists():
        raise Refused("ca.exists", "The folder holds a CA already.", "Choose an empty folder.")
    valid = _validity(days)
    (folder / "keys").mkdir(mode=0o700, parents=True, exist_ok=True)
    layer, root_name, root_key = FileLayer(), ca_name(organisation), ec.generate_private_key(ec.SECP256R1())
    root = ca_builder(root_name, root_key.public_key(), root_name, root_key, valid, 1).sign(root_key, hashes.SHA256())
    write_private(folder / "keys" / "root.key", key_pem(root_key))
    for role in Role:
        key = ec.generate_private_key(ec.SECP256R1())
        cert = ca_builder(ca_name(organisation, role), key.public_key(), root_name, root_key, valid, 0)
        write_private(folder / "keys" / f"issuing-{role}.key", key_pem(key))
        layer.write_atomic(folder / f"issuing-{role}.pem", _pem(cert.sign(root_key, hashes.SHA256())))
    _save(folder, _Index())
    _write_crls(folder, _Index())
    layer.write_atomic(folder / "ca.sha256", f"{fingerprint(root)}\n".encode())
    layer.write_atomic(folder / "root.pem", _pem(root))
    return fingerprint(root)


def issue(folder: Path, request_json: bytes, role: Role, *, days: int = CERTIFICATE_DAYS,
          hosts: Sequence[str] = ()) -> IssuedFiles:
    """Certify both keys of a request (`identity.create_request`) for a role; again for the same name is a renewal.

    hosts: DNS names and IP addresses of a coordinator, its certificate's SAN. Raises Refused `ca.request` (no proof of
    possession, two subjects, wrong kinds of key), `ca.name_taken`, `ca.key_reused`, `identity.weak_key`,
    `identity.untrusted` (a subject that is not one name and one organisation); UsageError `ca.hosts`, `ca.days`,
    `ca.missing`, `identity.name`, `json.invalid`, `config.invalid`.
    """
    tls, sign = read_request(request_json)
    name, organisation = read_subject(tls.subject)
    alternatives, valid = alternative_names(role, hosts), _validity(days)
    who = subject(name, organisation)
    with _locked(folder):
        index = _load(folder)
        _check_owner(index, name, organisation, role, (tls, sign))
        key, ca = _issuer(folder, role)
        builder = leaf_builder(who, public_key(tls), ca, valid)
        builder = builder.add_extension(x509.ExtendedKeyUsage([role.purpose]), critical=False)
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        tls_cert = builder.sign(key, hashes.SHA256())
        sign_cert = leaf_builder(who, public_key(sign), ca, valid).sign(key, hashes.SHA256())
        record = _Issued(name=name, organisation=organisation, role=role, tls=_pem(tls_cert).decode(),
                         sign=_pem(sign_cert).decode(), tls_fingerprint=fingerprint(tls_cert),
                         sign_fingerprint=fingerprint(sign_cert))
        _save(folder, _Index(issued=(*index.issued, record)))
        out = folder / "issued" / name
        (out / "trust").mkdir(parents=True, exist_ok=True)
        layer = FileLayer()
        for source in sorted(folder.glob("*.pem")):
            layer.write_atomic(out / "trust" / source.name, read_file(source))
        layer.write_atomic(out / "tls.pem", _pem(tls_cert))
        layer.write_atomic(out / "sign.pem", _pem(sign_cert))
    return IssuedFiles(name, organisation, role, out, record.tls_fingerprint, record.sign_fingerprint)


def current_signers(folder: Path) -> dict[str, x509.Certificate]:
    """The signing certificates that a roster would hold, by fingerprint. Raises UsageError `ca.missing`."""
    return {r.sign_fingerprint: load_certificate(r.sign.encode()) for r in _current(_load(folder)).values()}


def revoke(folder: Path, name: str) -> int:
    """Revoke every certificate of a name and renew the revocation lists. Returns how many were revoked now.

    Raises UsageError `ca.no_such_name` unless the name holds a certificate that is not revoked yet; `ca.missing`.
    """
    with _locked(folder):
        index = _load(folder)
        mine = [r for r in index.issued if r.name == name and r.revoked is None]
        if not mine:
            raise UsageError("ca.no_such_name", "No certificate to revoke was issued under this name.",
                             "Look the name up in index.json.")
        now = _now()
        index = _Index(issued=tuple(r.model_copy(update={"revoked": now}) if r in mine else r for r in index.issued))
        _save(folder, index)
        _write_crls(folder, index)
    return 2 * len(mine)


def refresh_crls(folder: Path) -> None:
    """Sign each role's revocation list anew, for 30 days. Raises Refused `file.leased`; UsageError `ca.missing`."""
    with _locked(folder):
        _write_crls(folder, _load(folder))


def _write_crls(folder: Path, index: _Index) -> None:
    now = _now()
    for role in Role:
        key, ca = _issuer(folder, role)
        crl = (x509.CertificateRevocationListBuilder().issuer_name(ca.subject).last_update(now - BACKDATE)
               .next_update(now + timedelta(days=CRL_DAYS))
               .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
               .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False))
        for record in index.issued:
            if record.role is role and record.revoked is not None:
                for pem in (record.tls, record.sign):
                    serial = load_certificate(pem.encode()).serial_number
                    crl = crl.add_revoked_certificate(x509.RevokedCertificateBuilder().serial_number(serial)
                                                      .revocation_date(record.revoked).build())
        signed = crl.sign(key, hashes.SHA256())
        FileLayer().write_atomic(folder / f"crl-{role}.pem", signed.public_bytes(serialization.Encoding.PEM))


def roster(folder: Path) -> bytes:
    """The current certificates of every name, as a DSSE envelope signed by the sites' issuing CA.

    Revoked and expired ones are left out; of renewed ones the latest counts. Raises UsageError `ca.missing`.
    """
    latest = _current(_load(folder))
    entries = [latest[name].model_dump(mode="json", exclude={"revoked"}) for name in sorted(latest)]
    body = _Roster(entries=tuple(_Record.model_validate(e) for e in entries))
    return seal(_CaSigner(*_issuer(folder, Role.SITE)), ROSTER_TYPE, canonical(body.model_dump(mode="json")))


def _current(index: _Index) -> dict[str, _Issued]:
    """By name, the latest that is neither revoked nor expired."""
    return {r.name: r for r in index.issued
            if r.revoked is None and load_certificate(r.tls.encode()).not_valid_after_utc > _now()}


def verify_roster(data: bytes, trust: TrustStore, *, at: datetime | None = None) -> list[RosterEntry]:
    """The entries that are valid at a time (default: now); those that expired or were revoked since are left out.

    Raises CheckFailed `statement.*` (not signed by the sites' issuing CA), `roster.invalid` (an entry contradicts its
    certificates, or two share a name or a key); Refused `identity.*` (an entry's certificate fails its check).
    """
    ca = trust.issuing.get(Role.SITE)
    payload, _ = unseal(data, ROSTER_TYPE, {} if ca is None else {fingerprint(ca): ca})
    entries: list[RosterEntry] = []
    for record in validate(_Roster, parse_payload(payload)).entries:
        try:
            entries.append(_accept(record, trust, at or _now()))
        except Refused as e:
            if e.code not in ("identity.expired", "identity.revoked"):
                raise
    keys = {_key_id(public_key(c)) for e in entries for c in (e.tls, e.sign)}
    if len({e.name for e in entries}) != len(entries) or len(keys) != 2 * len(entries):
        raise _bad_roster("two entries share a name or a key")
    return entries


class _CaSigner:
    """Signs a roster with an issuing CA's P-256 key; the DSSE type keeps such signatures apart from certificates."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key, self.certificate, self.fingerprint = key, certificate, fingerprint(certificate)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))


def _accept(record: _Record, trust: TrustStore, at: datetime) -> RosterEntry:
    tls, sign = (load_certificate(pem.encode()) for pem in (record.tls, record.sign))
    peers = trust.check(tls, record.role, usage="tls", at=at), trust.check(sign, record.role, usage="signing", at=at)
    if (any((p.name, p.organisation) != (record.name, record.organisation) for p in peers)
            or [p.fingerprint for p in peers] != [record.tls_fingerprint, record.sign_fingerprint]):
        raise _bad_roster("an entry contradicts its certificates")
    return RosterEntry(record.name, record.organisation, record.role, record.tls_fingerprint, record.sign_fingerprint,
                       tls, sign)


def _check_owner(index: _Index, name: str, organisation: str, role: Role,
                 requests: tuple[x509.CertificateSigningRequest, ...]) -> None:
    """One name, one organisation and role; one key, one name; no revoked key again."""
    keys = {_key_id(public_key(r)) for r in requests}
    for record in index.issued:
        if record.name == name and (record.organisation, record.role) != (organisation, role):
            raise Refused("ca.name_taken", "The name belongs to another organisation or role.", "Choose another name.")
        known = {_key_id(public_key(load_certificate(pem.encode()))) for pem in (record.tls, record.sign)}
        if keys & known and (record.name != name or record.revoked is not None):
            raise Refused("ca.key_reused", "A key of the request was certified under another name, or revoked.",
                          "Make new keys with `fl-client enroll`.")


def _issuer(folder: Path, role: Role) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = load_key(folder / "keys" / f"issuing-{role}.key")
    cert = load_certificate(read_file(folder / f"issuing-{role}.pem"))
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != cert.public_key():
        raise Refused("identity.key_mismatch", f"The key of the issuing CA for {role} does not fit its certificate.",
                      "Restore the CA's folder from its backup.")
    return key, cert


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One `fl-ca` at a time. Raises Refused `file.leased`; UsageError `ca.missing`."""
    _load(folder)
    layer = FileLayer()
    fd = layer.open_append(folder / ".lock")
    try:
        yield
    finally:
        layer.close(fd)


def _load(folder: Path) -> _Index:
    path = folder / "index.json"
    if not path.exists():
        raise UsageError("ca.missing", "The folder holds no CA.", "Make one with `fl-ca init`.")
    return validate(_Index, parse(read_file(path)))


def _save(folder: Path, index: _Index) -> None:
    FileLayer().write_atomic(folder / "index.json", canonical(index.model_dump(mode="json")))


def _validity(days: int) -> tuple[datetime, datetime]:
    if not 1 <= days <= 7300:
        raise UsageError("ca.days", "The validity is not 1 to 7300 days.", "Give --days in that range.")
    return _now() - BACKDATE, _now() + timedelta(days=days)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _key_id(key: PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _bad_roster(why: str) -> CheckFailed:
    return CheckFailed("roster.invalid", f"The roster is refused: {why}.", "Get the roster again from the CA.")
