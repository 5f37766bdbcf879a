"""Identity: keys, names, requests and certificates. Whom to trust is privacy/trust.py.

Guarantees: a private key is made on site, with mode 0600, and never leaves its folder; a weak Ed25519 key never verifies
anything.

An identity is two certificates with one subject (CN = name, O = organisation): P-256 for TLS and the node key, Ed25519
for signatures. Its role is that of the CA that issued both, which carries the role as its OU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privacy.canonical import canonical
from privacy.errors import Refused, UsageError
from privacy.files import FileLayer, read_file, read_private, write_private

REQUEST_SCHEMA = "consilo.request/1"
Usage = Literal["tls", "signing"]
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_P = 2**255 - 19
# y of the eight points of small order: identity, order 2, order 4, and the two y of order 8.
_Y8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
_SMALL_ORDER = {0, 1, _P - 1, _Y8, _P - _Y8}
CERTIFICATE_DAYS = 90  # of what is issued to people and machines; `fl-client renew` replaces it


class Role(StrEnum):
    SITE = "site"
    COORDINATOR = "coordinator"
    ENGINEER = "engineer"
    AUDITOR = "auditor"

    @property
    def purpose(self) -> x509.ObjectIdentifier:
        """The one extended key usage of this role's TLS certificate."""
        return ExtendedKeyUsageOID.SERVER_AUTH if self is Role.COORDINATOR else ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True)
class Peer:
    """An accepted certificate and what it says."""

    name: str
    organisation: str
    role: Role
    fingerprint: str
    certificate: x509.Certificate = field(repr=False)


class Signer(Protocol):
    @property
    def certificate(self) -> x509.Certificate: ...

    @property
    def fingerprint(self) -> str: ...

    def sign(self, data: bytes) -> bytes: ...


class FileSigner:
    """Signs with the Ed25519 key in a file.

    Raises Refused `key.permissions` (open to others), `identity.key_mismatch` (key and certificate don't belong
    together), `identity.weak_key`; UsageError `key.missing`, `identity.malformed`.
    """

    def __init__(self, key: Path, certificate: Path) -> None:
        private = load_key(key)
        cert = load_certificate(read_file(certificate), certificate.name)
        if not isinstance(private, ed25519.Ed25519PrivateKey) or private.public_key() != public_key(cert):
            raise Refused("identity.key_mismatch", f"{key.name} is not the Ed25519 key of {certificate.name}.",
                          "Put the key and the certificate that was issued for it side by side.")
        self._key = private
        self.certificate = cert
        self.fingerprint = fingerprint(cert)

    def sign(self, data: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._key.sign(data)


def fingerprint(cert: x509.Certificate) -> str:
    """Lowercase hex SHA-256 of the DER."""
    return cert.fingerprint(hashes.SHA256()).hex()


def load_certificate(pem: bytes, what: str = "certificate") -> x509.Certificate:
    """Parse one PEM certificate. Raises UsageError `identity.malformed`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as e:
        raise malformed(what, "a PEM certificate") from e


def load_key(path: Path) -> PrivateKey:
    """Read a P-256 or Ed25519 private key. Raises Refused `key.permissions`; UsageError `key.missing`,
    `identity.malformed`."""
    pem = read_private(path)
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise malformed(path.name, "an unencrypted PEM private key") from None
    if isinstance(key, ed25519.Ed25519PrivateKey) or (
            isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)):
        return key
    raise malformed(path.name, "a P-256 or Ed25519 key")


def key_pem(key: PrivateKey) -> bytes:
    """PKCS 8, unencrypted: for `write_private` only."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                             serialization.NoEncryption())


def public_key(source: x509.Certificate | x509.CertificateSigningRequest) -> PublicKey:
    """The P-256 or Ed25519 key. Raises Refused `identity.weak_key` for any other kind, and for an Ed25519 key that is
    non-canonical (y >= p) or of small order, under which one signature fits many messages (RFC 8032, 8.4)."""
    try:
        key = source.public_key()
    except (ValueError, UnsupportedAlgorithm) as e:
        raise _weak("is of an unknown kind") from e
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise _weak("is neither P-256 nor Ed25519")
    y = int.from_bytes(key.public_bytes_raw(), "little") % 2**255
    if y >= _P or y in _SMALL_ORDER:
        raise _weak("is of small order or not canonical")
    return key


def verify_signature(cert: x509.Certificate, signature: bytes, data: bytes) -> None:
    """Ed25519, or ECDSA with SHA-256 under a P-256 certificate.

    Raises Refused `identity.signature`, `identity.weak_key`.
    """
    key = public_key(cert)
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as e:
        raise Refused("identity.signature", "A signature does not fit its certificate.",
                      "Get the document again from its signer.") from e


def subject(name: str, organisation: str) -> x509.Name:
    """CN and O of an identity. Raises UsageError `identity.name`."""
    if not _NAME.fullmatch(name):
        raise UsageError("identity.name", "The name is not 1 to 63 of a-z 0-9 _ . - starting with a letter or digit.",
                         "Choose a name such as hospital-a.")
    if not organisation.strip() or len(organisation) > 64 or not organisation.isprintable():
        raise UsageError("identity.name", "The organisation is not 1 to 64 printable characters.",
                         "Give the organisation's usual name.")
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
                      x509.NameAttribute(NameOID.COMMON_NAME, name)])


def read_subject(source: x509.Name) -> tuple[str, str]:
    """(name, organisation) of a subject that has exactly those two. Raises Refused `identity.untrusted`."""
    names = [str(a.value) for a in source.get_attributes_for_oid(NameOID.COMMON_NAME)]
    organisations = [str(a.value) for a in source.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    if len(names) == len(organisations) == 1 and len(list(source)) == 2 and _NAME.fullmatch(names[0]):
        return names[0], organisations[0]
    raise untrusted("its subject is not one name and one organisation")


def create_request(folder: Path, name: str, organisation: str) -> bytes:
    """Make tls.key (P-256) and sign.key (Ed25519), both O_EXCL and 0600, and write request.json: two signing requests
    under one subject, as canonical JSON, which is returned. The keys stay in the folder.

    Raises Refused `key.exists`; UsageError `identity.name`.
    """
    subject(name, organisation)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tls, sign = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
    write_private(folder / "tls.key", key_pem(tls))
    write_private(folder / "sign.key", key_pem(sign))
    data = make_request(name, organisation, tls, sign)
    FileLayer().write_atomic(folder / "request.json", data)
    return data


def make_request(name: str, organisation: str, tls: ec.EllipticCurvePrivateKey,
                 sign: ed25519.Ed25519PrivateKey) -> bytes:
    """Two signing requests under one subject, each signed by its key, as canonical JSON. Raises UsageError
    `identity.name`."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject(name, organisation))
    requests = {"tls": builder.sign(tls, hashes.SHA256()), "sign": builder.sign(sign, None)}
    pems = {k: r.public_bytes(serialization.Encoding.PEM).decode() for k, r in requests.items()}
    return canonical({"schema_version": REQUEST_SCHEMA, **pems})


def untrusted(why: str) -> Refused:
    return Refused("identity.untrusted", f"A certificate is not trusted: {why}.",
                   "Use certificates that this consortium's CA issued.")


def malformed(what: str, wanted: str) -> UsageError:
    return UsageError("identity.malformed", f"{what} does not hold {wanted}.", "Check that it is the right file.")


def _weak(why: str) -> Refused:
    return Refused("identity.weak_key", f"The public key {why}.", "Make new keys with `fl-client enroll`.")
