"""`fl-client enroll` and `fl-client renew`: from keys that never leave to certificates that are ours.

Guarantees: before the request leaves, the server has shown a certificate of role coordinator under the root whose
fingerprint the operator gave; an answer is installed only if it is for our keys and name. Everything can be repeated: a
command that was interrupted goes on with the same keys and request.

    <folder>/tls.key, sign.key, request.json, tls.pem, sign.pem, trust/
    <folder>/renewal/    what a renewal has until it is installed
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fl_client.control_channel import Address, explain, open_channel, require_coordinator, shown_certificate
from privacy import enrol
from privacy.ca_requests import read_request
from privacy.control import UNARY_S
from privacy.control import consilo_control_pb2 as pb
from privacy.control import consilo_control_pb2_grpc as rpc
from privacy.errors import Refused, Unreachable, UsageError
from privacy.files import FileLayer, read_file, write_private
from privacy.identity import FileSigner, Role, create_request, key_pem, load_key, make_request, read_subject
from privacy.trust import TrustStore
from privacy.trust_files import trust_files

POLL_S = 10.0
Pause = Callable[[float], None]


def enroll(url: str, token: enrol.Token, ca: str, folder: Path, name: str, organisation: str, *, wait_s: float,
           proxy: str | None = None, pause: Pause = time.sleep) -> None:
    """Make keys in `folder` (or go on with those there), send the request, wait for the answer, install it.

    ca: SHA-256 of the root's DER, lowercase hex, which the operator got from the CA. wait_s: for the CA's operator.
    Raises Refused `control.untrusted`, `identity.*`, `enrol.taken`, `enrol.other_keys`, `key.exists`; Unreachable
    `enrol.pending`, `control.*`; UsageError `enrol.other_name`, `control.url`, `identity.name`.
    """
    address = Address.parse(url, proxy)
    request = folder / "request.json"
    document = read_file(request) if request.exists() else create_request(folder, name, organisation)
    if read_subject(read_request(document)[0].subject) != (name, organisation):
        raise UsageError("enrol.other_name", "The request in the folder is for another name or organisation.",
                         "Give the name that it was made for, or a new folder.")
    with relay(address, ca) as stub:
        stub.Submit(pb.SubmitRequest(id=token.id, document=enrol.enrolment(token, document, ca)), timeout=UNARY_S)
        answer = _wait(stub, token.id, wait_s, pause)
    _install(_accepted(answer, folder, folder, (name, organisation), Role.SITE, ca), folder)


def renew(url: str, folder: Path, *, wait_s: float, proxy: str | None = None, pause: Pause = time.sleep) -> None:
    """New certificates, with a new TLS key, for whoever holds those in `folder`; the Ed25519 key stays, since the ledger
    is signed with it. Raises as `enroll` does, and Refused `identity.key_mismatch`; UsageError `key.missing`."""
    signer, trust = FileSigner(folder / "sign.key", folder / "sign.pem"), TrustStore.load(folder / "trust")
    role = next((r for r, c in trust.issuing.items() if c.subject == signer.certificate.issuer), Role.SITE)
    who, work = read_subject(signer.certificate.subject), folder / "renewal"
    if not (work / "sign.pem").exists():
        number, document = _renewal(work, signer, folder, who, trust.fingerprint)
        with relay(Address.parse(url, proxy), trust.fingerprint) as stub:
            stub.Submit(pb.SubmitRequest(id=number, document=document), timeout=UNARY_S)
            answer = _wait(stub, number, wait_s, pause)
        _install(_accepted(answer, work, folder, who, role, trust.fingerprint), work)
    FileLayer().write_atomic(folder / "tls.key", key_pem(load_key(work / "tls.key")), mode=0o600)
    _install({path.relative_to(work).as_posix(): read_file(path) for path in work.rglob("*.pem")}, folder)
    shutil.rmtree(work)


@contextmanager
def relay(address: Address, ca: str) -> Iterator[rpc.EnrolmentStub]:
    """A connection to the coordinator, once it is known to be one.

    The root's fingerprint is all that is known before: a channel that trusts just the certificate shown is asked for the
    CAs and lists (the request holds nothing), these are verified up to the root, and then the certificate by them.
    """
    server, now = shown_certificate(address), datetime.now(UTC)
    try:
        with open_channel(address, server) as channel:
            stub = rpc.EnrolmentStub(channel)
            said = stub.Authorities(pb.AuthoritiesRequest(), timeout=UNARY_S)
            trust, _ = trust_files(said.root, said.issuing, said.crls, ca=ca, at=now)
            require_coordinator(trust, server, now)
            yield stub
    except grpc.RpcError as e:
        raise explain(e) from None


def _wait(stub: rpc.EnrolmentStub, number: str, wait_s: float, pause: Pause) -> bytes:
    """The answer. Raises Unreachable `enrol.pending`."""
    left = wait_s
    while not (found := bytes(stub.Poll(pb.PollRequest(id=number), timeout=UNARY_S).certificates)):
        if left <= 0:
            raise Unreachable("enrol.pending", "The CA's operator has not answered yet.",
                              "Run the same command again later; it goes on where it stopped.")
        pause(min(POLL_S, left))
        left -= POLL_S
    return found


def _renewal(work: Path, signer: FileSigner, folder: Path, who: tuple[str, str], ca: str) -> tuple[str, bytes]:
    """(number, document), the same ones when it is repeated."""
    request, number = work / "request.json", work / "number"
    if not number.exists():
        work.mkdir(mode=0o700, exist_ok=True)
        (work / "tls.key").unlink(missing_ok=True)  # of a run that ended before its number was there
        tls, sign = ec.generate_private_key(ec.SECP256R1()), load_key(folder / "sign.key")
        if not isinstance(sign, ed25519.Ed25519PrivateKey):
            raise Refused("identity.key_mismatch", "sign.key is no Ed25519 key.", "Put the site's own key there.")
        write_private(work / "tls.key", key_pem(tls))
        FileLayer().write_atomic(request, make_request(*who, tls, sign))
        FileLayer().write_atomic(number, secrets.token_hex(16).encode())
    return read_file(number).decode(), enrol.renewal(signer, read_file(request), ca)


def _accepted(answer: bytes, tls_folder: Path, folder: Path, who: tuple[str, str], role: Role,
              ca: str) -> dict[str, bytes]:
    tls, sign = load_key(tls_folder / "tls.key").public_key(), load_key(folder / "sign.key").public_key()
    return enrol.accept(answer, tls=tls, sign=sign, who=who, role=role, ca=ca, at=datetime.now(UTC))


def _install(files: Mapping[str, bytes], folder: Path) -> None:
    """sign.pem comes last: where it is, all is."""
    for name in sorted(files, key=lambda name: (name == "sign.pem", name)):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        FileLayer().write_atomic(path, files[name])
