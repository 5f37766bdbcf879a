"""The form of every certificate of the consortium: what `privacy.identity` accepts and nothing more.

valid: (not before, not after), with zone.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from privacy.errors import UsageError
from privacy.identity import PublicKey, Role, public_key

Validity = tuple[datetime, datetime]
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")


def alternative_names(role: Role, hosts: Sequence[str]) -> list[x509.GeneralName]:
    """The SAN of a coordinator; none for other roles. Raises UsageError `ca.hosts`."""
    if bool(hosts) != (role is Role.COORDINATOR):
        raise UsageError("ca.hosts", "Host names belong to a coordinator, and a coordinator needs one.",
                         "Give --host for the role coordinator only.")
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError as e:
            if not _DNS.fullmatch(host):
                raise UsageError("ca.hosts", "A host is neither a lower-case DNS name nor an IP address.",
                                 "Give a host such as fl.example.org or 192.0.2.7.") from e
            names.append(x509.DNSName(host))
    return names


def ca_name(organisation: str, role: Role | None = None) -> x509.Name:
    """Subject of the root, or of the issuing CA of a role, which is its OU."""
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation)]
    if role is not None:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role))
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, f"consilo {role or 'root'} CA")])


def leaf_builder(who: x509.Name, key: PublicKey, ca: x509.Certificate, valid: Validity) -> x509.CertificateBuilder:
    """A certificate that outlives its CA in no case."""
    return (_builder(who, key, ca.subject, public_key(ca), (valid[0], min(valid[1], ca.not_valid_after_utc)))
            .add_extension(x509.BasicConstraints(False, None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True))


def ca_builder(name: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name,
               issuer_key: ec.EllipticCurvePrivateKey, valid: Validity, path_length: int) -> x509.CertificateBuilder:
    return (_builder(name, key, issuer, issuer_key.public_key(), valid)
            .add_extension(x509.BasicConstraints(True, path_length), critical=True)
            .add_extension(_key_usage(ca=True), critical=True))


def _builder(name: x509.Name, key: PublicKey, issuer: x509.Name, issuer_key: PublicKey,
             valid: Validity) -> x509.CertificateBuilder:
    return (x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key)
            .serial_number(x509.random_serial_number()).not_valid_before(valid[0]).not_valid_after(valid[1])
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False))


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature=True, content_commitment=False, key_encipherment=False,
                         data_encipherment=False, key_agreement=False, key_cert_sign=ca, crl_sign=ca,
                         encipher_only=False, decipher_only=False)
