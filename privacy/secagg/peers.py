"""The check of M2 that both sides make: every key of the list belongs to the certificate that the offer names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from cryptography.x509 import Certificate

from privacy.errors import Aborted
from privacy.identity import Role, TrustStore, fingerprint, load_certificate, verify_signature
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1

CheckCertificate = Callable[[bytes], Certificate]


def certificate_check(trust: TrustStore) -> CheckCertificate:
    """PEM of a site's Ed25519 certificate -> the certificate, if chain, role, validity and revocation are right now."""

    def check(pem: bytes) -> Certificate:
        certificate = load_certificate(pem)
        trust.check(certificate, Role.SITE, usage="signing", at=datetime.now(UTC))
        return certificate

    return check


def check_key(offer: tr.Offer, key: M1, check_certificate: CheckCertificate) -> Certificate:
    """Certificate of one M1. Raises Aborted `secagg.peer`, or Refused from the certificate or signature check."""
    certificate = check_certificate(key.certificate)
    if key.index >= len(offer.cohort) or fingerprint(certificate) != offer.cohort[key.index].certificate:
        raise Aborted("secagg.peer", "A key comes with a certificate that the cohort does not name.",
                      "The round is void; check the contract's list of sites.")
    verify_signature(certificate, key.signature, tr.signed_m1(offer.ctx, key.index, key.public))
    return certificate


def check_keys(offer: tr.Offer, keys: Sequence[M1], check_certificate: CheckCertificate) -> list[Certificate]:
    """Certificates in cohort order. The list must be the whole cohort, in order, with distinct keys."""
    if [k.index for k in keys] != list(range(len(offer.cohort))) or len({k.public for k in keys}) != len(keys):
        raise Aborted("secagg.key_list", "The key list is not that of the whole cohort.",
                      "The round is void; a site may have dropped out.")
    return [check_key(offer, k, check_certificate) for k in keys]
