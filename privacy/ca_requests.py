"""Requests for certificates: what an applicant sends, checked before anything in it is used."""

from __future__ import annotations

from typing import Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from privacy.canonical import parse
from privacy.contract import Terms, validate
from privacy.errors import Refused
from privacy.identity import public_key

MAX_REQUEST_BYTES = 2**14  # two signing requests are 1.5 kB


class Request(Terms):
    """What `identity.make_request` writes; both signing requests in PEM."""

    schema_version: Literal["consilo.request/1"]
    tls: str
    sign: str


def read_request(data: bytes) -> tuple[x509.CertificateSigningRequest, x509.CertificateSigningRequest]:
    """(tls, sign), both signed by their keys, under one subject.

    Raises Refused `ca.request`, `identity.weak_key`; UsageError `json.invalid`, `config.invalid`, `config.unknown_key`.
    """
    request = validate(Request, parse(data, limit=MAX_REQUEST_BYTES))
    try:
        tls, sign = (x509.load_pem_x509_csr(pem.encode()) for pem in (request.tls, request.sign))
        one_subject = tls.subject == sign.subject
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as e:
        raise _bad_request("it does not hold two PEM signing requests") from e
    if (not isinstance(public_key(tls), ec.EllipticCurvePublicKey)
            or not isinstance(public_key(sign), ed25519.Ed25519PublicKey)):
        raise _bad_request("its keys are not P-256 for TLS and Ed25519 for signatures")
    if not (_proven(tls) and _proven(sign)):
        raise _bad_request("it does not prove that the applicant holds the keys")
    if not one_subject:
        raise _bad_request("its two parts have different subjects")
    return tls, sign


def _proven(request: x509.CertificateSigningRequest) -> bool:
    try:
        return request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False


def _bad_request(why: str) -> Refused:
    return Refused("ca.request", f"The request is refused: {why}.", "Make it anew with `fl-client csr`.")
