"""The checks of M1 and M2 that both sides make: every key belongs to the certificate, name and organisation it claims."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from datetime import UTC, datetime

from cryptography.x509 import Certificate

from privacy.errors import Aborted
from privacy.identity import Peer, Role, load_certificate, verify_signature
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1
from privacy.trust import TrustStore
from privacy.trust_files import WatchedTrust

CheckCertificate = Callable[[bytes], Peer]


def certificate_check(trust: TrustStore | WatchedTrust, role: Role = Role.SITE) -> CheckCertificate:
    """PEM of an Ed25519 certificate of that role -> the peer, if chain, role, validity and revocation are right now.

    Raises Refused `identity.crl_missing` at once where there is no revocation list of the role.
    """
    def current() -> TrustStore:
        return trust if isinstance(trust, TrustStore) else trust.current()

    current().require_revocation_list(role)

    def check(pem: bytes) -> Peer:
        return current().check(load_certificate(pem), role, usage="signing", at=datetime.now(UTC))

    return check


def check_key(offer: tr.Offer, key: M1, check_certificate: CheckCertificate) -> Peer:
    """The peer behind one M1, whose index the cohort has. Raises Aborted `secagg.peer`, or Refused from its certificate
    or signature."""
    peer = check_certificate(key.certificate)
    member = offer.cohort[key.index]
    if (peer.fingerprint, peer.name) != (member.certificate, member.name):
        raise _refused("A key comes with a certificate that the cohort does not name.")
    verify_signature(peer.certificate, key.signature, tr.signed_m1(offer.ctx, key.index, key.public))
    return peer


def check_distinct(peers: Sequence[Peer]) -> None:
    """One organisation is one member, whatever certificates it holds. Raises Aborted `secagg.peer`."""
    keys = {p.certificate.public_key().public_bytes_raw() for p in peers}  # type: ignore[union-attr]
    if not len(peers) == len(keys) == len({p.organisation for p in peers}) == len({p.name for p in peers}):
        raise _refused("Two members of the cohort share a key, a name or an organisation.")


def check_keys(offer: tr.Offer, keys: Sequence[M1], check_certificate: CheckCertificate) -> dict[int, Certificate]:
    """Certificates of U1 by cohort index: distinct members of the cohort in order, enough of them, distinct keys."""
    check_members([k.index for k in keys], range(len(offer.cohort)), offer.survivors, "key_list")
    if len({k.public for k in keys}) != len(keys):
        raise _refused("Two members of the cohort sent one key.")
    peers = [check_key(offer, k, check_certificate) for k in keys]
    check_distinct(peers)
    return {k.index: p.certificate for k, p in zip(keys, peers, strict=True)}


def check_members(members: Sequence[int], among: Container[int], least: int, what: str) -> None:
    """A list of a stage: sorted, without repetition, part of the stage before, long enough. Raises Aborted."""
    if list(members) != sorted(set(members)) or not all(u in among for u in members):
        raise Aborted(f"secagg.{what}", "A list of sites repeats one, is out of order, or names one that isn't there.",
                      "The round is void; the coordinator's software differs.")
    if len(members) < least:
        raise Aborted("secagg.too_few", f"{len(members)} sites are left, {least} are needed.",
                      "The round is void; a new attempt needs a fresh update and a fresh charge.")


def _refused(cause: str) -> Aborted:
    return Aborted("secagg.peer", cause, "The round is void; check the contract's list of sites.")
