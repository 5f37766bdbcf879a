"""Verification, rules 1 to 4: who signed what. Everything later reads `Facts`, which holds verified values only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography import x509

from privacy.bundle import MANIFEST, Manifest, RawBundle, statement_name
from privacy.contract import Contract, validate
from privacy.errors import CheckFailed, ConsiloError
from privacy.identity import Peer, Role, load_certificate
from privacy.ledger import LedgerSummary
from privacy.predicates import KINDS, Closing, Evaluation, Kind, Predicate, Release, Round, RoundSite
from privacy.statements import Statement, open_envelope
from privacy.transparency import Entry, Head
from privacy.trust import TrustStore

P = TypeVar("P", bound=Predicate)
ROLES = (Role.SITE, Role.COORDINATOR, Role.ENGINEER)  # whose statements a run bundle holds


@dataclass(frozen=True)
class Event:
    """A statement whose signature, signer, role and form hold."""

    path: str
    who: str
    predicate: Predicate


@dataclass(frozen=True)
class Spending:
    """Epsilon at one site. `alone`: recomputed for this run's reserves; `spent`: the lineage's total, as claimed."""

    alone: float
    spent: float


@dataclass
class Facts:
    """What has been verified so far; a step that fails leaves its part empty.

    heads: of the log, by size. witnesses: who signed the last one. unaccounted: sites that trained, and whose ledger
    never came.
    """

    raw: RawBundle
    ca: str | None
    trust: TrustStore | None = None
    peers: dict[str, Peer] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    contract: Contract | None = None
    entries: list[Entry] | None = None
    heads: dict[int, Head] = field(default_factory=dict)
    witnesses: set[str] = field(default_factory=set)
    unaccounted: list[str] = field(default_factory=list)
    ledgers: dict[str, LedgerSummary] = field(default_factory=dict)
    spending: dict[str, Spending] = field(default_factory=dict)

    def said(self, kind: type[P]) -> list[P]:
        """All verified predicates of one kind, in the order of their numbers."""
        return [e.predicate for e in self.events if isinstance(e.predicate, kind)]

    def trained(self, site: str) -> list[RoundSite]:
        """What a site signed, once for each attempt: the passes of one attempt are one training and one charge."""
        return list({(s.round, s.attempt): s for s in self.said(RoundSite) if s.site == site}.values())

    def agreed(self) -> Contract:
        """The contract. Raises CheckFailed `verify.no_contract` unless rule 5 could read one."""
        if self.contract is None:
            raise CheckFailed("verify.no_contract", "There is no valid contract.", "See the contract step.")
        return self.contract


class Findings(list[str]):
    """Problems of one step, in plain words that quote nothing unverified."""

    def expect(self, ok: bool, otherwise: str) -> bool:
        if not ok:
            self.append(otherwise)
        return ok


def anchor(facts: Facts, found: Findings) -> str:
    root = facts.raw.files.get("certificates/root.pem", b"")
    issuing = [data for name, data in facts.raw.under("certificates").items() if name.startswith("issuing-")]
    facts.trust = TrustStore(root, issuing)
    if facts.ca is None:
        return "no fingerprint was given, so nothing ties this bundle to your consortium"
    found.expect(facts.trust.fingerprint == facts.ca, "the root certificate is not the one that --ca names")
    return "the root certificate is the one that --ca names"


def certificates(facts: Facts, found: Findings) -> str:
    trust = facts.trust
    if trust is None:
        raise CheckFailed("verify.no_root", "There is no root to check against.", "See the anchor step.")
    for name, pem in facts.raw.under("certificates").items():
        if name == "root":
            continue
        cert = load_certificate(pem)
        if name.startswith("issuing-"):
            ca = next((ca for role, ca in trust.issuing.items() if name == f"issuing-{role}" and role in ROLES), None)
            found.expect(cert == ca, "an issuing CA stands under another role's name")
            continue
        try:
            role = next((r for r in ROLES if r in trust.issuing and trust.issuing[r].subject == cert.issuer), Role.SITE)
            peer = peer_of(trust, cert, role)
        except ConsiloError as e:
            found.append(f"a certificate is refused ({e.code})")
            continue
        if found.expect(peer.name == name, "a certificate stands under another name than its own"):
            facts.peers[name] = peer
    found.expect(set(trust.issuing) == set(ROLES),
                 "the issuing CAs are not exactly those of sites, coordinator and engineer")
    roles = Counter(p.role for p in facts.peers.values())
    for role in (Role.COORDINATOR, Role.ENGINEER):
        found.expect(roles[role] == 1, f"there is not exactly one {role}")
    return f"1 coordinator, 1 engineer and {roles[Role.SITE]} sites, each under the CA of its role"


def peer_of(trust: TrustStore | None, cert: x509.Certificate, role: Role) -> Peer:
    """The holder of a certificate of that role, at the first moment of its validity: statements carry no time.

    Raises Refused `identity.*`; CheckFailed `verify.no_root`.
    """
    if trust is None:
        raise CheckFailed("verify.no_root", "There is no root to check against.", "See the anchor step.")
    links = [cert, trust.root, *([trust.issuing[role]] if role in trust.issuing else [])]
    return trust.check(cert, role, usage="signing", at=max(link.not_valid_before_utc for link in links))


def manifest(facts: Facts, found: Findings) -> str:
    statement, signer = _open(facts, "manifest.json", MANIFEST)
    predicate = validate(Manifest, statement.predicate)
    facts.events.append(Event("manifest.json", signer.name, predicate))
    check_listed(facts.raw, predicate.files, found)
    found.expect(_subject_holds(facts, statement, predicate), "the manifest is about another subject than it says")
    return f"signed by the coordinator; {len(predicate.files)} files are listed and unchanged"


def check_listed(raw: RawBundle, listed: Mapping[str, str], found: Findings) -> None:
    """The files are those of a manifest, with the digests that it lists."""
    there = {name for name in raw.files if name != "manifest.json"}
    found.expect(not there - listed.keys(), "there is a file that the manifest doesn't list")
    found.expect(not listed.keys() - there, "a file that the manifest lists is missing")
    changed = sorted(name for name in there & listed.keys() if raw.sha256(name) != listed[name])
    found.extend(f"{name} is not the file that the manifest lists" for name in changed)


def statements(facts: Facts, found: Findings) -> str:
    numbers = []
    for path in facts.raw.files:
        parts = statement_name(path)
        if parts is None:
            continue
        number, kind, who = parts
        numbers.append(number)
        try:
            statement, signer = _open(facts, path, KINDS[kind])
            predicate = validate(KINDS[kind].model, statement.predicate)
        except ConsiloError as e:
            found.append(f"statement {number} is refused ({e.code})")
            continue
        named = getattr(predicate, "site", signer.name)
        if (found.expect(signer.name == who, f"statement {number} stands under another name than its signer's")
                and found.expect(named == signer.name, f"statement {number} speaks for another site than its signer")
                and found.expect(_subject_holds(facts, statement, predicate),
                                 f"statement {number} is about another subject than it says")):
            facts.events.append(Event(path, who, predicate))
    found.expect(numbers == list(range(1, len(numbers) + 1)), "the statements are not numbered 1, 2, 3, ...")
    return f"{len(numbers)} statements, each signed by the role that its type needs"


def _open(facts: Facts, path: str, kind: Kind) -> tuple[Statement, Peer]:
    """Verify one envelope. Raises CheckFailed `statement.*`, `verify.no_statement`, `verify.type`."""
    if path not in facts.raw.files:
        raise CheckFailed("verify.no_statement", f"{path} is missing.", "Ask for the whole bundle.")
    allowed = {p.fingerprint: p for p in facts.peers.values() if p.role == kind.role}
    statement = open_envelope(facts.raw.files[path], {f: p.certificate for f, p in allowed.items()})
    if statement.predicate_type != kind.predicate_type:
        raise CheckFailed("verify.type", "A statement is of another type than its name.", "Ask for the bundle again.")
    return statement, allowed[statement.signer]


def _subject_holds(facts: Facts, statement: Statement, predicate: Predicate) -> bool:
    """The in-toto subject is the document that the predicate names."""
    match predicate:
        case RoundSite():
            wanted = predicate.view or predicate.masked
        case Round():
            wanted = predicate.adapter_out or predicate.adapter_in
        case Closing():
            path = f"ledgers/{predicate.site}.jsonl"
            wanted = facts.raw.sha256(path) if path in facts.raw.files else ""
        case Release() | Evaluation():
            wanted = predicate.adapter
        case _:
            wanted = predicate.contract
    return {sha for _, sha in statement.subject} == {wanted}
