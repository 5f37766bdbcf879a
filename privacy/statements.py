"""Statements: what someone signed, as a DSSE envelope over an in-toto Statement v1 (docs/evidence-format.md).

Guarantees: one statement has one encoding, so no byte of an envelope can change unnoticed; the signature is verified
before the payload is parsed; no error quotes the payload.

https://github.com/secure-systems-lab/dsse (protocol), https://in-toto.io/Statement/v1.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509

from privacy.canonical import canonical, parse
from privacy.errors import CheckFailed, Refused, UsageError
from privacy.identity import Signer, verify_signature

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
MAX_ENVELOPE = 2**16  # bytes of an envelope inside another document
MAX_PEM = 2**14  # bytes of a certificate beside it
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Statement:
    """A statement whose signature was verified. subject: (name, SHA-256 in hex) pairs; signer: fingerprint."""

    predicate_type: str
    subject: tuple[tuple[str, str], ...]
    predicate: dict[str, Any]
    signer: str


def make(signer: Signer, predicate_type: str, subject: Sequence[tuple[str, str]],
         predicate: Mapping[str, Any]) -> bytes:
    """A signed envelope, canonical. subject: (name, lowercase hex SHA-256); the predicate holds no floats.

    Raises CheckFailed `statement.form`, `statement.number`; UsageError `json.not_canonical`.
    """
    body = {"_type": STATEMENT_TYPE, "predicateType": predicate_type, "predicate": dict(predicate),
            "subject": [{"name": name, "digest": {"sha256": sha}} for name, sha in subject]}
    _read(body, signer.fingerprint)
    return seal(signer, PAYLOAD_TYPE, canonical(body))


def open_envelope(data: bytes, certificates: Mapping[str, x509.Certificate]) -> Statement:
    """Verify, then read. certificates: by fingerprint, each accepted by `TrustStore.check(usage="signing")` before.

    Raises CheckFailed `statement.envelope` (not a canonical envelope), `statement.type` (another payloadType),
    `statement.signatures` (not exactly one), `statement.key` (unknown keyid), `statement.signature`,
    `statement.payload` (not canonical JSON), `statement.form` (not a Statement v1), `statement.number` (a float).
    """
    payload, signer = unseal(data, PAYLOAD_TYPE, certificates)
    return _read(parse_payload(payload), signer)


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE pre-authentication encoding: what is signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def seal(signer: Signer, payload_type: str, payload: bytes) -> bytes:
    """A canonical DSSE envelope with one signature."""
    signature = {"keyid": signer.fingerprint, "sig": b64encode(signer.sign(pae(payload_type, payload))).decode()}
    return canonical({"payloadType": payload_type, "payload": b64encode(payload).decode(), "signatures": [signature]})


def unseal(data: bytes, payload_type: str, certificates: Mapping[str, x509.Certificate]) -> tuple[bytes, str]:
    """(payload, keyid) of an envelope, after its signature was verified; the payload is not parsed.

    Raises CheckFailed as `open_envelope` does, up to `statement.signature`.
    """
    try:
        envelope = parse(data)
        if canonical(envelope) != data:
            raise _failed("envelope", "the envelope is not canonical JSON")
    except UsageError as e:
        raise _failed("envelope", "the envelope is not well-formed JSON") from e
    if not isinstance(envelope, dict) or envelope.keys() != {"payloadType", "payload", "signatures"}:
        raise _failed("envelope", "the envelope has other fields than payloadType, payload and signatures")
    if envelope["payloadType"] != payload_type:
        raise _failed("type", "the payload type is not the expected one")
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise _failed("signatures", "it does not carry exactly one signature")
    if not isinstance(signatures[0], dict) or signatures[0].keys() != {"keyid", "sig"}:
        raise _failed("envelope", "the signature has other fields than keyid and sig")
    keyid, payload = signatures[0]["keyid"], _base64(envelope["payload"])
    certificate = certificates.get(keyid) if isinstance(keyid, str) else None
    if certificate is None:
        raise _failed("key", "its key id belongs to no known certificate")
    try:
        verify_signature(certificate, _base64(signatures[0]["sig"]), pae(payload_type, payload))
    except Refused as e:
        raise _failed("signature", "the signature does not verify") from e
    return payload, str(keyid)


def parse_payload(payload: bytes) -> Any:
    """The JSON value of a verified payload. Raises CheckFailed `statement.payload` unless it is canonical."""
    try:
        value = parse(payload)
        if canonical(value) == payload:
            return value
    except UsageError as e:
        raise _failed("payload", "the payload is not well-formed JSON") from e
    raise _failed("payload", "the payload is not canonical JSON")


def _read(body: Any, signer: str) -> Statement:
    if (not isinstance(body, dict) or body.keys() != {"_type", "predicateType", "predicate", "subject"}
            or body["_type"] != STATEMENT_TYPE or not isinstance(body["predicateType"], str)
            or not isinstance(body["predicate"], dict) or not isinstance(body["subject"], list)):
        raise _failed("form", "the payload is not an in-toto Statement v1")
    if _has_float(body["predicate"]):
        raise _failed("number", "the predicate holds a float where a decimal string belongs")
    subject = tuple(_subject(s) for s in body["subject"])
    return Statement(body["predicateType"], subject, body["predicate"], signer)


def _subject(entry: Any) -> tuple[str, str]:
    if (isinstance(entry, dict) and entry.keys() == {"name", "digest"} and isinstance(entry["name"], str)
            and isinstance(entry["digest"], dict) and entry["digest"].keys() == {"sha256"}):
        name, sha = entry["name"], entry["digest"]["sha256"]
        if isinstance(sha, str) and _HEX.fullmatch(sha):
            return name, sha
    raise _failed("form", "a subject is not a name with a SHA-256 digest")


def _has_float(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_float(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(_has_float(v) for v in value)
    return isinstance(value, float)


def _base64(text: Any) -> bytes:
    """Standard base64 in its one canonical form. Raises CheckFailed `statement.envelope`."""
    if isinstance(text, str):
        try:
            raw = b64decode(text)
        except ValueError:
            raw = b""
        if b64encode(raw).decode() == text:
            return raw
    raise _failed("envelope", "a field is not canonical base64")


def _failed(reason: str, why: str) -> CheckFailed:
    return CheckFailed(f"statement.{reason}", f"A signed statement is refused: {why}.",
                       "Get the document again from its signer; if it fails again, treat it as forged.")
