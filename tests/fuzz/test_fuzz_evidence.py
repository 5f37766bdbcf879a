"""Evidence and identity: contracts, statements, ledgers, journals, the log, certificates, requests, rosters, bundles.

Where a signature stands in front of a parser, the bytes behind it are signed anew: what is fuzzed is what a party with a
key of its own can send.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from fuzz_kit import TIMES, Target, bounded, fuzz, holds, mutated
from hypothesis import given
from hypothesis import strategies as st

from fl_client.evidence import export
from fl_client.journal import SiteJournal, read_statements
from fl_client.witness import HEAD, Witness
from fl_server.journal import read_events, status
from privacy import ca, enrol
from privacy.ca_requests import read_request
from privacy.canonical import canonical, digest, parse
from privacy.contract import Contract, load_contract
from privacy.errors import ConsiloError
from privacy.identity import Role, key_pem, load_certificate, load_key, read_subject
from privacy.ledger import check_extract
from privacy.ledger_records import V2, domain
from privacy.report_extras import AttackExtra, AuditExtra
from privacy.signing import check_signature, read_approval, sign_contract
from privacy.statements import PAYLOAD_TYPE, open_envelope, seal
from privacy.transparency import Head, open_checkpoint, open_witness, sign_checkpoint, sign_witness
from privacy.trust import TrustStore, load_crl
from privacy.verify import verify_bundle
from tests.client import test_evidence as site
from tests.privacy import evidence_fixture as evidence
from tests.privacy.extras_kit import attack, audit

NAMES = ("contract", "envelope", "payload", "ledger extract", "ledger record", "site journal", "site statements",
         "run journal", "run status", "checkpoint", "checkpoint payload", "witness payload", "witness state", "private key",
         "certificate", "root certificate", "issuing certificate", "revocation list", "request", "request signed anew",
         "roster", "roster payload", "contract signature", "approval", "enrolment token", "enrolment answer", "audit",
         "attack")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[evidence.Consortium, Path, Path]:
    """(parties, a run's bundle, a scratch folder)."""
    folder = tmp_path_factory.mktemp("evidence")
    parties = evidence.Consortium(folder)
    return parties, evidence.write_bundle(folder / "bundle", parties), tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def targets(world: tuple[evidence.Consortium, Path, Path]) -> dict[str, Target]:
    parties, bundle, scratch = world
    signer, home = parties.signers["clinic-a"], parties.folder / "ca"
    certificates = {signer.fingerprint: signer.certificate}
    agreed = load_contract((bundle / "contract.json").read_bytes())
    trust, now = TrustStore.load(home), datetime.now(UTC)
    request = (parties.folder / "keys" / "clinic-a" / "request.json").read_bytes()
    envelope = next((bundle / "statements").glob("*round-site-clinic-a.json")).read_bytes()
    extract = (bundle / "ledgers" / "clinic-a.jsonl").read_bytes()
    head = Head(log="clinic-a", size=3, root="0" * 64)
    events = b"".join(canonical(e) + b"\n" for e in (
        {"event": "run", "run": "0" * 32, "contract": "1" * 64, "rounds": 2, "adapter": "2" * 64},
        {"event": "round", "round": 1, "attempt": 0},
        {"event": "void", "round": 1, "attempt": 0, "reason": "a.b", "lost": []},
        {"event": "done", "round": 1, "attempt": 1, "sites": ["a"], "lost": [], "adapter": "3" * 64},
        {"event": "end", "outcome": "done"}))
    started = [{"event": "started", "run": "0" * 32, "round": 1, "attempt": 0, "pass": 1},
               {"event": "spent", "run": "0" * 32, "round": 1, "attempt": 0, "pass": 1, "adapter": "1" * 64},
               {"event": "stated", "kind": "round-site", "envelope": envelope.decode()}]
    journal = b"".join(canonical(e) + b"\n" for e in started)
    seen = canonical({"clinic-a": {"run": "0" * 32, "head": head.model_dump(), "certificate": "PEM",
                                   "checkpoint": sign_checkpoint(signer, head).decode()}})
    issuing, lists = ([p.read_bytes() for p in sorted(home.glob(f"{kind}-*.pem"))] for kind in ("issuing", "crl"))
    issued = home / "issued" / "clinic-a"
    answer, token = enrol.answer(issued), enrol.Token.new()
    signature = sign_contract(agreed, parties.signers[evidence.LAB])
    payload = base64.b64decode(parse(sign_checkpoint(signer, head))["payload"])
    witnessed = base64.b64decode(parse(sign_witness(signer, "clinic-a", head))["payload"])
    roster = ca.roster(home)
    issuer = ca._CaSigner(*ca._issuer(home, Role.SITE))
    tls_key, sign_key = (load_key(parties.folder / "keys" / "clinic-a" / f"{k}.key") for k in ("tls", "sign"))
    assert isinstance(tls_key, ec.EllipticCurvePrivateKey) and isinstance(sign_key, ed25519.Ed25519PrivateKey)

    def at(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        """Of bytes in a file."""
        path = scratch / name
        path.touch(mode=0o600)

        def parser(data: bytes) -> object:
            path.write_bytes(data)
            return read(path)

        return parser

    def sealed(payload: bytes) -> bytes:
        return seal(signer, PAYLOAD_TYPE, payload)

    def site_journal(path: Path) -> object:
        book = SiteJournal(path)
        book.close()
        return book.last("0" * 32), book.attempts("0" * 32)

    def record(body: bytes) -> object:
        """As the next record of a real ledger, hashed and signed by its owner."""
        value = parse(body)
        hash_ = digest(value)
        signed = base64.b64encode(signer.sign(domain(V2) + bytes.fromhex(hash_))).decode()
        line = canonical({"body": value, "hash": hash_, "signature": signed})
        return check_extract(b"\n".join([*lines[:-1], line]) + b"\n", signer.certificate)

    def chain(pem: bytes) -> object:
        cert = load_certificate(pem)
        read_subject(cert.subject)
        for role in Role:
            trust.check(cert, role, usage="signing", at=now)
        return cert

    def resigned(der: bytes) -> object:
        """A request whose signed part came so, signed by the applicant's own keys."""
        pair = {"tls": _request(der, tls_key), "sign": _request(der, sign_key)}
        return read_request(canonical({"schema_version": "consilo.request/1", **pair}))

    lines = extract.splitlines()
    root = (home / "root.pem").read_bytes()
    own = load_certificate((issued / "tls.pem").read_bytes())
    csr = read_request(request)
    return {
        "contract": Target(load_contract, [agreed.to_bytes()]),
        "envelope": Target(lambda data: open_envelope(data, certificates), [envelope]),
        "payload": Target(lambda data: open_envelope(sealed(data), certificates), [payload]),
        "ledger extract": Target(lambda data: check_extract(data, signer.certificate), [extract]),
        "ledger record": Target(record, [canonical(parse(line)["body"]) for line in lines[-1:]]),
        "site journal": Target(at("site", site_journal), [journal]),
        "site statements": Target(at("statements", read_statements), [journal]),
        "run journal": Target(at("run", read_events), [events]),
        "run status": Target(at("status", status), [events]),
        "checkpoint": Target(lambda data: open_checkpoint(data, certificates), [sign_checkpoint(signer, head)]),
        "checkpoint payload": Target(lambda data: open_checkpoint(sealed(data), certificates), [payload]),
        "witness payload": Target(lambda data: open_witness(sealed(data), certificates), [witnessed]),
        "witness state": Target(at(HEAD, lambda p: Witness(p.parent, "a", signer, lambda _: pytest.fail("unused"))), [seen]),
        "private key": Target(at("sign.key", load_key), [key_pem(sign_key), key_pem(tls_key)]),
        "certificate": Target(chain, [(issued / "sign.pem").read_bytes()]),
        "root certificate": Target(lambda data: TrustStore(data, issuing), [root]),
        "issuing certificate": Target(lambda data: TrustStore(root, [data]), issuing),
        "revocation list": Target(lambda data: (load_crl(data), TrustStore(root, issuing, [data])), lists),
        "request": Target(read_request, [request]),
        "request signed anew": Target(resigned, [
            changed for body in (csr[0].tbs_certrequest_bytes, csr[1].tbs_certrequest_bytes) for changed in (
                body, body.replace(b"\x02\x01\x00", b"\x02\x01\x05", 1), body.replace(b"\x0c", b"\x1e"))]),
        "roster": Target(lambda data: ca.verify_roster(data, trust), [roster]),
        "roster payload": Target(lambda data: ca.verify_roster(seal(issuer, ca.ROSTER_TYPE, data), trust),
                                 [base64.b64decode(parse(roster)["payload"])]),
        "contract signature": Target(lambda data: check_signature(data, agreed, trust), [signature]),
        "approval": Target(lambda data: read_approval(data, agreed, "clinic-a", certificates), [signature]),
        "enrolment token": Target(enrol.Token.parse, [token.text()]),
        "enrolment answer": Target(lambda data: enrol.accept(
            data, tls=tls_key.public_key(), sign=sign_key.public_key(), who=read_subject(own.subject), role=Role.SITE,
            ca=trust.fingerprint, at=now), [answer]),
        "audit": Target(at("audit", lambda p: AuditExtra(p).shown(agreed)), [json.dumps(audit(parties)).encode()]),
        "attack": Target(at("attack", lambda p: AttackExtra(p).shown(agreed)), [json.dumps(attack()).encode()]),
    }


def _request(body: bytes, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    """PEM of a PKCS 10 request: SEQUENCE {body, algorithm, BIT STRING}."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        algorithm, signature = bytes.fromhex("300506032b6570"), key.sign(body)
    else:
        algorithm, signature = bytes.fromhex("300a06082a8648ce3d040302"), key.sign(body, ec.ECDSA(hashes.SHA256()))
    text = base64.encodebytes(_tlv(0x30, body + algorithm + _tlv(3, b"\0" + signature))).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n"


def _tlv(tag: int, value: bytes) -> bytes:
    size = len(value).to_bytes((len(value).bit_length() + 7) // 8 or 1, "big")
    return bytes([tag]) + (size if len(value) < 128 else bytes([0x80 | len(size)]) + size) + value


@TIMES
@pytest.mark.parametrize("name", NAMES)
def test_documents(name: str, times: int, targets: dict[str, Target]) -> None:
    assert tuple(targets) == NAMES
    fuzz(targets[name], 50, times)


def test_honest_documents_are_read(targets: dict[str, Target]) -> None:
    """So that what is fuzzed lies beyond the first refusal. These three are refused at the last check: a certificate for
    roles that aren't its own, two requests of one body, an approval that is another's."""
    refused = {name for name, target in targets.items() if isinstance(holds(target, target.examples[0]), Exception)}
    assert refused == {"certificate", "request signed anew", "approval"}
    assert isinstance(holds(targets["contract"], targets["contract"].examples[0]), Contract)


def test_what_longer_runs_found(targets: dict[str, Target], world: tuple[evidence.Consortium, Path, Path]) -> None:
    """An event that is an object, and a revocation list whose issuer is read only when it is compared."""
    for name in ("run journal", "run status"):
        for event in ("{}", "[]"):
            data = targets[name].examples[0].replace(b'"event":"run"', b'"event":' + event.encode())
            assert isinstance(holds(targets[name], data), ConsiloError)
    pem = sorted((world[0].folder / "ca").glob("crl-*.pem"))[0].read_text()
    der = base64.b64decode("".join(pem.splitlines()[1:-1]))
    broken = base64.encodebytes(der.replace(b"Test consortium", b"Tes\xde consortium"))
    assert der != base64.b64decode(broken)
    data = b"-----BEGIN X509 CRL-----\n" + broken + b"-----END X509 CRL-----\n"
    assert isinstance(holds(targets["revocation list"], data), ConsiloError)


def bundles(times: int, bundle: Path, work: Path, root: str, reseal: Callable[[Path, str], None], *,
            free: tuple[str, ...]) -> None:
    """Change one file of a copy and seal it again. free: where a change that whoever seals may make isn't a lie."""
    files = sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file() and p.name != "manifest.json")

    @bounded(15, times)
    @given(st.sampled_from(files), st.integers(0, 2**32 - 1))
    def run(name: str, seed: int) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(bundle, work)
        good = (bundle / name).read_bytes()
        if (data := mutated(good, seed)) == good:
            return
        (work / name).write_bytes(data)
        reseal(work, name)
        verdict = verify_bundle(work, root)
        assert verdict.verdict == "FAIL" or name.startswith(free), (name, seed)
        assert not [s for s in verdict.steps if re.search(r"\(verify\.[A-Z]", s.detail)], (name, verdict.steps)

    run()


@TIMES
def test_bundles(times: int, world: tuple[evidence.Consortium, Path, Path]) -> None:
    """A bundle with one file changed, sealed again by the coordinator: a verdict, never PASS, and no step of the verifier
    met something that it didn't foresee."""
    parties, bundle, scratch = world

    def reseal(work: Path, name: str) -> None:
        if name != "contract.json":
            evidence.reseal(work, parties)

    bundles(times, bundle, scratch / "work", parties.fingerprint, reseal, free=("certificates/",))


@TIMES
def test_bundles_of_a_site(times: int, tmp_path_factory: pytest.TempPathFactory,
                           tiny_contract: Callable[..., Contract]) -> None:
    """The same for what a site exports of itself, sealed again by the site. Which heads it saw is its own word."""
    place, work = site.Place(tmp_path_factory.mktemp("site"), tiny_contract), tmp_path_factory.mktemp("work") / "bundle"
    bundle = place.folder / "bundle"
    export(place.site, bundle)

    def reseal(work: Path, _: str) -> None:
        with suppress(ValueError, KeyError, IndexError, TypeError, ConsiloError):  # what can't even be sealed
            place.reseal(work)

    bundles(times, bundle, work, place.root, reseal, free=("certificates/", "witness/"))
