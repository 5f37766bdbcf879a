"""The checks of M1 and M2 that both sides make: every key belongs to the certificate, name and organisation it claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from cryptography.x509 import Certificate

from privacy.errors import Aborted
from privacy.identity import Peer, Role, TrustStore, load_certificate, verify_signature
from privacy.secagg import hybrid
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1

CheckCertificate = Callable[[bytes], Peer]


def certificate_check(trust: TrustStore) -> CheckCertificate:
    """PEM of a site's Ed25519 certificate -> the peer, if chain, role, validity and revocation are right now.

    Raises Refused `identity.crl_missing` at once where there is no revocation list of sites.
    """
    trust.require_revocation_list(Role.SITE)

    def check(pem: bytes) -> Peer:
        return trust.check(load_certificate(pem), Role.SITE, usage="signing", at=datetime.now(UTC))

    return check


def check_key(offer: tr.Offer, key: M1, check_certificate: CheckCertificate) -> Peer:
    """The peer behind one M1. Raises Aborted `secagg.peer`, `secagg.ciphertext`, or Refused from its certificate."""
    peer = check_certificate(key.certificate)
    member = offer.cohort[key.index] if key.index < len(offer.cohort) else None
    if member is None or (peer.fingerprint, peer.name) != (member.certificate, member.name):
        raise _refused("A key comes with a certificate that the cohort does not name.")
    verify_signature(peer.certificate, key.signature, tr.signed_m1(offer.ctx, key.index, key.public))
    hybrid.seal(key.public, b"", b"")  # a key that can't be used is its sender's fault, found before others meet it
    return peer


def check_distinct(peers: Sequence[Peer]) -> None:
    """One organisation is one member, whatever certificates it holds. Raises Aborted `secagg.peer`."""
    keys = {p.certificate.public_key().public_bytes_raw() for p in peers}  # type: ignore[union-attr]
    if not len(peers) == len(keys) == len({p.organisation for p in peers}) == len({p.name for p in peers}):
        raise _refused("Two members of the cohort share a key, a name or an organisation.")


def check_keys(offer: tr.Offer, keys: Sequence[M1], check_certificate: CheckCertificate) -> list[Certificate]:
    """Certificates in cohort order. The list must be the whole cohort, in order, with distinct keys."""
    if [k.index for k in keys] != list(range(len(offer.cohort))) or len({k.public for k in keys}) != len(keys):
        raise Aborted("secagg.key_list", "The key list is not that of the whole cohort.",
                      "The round is void; a site may have dropped out.")
    peers = [check_key(offer, k, check_certificate) for k in keys]
    check_distinct(peers)
    return [p.certificate for p in peers]


def _refused(cause: str) -> Aborted:
    return Aborted("secagg.peer", cause, "The round is void; check the contract's list of sites.")
