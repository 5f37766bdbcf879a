"""Enrolment: how a site asks the CA for certificates through a coordinator that neither of them trusts.

1. The CA makes a token (a number and a key), which goes to the site out of band.
2. The site makes its keys, and sends its request with HMAC-SHA256(token's key, request and root's fingerprint).
3. The CA checks that, once, and answers with the certificates and its trust folder.
4. The site takes an answer only if the certificates are of its own keys, under the root that it was told of.

A renewal needs no token: it is signed by the site's current Ed25519 key. Both documents are public; only the token's
key is secret, and nothing here shows it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from pydantic import Field

from privacy.ca_requests import Request
from privacy.canonical import canonical, parse
from privacy.contract import Sha256, Terms, validate
from privacy.errors import Refused, UsageError
from privacy.files import read_file, read_private
from privacy.identity import PublicKey, Role, Signer, Usage, load_certificate, public_key
from privacy.statements import parse_payload, seal, unseal
from privacy.trust_files import trust_files

TOKEN_BYTES = 32
MAX_TOKEN_BYTES = 1000  # of what is read to find a token in it
MAX_BYTES = 2**16  # of an answer: two certificates, five of CAs, four revocation lists
RENEWAL_TYPE = "application/vnd.consilo.renewal+json"
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


@dataclass(frozen=True)
class Token:
    """id: public, 16 bytes in hex; key: secret, 32 bytes."""

    id: str
    key: bytes = field(repr=False)

    @classmethod
    def new(cls) -> Token:
        return cls(secrets.token_hex(16), secrets.token_bytes(TOKEN_BYTES))

    @classmethod
    def parse(cls, data: bytes) -> Token:
        """Raises UsageError `enrol.token`, without quoting."""
        match data.strip().split(b"."):
            case [b"consilo-token-1", number, key] if len(number) == 32 and len(key) == 2 * TOKEN_BYTES:
                try:
                    return cls(bytes.fromhex(number.decode()).hex(), bytes.fromhex(key.decode()))
                except ValueError:
                    pass
        raise UsageError("enrol.token", "That is no token.", "Give the file that the CA handed over, unchanged.")

    @classmethod
    def read(cls, path: Path) -> Token:
        """Raises Refused `key.permissions`; UsageError `key.missing`, `enrol.token`."""
        return cls.parse(read_private(path))

    def text(self) -> bytes:
        """One line, to be written with mode 0600."""
        return f"consilo-token-1.{self.id}.{self.key.hex()}\n".encode()


class Enrolment(Terms):
    """What a site sends. ca: fingerprint of the root that it was told of."""

    schema_version: Literal["consilo.enrolment/1"] = "consilo.enrolment/1"
    ca: Sha256
    token: Id
    request: Request
    mac: Sha256

    def require_mac(self, key: bytes) -> None:
        """Raises Refused `enrol.mac`, in constant time."""
        if not hmac.compare_digest(self.mac, _mac(key, self.ca, self.token, self.request)):
            raise Refused("enrol.mac", "The request does not come from whoever holds the token, or it was changed.",
                          "Compare the fingerprint of the request with the site by telephone; make a new token.")


class Renewal(Terms):
    """The payload of a renewal, signed under the current certificate."""

    schema_version: Literal["consilo.renewal/1"] = "consilo.renewal/1"
    ca: Sha256
    request: Request


class Answer(Terms):
    """What the CA answers; everything in PEM."""

    schema_version: Literal["consilo.certificates/1"] = "consilo.certificates/1"
    tls: str
    sign: str
    root: str
    issuing: tuple[str, ...] = Field(max_length=8)
    crls: tuple[str, ...] = Field(max_length=8)


def enrolment(token: Token, request: bytes, ca: str) -> bytes:
    """The document of a site: canonical JSON. request: as `identity.make_request` writes it."""
    body = validate(Request, parse(request))
    return canonical(Enrolment(ca=ca, token=token.id, request=body,
                               mac=_mac(token.key, ca, token.id, body)).model_dump(mode="json"))


def renewal(signer: Signer, request: bytes, ca: str) -> bytes:
    """A DSSE envelope over the request, by the signer's current certificate."""
    body = Renewal(ca=ca, request=validate(Request, parse(request)))
    return seal(signer, RENEWAL_TYPE, canonical(body.model_dump(mode="json")))


def open_renewal(data: bytes, certificates: Mapping[str, x509.Certificate]) -> tuple[Renewal, x509.Certificate]:
    """Verify, then read: what is asked, and the certificate that signed it. Raises CheckFailed `statement.*`; UsageError
    `config.invalid`."""
    payload, signer = unseal(data, RENEWAL_TYPE, certificates)
    return validate(Renewal, parse_payload(payload)), certificates[signer]


def answer(issued: Path) -> bytes:
    """From the folder that `ca.issue` left: tls.pem, sign.pem, trust/."""
    trust = issued / "trust"
    text = {name: read_file(path).decode() for name, path in (
        ("tls", issued / "tls.pem"), ("sign", issued / "sign.pem"), ("root", trust / "root.pem"))}
    issuing, crls = ([read_file(path).decode() for path in sorted(trust.glob(f"{kind}-*.pem"))]
                     for kind in ("issuing", "crl"))
    return canonical(Answer(**text, issuing=tuple(issuing), crls=tuple(crls)).model_dump(mode="json"))


def accept(data: bytes, *, tls: PublicKey, sign: PublicKey, who: tuple[str, str], role: Role, ca: str,
           at: datetime) -> dict[str, bytes]:
    """The files to install, by path: trust/*.pem, tls.pem, sign.pem. who: (name, organisation).

    Raises Refused `enrol.other_keys` (certificates of someone else's keys or name), `identity.*` (not under that root,
    of another role, revoked, expired); UsageError `json.invalid`, `config.invalid`, `identity.malformed`.
    """
    said = validate(Answer, parse(data, limit=MAX_BYTES))
    trust, files = trust_files(said.root.encode(), [x.encode() for x in said.issuing], [x.encode() for x in said.crls],
                               ca=ca, at=at)
    pems = {"tls.pem": said.tls.encode(), "sign.pem": said.sign.encode()}
    wanted: tuple[tuple[str, PublicKey, Usage], ...] = (("tls.pem", tls, "tls"), ("sign.pem", sign, "signing"))
    for name, key, usage in wanted:
        peer = trust.check(load_certificate(pems[name], name), role, usage=usage, at=at)
        if public_key(peer.certificate) != key or (peer.name, peer.organisation) != who:
            raise Refused("enrol.other_keys", "The certificates are not of this site's keys and name.",
                          "Tell the CA's operator: the coordinator handed out someone else's.")
    return {f"trust/{name}": pem for name, pem in files.items()} | pems


def _mac(key: bytes, ca: str, token: str, request: Request) -> str:
    body = {"schema_version": "consilo.enrolment/1", "ca": ca, "token": token, "request": request.model_dump(mode="json")}
    return hmac.new(key, canonical(body), hashlib.sha256).hexdigest()
