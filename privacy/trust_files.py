"""A trust folder out of what an untrusted party relayed, and one that changes while it is used.

Guarantees: root, issuing CAs and revocation lists are taken only if the root has the expected fingerprint, everything
is signed up to it, there is a list for every issuing CA, and no list has run out.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from privacy.errors import Refused, UsageError
from privacy.identity import Role, fingerprint, load_certificate
from privacy.trust import TrustStore, load_crl

MAX_LISTS = 16


class WatchedTrust:
    """A trust folder, read anew whenever a file of it has changed, so that a revocation counts from then on.

    required: roles whose revocation list must be there. Raises as `TrustStore.load`, and Refused `identity.crl_missing`.
    """

    def __init__(self, folder: Path, required: Collection[Role]) -> None:
        self.folder, self._required, self._lock = folder, tuple(required), threading.Lock()
        self._seen, self._trust = self._load()

    def current(self) -> TrustStore:
        """Raises as the constructor, as long as the folder holds something that can't be trusted."""
        with self._lock:
            if self._stat() != self._seen:
                self._seen, self._trust = self._load()
            return self._trust

    def _load(self) -> tuple[dict[str, tuple[int, int, int]], TrustStore]:
        seen, trust = self._stat(), TrustStore.load(self.folder)
        for role in self._required:
            trust.require_revocation_list(role)
        return seen, trust

    def _stat(self) -> dict[str, tuple[int, int, int]]:
        found = {path.name: path.stat() for path in self.folder.glob("*.pem")}
        return {name: (s.st_ino, s.st_mtime_ns, s.st_size) for name, s in found.items()}


def parse_fingerprint(text: str) -> str:
    """Lowercase hex of a root's fingerprint as people write it. Raises UsageError `verify.fingerprint`."""
    plain = text.strip().replace(":", "").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", plain):
        raise UsageError("verify.fingerprint", "The fingerprint is not 64 hex digits.",
                         "Take it from ca.sha256, which the consortium's CA gave you.")
    return plain


def trust_files(root: bytes, issuing: Iterable[bytes], crls: Iterable[bytes], *, ca: str,
                at: datetime) -> tuple[TrustStore, dict[str, bytes]]:
    """(trust, PEM by file name as `TrustStore.load` reads them). ca: SHA-256 of the root's DER, lowercase hex.

    Raises Refused `identity.root`, `identity.untrusted`, `identity.crl_missing`, `identity.crl_stale`; UsageError
    `identity.malformed`.
    """
    issuing, crls = list(issuing)[:MAX_LISTS], list(crls)[:MAX_LISTS]
    if fingerprint(load_certificate(root, "root.pem")) != ca:
        raise Refused("identity.root", "The root certificate is not the one with the given fingerprint.",
                      "Compare the fingerprint with ca.sha256; if it is right, the server isn't this consortium's.")
    trust = TrustStore(root, issuing, crls)
    files = {"root.pem": _pem(trust.root)}
    lists = named_lists(trust, crls, at)
    for role, certificate in trust.issuing.items():
        trust.require_revocation_list(role)
        files[f"issuing-{role}.pem"] = _pem(certificate)
    return trust, files | lists


def named_lists(trust: TrustStore, crls: Iterable[bytes], at: datetime) -> dict[str, bytes]:
    """Lists that `trust` has verified, by file name. Raises Refused `identity.crl_stale`."""
    roles = {ca.subject: role for role, ca in trust.issuing.items()}
    files = {}
    for crl in map(load_crl, crls):
        if crl.next_update_utc is None or crl.next_update_utc < at:
            raise Refused("identity.crl_stale", "A revocation list is out of date.",
                          "Have the CA's operator renew it with `fl-ca roster`, and the coordinator's put it in place.")
        files[f"crl-{roles[crl.issuer]}.pem"] = crl.public_bytes(Encoding.PEM)
    return files


def is_older(new: Mapping[str, bytes], old: Mapping[str, bytes]) -> bool:
    """Whether a list of `new` was signed before the one of the same name in `old`, or is missing in `new`."""
    return any(name not in new or load_crl(new[name]).last_update_utc < load_crl(data).last_update_utc
               for name, data in old.items())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
