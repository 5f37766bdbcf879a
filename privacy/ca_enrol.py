"""The CA's side of enrolment (`privacy.enrol`): tokens, and requests that came through the coordinator.

Guarantees: a token serves one request, and is marked as used, durably, before anything is issued; it names the site that
it is for. A renewal changes neither name, organisation nor role, and is taken once.

    tokens/<id>.json    0600: what the token is for, its key, and the request that used it
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from privacy import ca, enrol
from privacy.ca_requests import read_request
from privacy.canonical import canonical, parse
from privacy.contract import Sha256, Terms, validate
from privacy.errors import CheckFailed, Refused, UsageError
from privacy.files import FileLayer, read_private, write_private
from privacy.identity import CERTIFICATE_DAYS, Role, fingerprint, load_certificate, read_subject, subject
from privacy.trust import TrustStore

MAX_TOKEN_DAYS = 90
ANSWER = "answer.json"


class _Record(Terms):
    schema_version: Literal["consilo.ca-token/1"] = "consilo.ca-token/1"
    id: enrol.Id
    key: Sha256
    name: str
    organisation: str
    expires: datetime
    request: Sha256 | None = None  # digest of the request that used it
    issued: bool = False


def make_token(folder: Path, name: str, organisation: str, *, days: int = 7) -> tuple[enrol.Token, datetime]:
    """A token for one site, and when it expires. Raises UsageError `identity.name`, `ca.days`, `ca.missing`."""
    subject(name, organisation)
    if not 1 <= days <= MAX_TOKEN_DAYS:
        raise UsageError("ca.days", f"A token's validity is not 1 to {MAX_TOKEN_DAYS} days.", "Give --days in that range.")
    token, expires = enrol.Token.new(), _now() + timedelta(days=days)
    record = _Record(id=token.id, key=token.key.hex(), name=name, organisation=organisation, expires=expires)
    with _locked(folder):
        write_private(_path(folder, token.id), _dump(record))
    return token, expires


def issue(folder: Path, document: bytes, *, days: int = CERTIFICATE_DAYS, hosts: Sequence[str] = ()) -> ca.IssuedFiles:
    """Certify what an enrolment or a renewal asks for; answer.json in the folder returned goes back to the site.

    hosts: of a coordinator's renewal. Raises Refused `enrol.mac`, `enrol.other_ca`, `enrol.token_unknown`,
    `enrol.token_expired`, `enrol.token_used`, `enrol.name`, `ca.not_current`; CheckFailed `statement.*`; UsageError
    `json.invalid`, `config.invalid`; and as `ca.issue` does.
    """
    value = parse(document, limit=enrol.MAX_BYTES)
    with _locked(folder):
        if isinstance(value, dict) and "payloadType" in value:
            issued = _renew(folder, document, days, hosts)
        else:
            issued = _enrol(folder, validate(enrol.Enrolment, value), days)
        FileLayer().write_atomic(issued.folder / ANSWER, enrol.answer(issued.folder))
    return issued


def _enrol(folder: Path, asked: enrol.Enrolment, days: int) -> ca.IssuedFiles:
    path = _path(folder, asked.token)
    if not path.exists():
        raise Refused("enrol.token_unknown", "This CA made no such token.", "Make one with `fl-ca token`.")
    token = validate(_Record, parse(read_private(path)))
    asked.require_mac(bytes.fromhex(token.key))
    _require_root(folder, asked.ca)
    request = canonical(asked.request.model_dump(mode="json"))
    digest = hashlib.sha256(request).hexdigest()
    if token.issued or token.request not in (None, digest):  # the same request goes on where a crash ended it
        raise Refused("enrol.token_used", "The token has been used.", "Make a new one, and find out who used this one.")
    if _now() > token.expires:
        raise Refused("enrol.token_expired", "The token has expired.", "Make a new one with `fl-ca token`.")
    _require_subject(request, (token.name, token.organisation))
    used = token.model_copy(update={"request": digest})
    FileLayer().write_atomic(path, _dump(used), mode=0o600)
    issued = ca.issue(folder, request, Role.SITE, days=days)
    FileLayer().write_atomic(path, _dump(used.model_copy(update={"issued": True})), mode=0o600)
    return issued


def _renew(folder: Path, document: bytes, days: int, hosts: Sequence[str]) -> ca.IssuedFiles:
    """Signed under the name's last certificate, which the new one replaces: the same document does not work twice."""
    try:
        asked, certificate = enrol.open_renewal(document, ca.current_signers(folder))
    except CheckFailed as e:
        if e.code != "statement.key":
            raise
        raise Refused("ca.not_current", "The request is signed under no certificate that this CA issued last to its "
                      "name, or that one was revoked or has expired.", "Enrol again with a new token.") from e
    _require_root(folder, asked.ca)
    request = canonical(asked.request.model_dump(mode="json"))
    _require_subject(request, read_subject(certificate.subject))
    trust = TrustStore.load(folder)
    role = next(r for r, issuing in trust.issuing.items() if issuing.subject == certificate.issuer)
    return ca.issue(folder, request, role, days=days, hosts=hosts)


def _require_root(folder: Path, root: str) -> None:
    if fingerprint(load_certificate((folder / "root.pem").read_bytes())) != root:
        raise Refused("enrol.other_ca", "The request is meant for another CA.", "Tell the site this CA's fingerprint.")


def _require_subject(request: bytes, who: tuple[str, str]) -> None:
    if read_subject(read_request(request)[0].subject) != who:
        raise Refused("enrol.name", "The request is for another name or organisation than it may ask for.",
                      "Make a token for that name, or have the site ask under its own.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One at a time. Raises Refused `file.leased`; UsageError `ca.missing`."""
    if not (folder / "root.pem").exists():
        raise UsageError("ca.missing", "The folder holds no CA.", "Make one with `fl-ca init`.")
    (folder / "tokens").mkdir(mode=0o700, exist_ok=True)
    layer = FileLayer()
    fd = layer.open_append(folder / "tokens" / ".lock")
    try:
        yield
    finally:
        layer.close(fd)


def _path(folder: Path, token: str) -> Path:
    return folder / "tokens" / f"{token}.json"


def _dump(record: _Record) -> bytes:
    return canonical(record.model_dump(mode="json"))


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
