"""Who stands behind a contract: the engineer's signature on it, and each site's approval. Two statements on one digest.

The contract itself stays canonical JSON; what signs it lies beside it and names its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import Field

from privacy.canonical import canonical, labelled_hash, parse
from privacy.contract import Contract, Name, Sha256, Terms, validate
from privacy.errors import CheckFailed, ConsiloError, Refused
from privacy.guard import PACKAGES
from privacy.identity import Peer, Role, Signer, load_certificate
from privacy.predicates import KINDS, ContractSignature, Moment, Person
from privacy.statements import MAX_ENVELOPE, MAX_PEM, make, open_envelope
from privacy.trust import TrustStore

CONTRACT_TYPE = KINDS["contract"].predicate_type
APPROVAL_TYPE = "urn:consilo:approval:1"


class _Signed(Terms):
    """Signature file: the signer's certificate (PEM) and the envelope."""

    schema_version: Literal["consilo.signature/1"] = "consilo.signature/1"
    certificate: str = Field(max_length=MAX_PEM)
    envelope: str = Field(max_length=MAX_ENVELOPE)


class Approval(Terms):
    """Predicate of `urn:consilo:approval:1`: what a site agreed to, under which policy and code, and who said so."""

    site: Name
    run: str
    contract: Sha256
    policy: Sha256
    code: Sha256
    approver: Person
    approved: Moment


@cache
def code_digest() -> str:
    """Hex digest of the installed code: path and SHA-256 of every Python file of the six packages."""
    home = Path(__file__).resolve().parent.parent
    parts: list[str | bytes] = []
    for file in sorted(f for name in PACKAGES for f in (home / name).rglob("*.py")):
        parts += [file.relative_to(home).as_posix(), hashlib.sha256(file.read_bytes()).digest()]
    return labelled_hash("consilo code", *parts).hex()


def sign_contract(contract: Contract, signer: Signer) -> bytes:
    """The engineer's signature file on a contract."""
    said = ContractSignature(run=contract.run, contract=contract.digest, purpose=contract.purpose, expires=contract.expires)
    return _signed(signer, make(signer, CONTRACT_TYPE, [("contract.json", contract.digest)], said.model_dump(mode="json")))


def check_signature(data: bytes, contract: Contract, trust: TrustStore, *, at: datetime | None = None) -> Peer:
    """Who signed this contract. Raises CheckFailed `contract.signature`, and Refused `identity.*` unless it is an engineer
    of this consortium, valid and not revoked."""
    now = at or datetime.now(UTC)
    return read_signature(data, contract, lambda c: trust.check(c, Role.ENGINEER, usage="signing", at=now))


def read_signature(data: bytes, contract: Contract, check: Callable[[x509.Certificate], Peer]) -> Peer:
    """`check_signature`, with the check of the engineer's certificate left to the caller."""
    signed = validate(_Signed, parse(data))
    peer = check(load_certificate(signed.certificate.encode()))
    said = open_envelope(signed.envelope.encode(), {peer.fingerprint: peer.certificate})
    expected = ContractSignature(run=contract.run, contract=contract.digest, purpose=contract.purpose,
                                 expires=contract.expires)
    if said.predicate_type != CONTRACT_TYPE or validate(ContractSignature, said.predicate) != expected:
        raise CheckFailed("contract.signature", "The signature is on another contract.", "Ask the engineer for both files.")
    return peer


def envelope(data: bytes) -> bytes:
    """The statement inside a signature file, for the evidence."""
    return validate(_Signed, parse(data)).envelope.encode()


def approval(contract: Contract, site: str, *, policy: str, approver: str, signer: Signer,
             at: datetime | None = None) -> bytes:
    """A site's signed approval of a contract under its policy (digest) and its installed code."""
    said = Approval(site=site, run=contract.run, contract=contract.digest, policy=policy, code=code_digest(),
                    approver=approver, approved=(at or datetime.now(UTC)).isoformat(timespec="seconds"))
    return _signed(signer, make(signer, APPROVAL_TYPE, [("contract.json", contract.digest)], said.model_dump(mode="json")))


def check_approval(data: bytes, contract: Contract, site: str, *, policy: str, signer: Signer) -> Approval:
    """What this site approved. Raises Refused `contract.not_approved` if that was another contract, under another policy
    or code, or isn't this site's own signature."""
    try:
        got = read_approval(data, contract, site, {signer.fingerprint: signer.certificate})
        if (got.policy, got.code) == (policy, code_digest()):
            return got
    except ConsiloError:
        pass
    raise Refused("contract.not_approved", "This contract wasn't approved here under the present policy and code.",
                  "Read it with fl-client approve, and approve it if you agree.")


def signers_certificate(data: bytes) -> x509.Certificate:
    """The certificate in a signature or approval file, unchecked. Raises UsageError."""
    return load_certificate(validate(_Signed, parse(data)).certificate.encode())


def read_approval(data: bytes, contract: Contract, site: str, certificates: Mapping[str, x509.Certificate]) -> Approval:
    """What the site once approved, whatever is in force there now. certificates: the site's, by fingerprint. Raises
    CheckFailed `statement.*`, `contract.signature`
    (of another contract or site); UsageError."""
    signed = validate(_Signed, parse(data))
    said = open_envelope(signed.envelope.encode(), certificates)
    got = validate(Approval, said.predicate)
    if said.predicate_type != APPROVAL_TYPE or (got.site, got.run, got.contract) != (site, contract.run, contract.digest):
        raise CheckFailed("contract.signature", "The approval is of another contract or site.", "Ask that site.")
    return got


def _signed(signer: Signer, envelope: bytes) -> bytes:
    pem = signer.certificate.public_bytes(Encoding.PEM).decode()
    return canonical(_Signed(certificate=pem, envelope=envelope.decode()).model_dump(mode="json"))
