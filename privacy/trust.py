"""Whom a site or a coordinator trusts: the chain leaf -> issuing CA of the wanted role -> root, and revocation lists.

Every link is checked: signature, basicConstraints, keyUsage, EKU, validity, revocation (RFC 5280).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from privacy.errors import Refused
from privacy.files import read_file
from privacy.identity import (
    Peer,
    Role,
    Usage,
    fingerprint,
    load_certificate,
    malformed,
    public_key,
    read_subject,
    untrusted,
)

E = TypeVar("E", bound=x509.ExtensionType)
_KNOWN_CRITICAL = {x509.BasicConstraints.oid, x509.KeyUsage.oid, x509.ExtendedKeyUsage.oid,
                   x509.SubjectAlternativeName.oid}


class TrustStore:
    """The root, at most one issuing CA per role, and their revocation lists.

    All arguments are PEM. Signatures of CAs and lists are verified here, their dates at every `check`. Raises Refused
    `identity.untrusted`, `identity.weak_key`; UsageError `identity.malformed`.
    """

    def __init__(self, root: bytes, issuing: Iterable[bytes], crls: Iterable[bytes] = ()) -> None:
        self.root = load_certificate(root, "root.pem")
        if not _issued_by(self.root, self.root) or not _is_ca(self.root):
            raise untrusted("the root is not a self-signed P-256 CA")
        self.issuing: dict[Role, x509.Certificate] = {}
        self._crls: dict[Role, x509.CertificateRevocationList] = {}
        for pem in issuing:
            cert = load_certificate(pem, "issuing CA")
            if not _issued_by(cert, self.root) or not _is_ca(cert, path_length=0):
                raise untrusted("an issuing CA is not the root's")
            role = _ca_role(cert)
            if role in self.issuing:
                raise untrusted(f"there are two issuing CAs for the role {role}")
            self.issuing[role] = cert
        for pem in crls:
            crl = load_crl(pem)
            signers = [r for r, ca in self.issuing.items() if _signed_crl(crl, ca)]
            if not signers or signers[0] in self._crls:
                raise untrusted("a revocation list is not signed by one of the issuing CAs, or there are two of it")
            self._crls[signers[0]] = crl

    @classmethod
    def load(cls, folder: Path) -> TrustStore:
        """From root.pem, issuing-<role>.pem and, where there, crl-<role>.pem. Also raises UsageError `file.missing`."""
        roles = [r for r in Role if (folder / f"issuing-{r}.pem").exists()]
        lists = [folder / f"crl-{r}.pem" for r in roles]
        return cls(read_file(folder / "root.pem"), [read_file(folder / f"issuing-{r}.pem") for r in roles],
                   [read_file(path) for path in lists if path.exists()])

    @property
    def fingerprint(self) -> str:
        """Of the root: what `--ca` takes."""
        return fingerprint(self.root)

    def require_revocation_list(self, role: Role) -> None:
        """Raises Refused `identity.crl_missing` where the CA's revocation list for a role isn't here."""
        if role not in self._crls:
            raise Refused("identity.crl_missing", f"There is no revocation list crl-{role}.pem.",
                          "Copy the CA's current list beside its certificates.")

    def check(self, cert: x509.Certificate, role: Role, *, usage: Usage, at: datetime) -> Peer:
        """Accept a certificate for one role and usage at a time (with zone).

        Raises Refused `identity.untrusted` (no chain to the root), `identity.role` (issued for another role),
        `identity.expired` (a link is not valid at that time), `identity.revoked`, `identity.crl_stale`,
        `identity.usage` (not made for TLS, or for signing), `identity.weak_key`.
        """
        found = next((r for r, ca in self.issuing.items() if _issued_by(cert, ca)), None)
        if found is None:
            raise untrusted("no issuing CA of this consortium signed it")
        if found is not role:
            raise Refused("identity.role", f"A certificate of the role {found} was shown where {role} is needed.",
                          f"Use the certificate that was issued for the role {role}.")
        for link in (cert, self.issuing[role], self.root):
            if not link.not_valid_before_utc <= at <= link.not_valid_after_utc:
                raise Refused("identity.expired", "A certificate of the chain is not valid at this time.",
                              "Check the clock, then renew the certificate.")
        self._check_revocation(cert, role, at)
        _check_leaf(cert, role, usage)
        name, organisation = read_subject(cert.subject)
        return Peer(name, organisation, role, fingerprint(cert), cert)

    def _check_revocation(self, cert: x509.Certificate, role: Role, at: datetime) -> None:
        crl = self._crls.get(role)
        if crl is None:
            return
        if crl.get_revoked_certificate_by_serial_number(cert.serial_number) is not None:
            raise Refused("identity.revoked", "The certificate has been revoked.", "Ask the CA for a new certificate.")
        if crl.next_update_utc is None or at > crl.next_update_utc:
            raise Refused("identity.crl_stale", f"The revocation list crl-{role}.pem is out of date.",
                          "Get the current list from the CA; `fl-ca roster` renews it.")


def load_crl(pem: bytes) -> x509.CertificateRevocationList:
    """Parse one PEM revocation list. Raises UsageError `identity.malformed`."""
    try:
        return x509.load_pem_x509_crl(pem)
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as e:
        raise malformed("The file", "a PEM revocation list") from e


def _check_leaf(cert: x509.Certificate, role: Role, usage: Usage) -> None:
    """basicConstraints, keyUsage, EKU and kind of key. Raises Refused `identity.usage`, `identity.weak_key`."""
    basic, key_usage = _extension(cert, x509.BasicConstraints), _extension(cert, x509.KeyUsage)
    purposes = _extension(cert, x509.ExtendedKeyUsage)
    key = public_key(cert)
    if usage == "tls":
        fits = isinstance(key, ec.EllipticCurvePublicKey) and purposes is not None and list(purposes) == [role.purpose]
    else:
        fits = isinstance(key, ed25519.Ed25519PublicKey) and purposes is None
    if (not fits or basic is None or basic.ca or key_usage is None or not key_usage.digital_signature
            or key_usage.key_cert_sign or not _understood(cert)):
        raise Refused("identity.usage", f"The certificate is not made for {usage} in the role {role}.",
                      "Use tls.pem for connections and sign.pem for signatures.")


def _extension(cert: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return cert.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return None


def _understood(cert: x509.Certificate) -> bool:
    """No critical extension that isn't checked here (RFC 5280, 4.2)."""
    try:
        return all(not e.critical or e.oid in _KNOWN_CRITICAL for e in cert.extensions)
    except (x509.DuplicateExtension, ValueError):
        return False


def _issued_by(cert: x509.Certificate, ca: x509.Certificate) -> bool:
    """Issuer name and signature."""
    try:
        cert.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True


def _signed_crl(crl: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    key_usage = _extension(ca, x509.KeyUsage)
    key = public_key(ca)
    try:
        return bool(crl.issuer == ca.subject and key_usage and key_usage.crl_sign and crl.is_signature_valid(key))
    except (ValueError, TypeError, UnsupportedAlgorithm):  # parsed only now
        return False


def _is_ca(cert: x509.Certificate, path_length: int | None = None) -> bool:
    basic, key_usage = _extension(cert, x509.BasicConstraints), _extension(cert, x509.KeyUsage)
    return bool(basic and basic.ca and key_usage and key_usage.key_cert_sign and _understood(cert)
                and (path_length is None or basic.path_length == path_length)
                and isinstance(public_key(cert), ec.EllipticCurvePublicKey))


def _ca_role(cert: x509.Certificate) -> Role:
    """The OU of an issuing CA. Raises Refused `identity.untrusted`."""
    units = [str(a.value) for a in cert.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
    if len(units) != 1 or units[0] not in list(Role):
        raise untrusted("an issuing CA names no role")
    return Role(units[0])
