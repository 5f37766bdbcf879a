"""Offline verification of a site bundle: one lineage of a site in full, epsilon over all its jobs recomputed.

The rules, in order; each is checked even if an earlier one failed.

 anchor        The root certificate is the one that --ca names (see `privacy.verify`).
 certificates  Root -> issuing CAs; the site's own certificate, as a site's, and those of the same key before a renewal.
 manifest      Signed by the site; every file is listed with its digest, none is missing, none is extra.
 ledger        The whole chain with all signatures, nothing hidden behind commitments.
 contracts     Every job on the ledger has its contract here, signed by an engineer and approved at this site; every round
               was charged with that contract's mechanism.
 statements    Each is the site's own; every statement on a round was charged, and names a head that the ledger holds.
 epsilon       Recomputed over all reserves of the lineage: no record claims less, none is above the cap.
 witness       The log's last heads that this site saw are signed by coordinators, and none contradicts another.

It can't show that a ledger is the newest one (others hold a later head of it), nor that the noise was drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cryptography.x509 import Certificate

from privacy.accountant import epsilon
from privacy.canonical import parse
from privacy.contract import Contract, load_contract, validate
from privacy.errors import CheckFailed, ConsiloError
from privacy.identity import Peer, Role, load_certificate
from privacy.ledger import LedgerSummary, check_extract
from privacy.ledger_records import charge
from privacy.predicates import KINDS, RoundSite
from privacy.signing import read_approval, read_signature, signers_certificate
from privacy.site_bundle import MANIFEST_TYPE, MARK, SiteManifest
from privacy.statements import open_envelope
from privacy.transparency import open_checkpoint
from privacy.verify_run import MAX_PREFIXES, ULP
from privacy.verify_trust import Facts, Findings, anchor, check_listed, peer_of


@dataclass
class SiteFacts(Facts):
    """Beside those of a run: the site, its certificates by fingerprint, its ledger, and its contracts by digest."""

    site: Peer | None = None
    names: dict[str, Certificate] = field(default_factory=dict)
    ledger: LedgerSummary | None = None
    contracts: dict[str, Contract] = field(default_factory=dict)

    def own(self) -> Peer:
        """Raises CheckFailed `verify.no_site`."""
        if self.site is None:
            raise CheckFailed("verify.no_site", "There is no site to check against.", "See the certificates step.")
        return self.site

    def book(self) -> LedgerSummary:
        """Raises CheckFailed `verify.no_ledger`."""
        if self.ledger is None:
            raise CheckFailed("verify.no_ledger", "There is no valid ledger.", "See the ledger step.")
        return self.ledger


def certificates(facts: SiteFacts, found: Findings) -> str:
    if facts.trust is None:
        raise CheckFailed("verify.no_root", "There is no root to check against.", "See the anchor step.")
    own = {n: pem for n, pem in facts.raw.under("certificates").items() if n != "root" and not n.startswith("issuing-")}
    if found.expect(len(own) == 1, "there is not exactly one site's certificate"):
        (name, pem), = own.items()
        peer = peer_of(facts.trust, load_certificate(pem), Role.SITE)
        if found.expect(peer.name == name, "the certificate stands under another name than its own"):
            facts.site = peer
            facts.names = {peer.fingerprint: peer.certificate, **_earlier(facts, peer)}
    return f"{facts.own().name} of {facts.own().organisation}, under the CA of sites"


def _earlier(facts: SiteFacts, own: Peer) -> dict[str, Certificate]:
    """Certificates that renewals replaced, as the approvals show them: of the same name and key."""
    found = {}
    for path, data in facts.raw.files.items():
        with suppress(ConsiloError):  # `contracts` says what is wrong with it
            if path.endswith(".approval.json"):
                peer = peer_of(facts.trust, signers_certificate(data), Role.SITE)
                if (peer.name, peer.certificate.public_key()) == (own.name, own.certificate.public_key()):
                    found[peer.fingerprint] = peer.certificate
    return found


def manifest(facts: SiteFacts, found: Findings) -> str:
    own = facts.own()
    said = open_envelope(facts.raw.files.get("manifest.json", b""), {own.fingerprint: own.certificate})
    listed = validate(SiteManifest, said.predicate)
    found.expect(said.predicate_type == MANIFEST_TYPE and listed.site == own.name,
                 "the manifest is of another kind, or of another site")
    check_listed(facts.raw, listed.files, found)
    return f"signed by the site; {len(listed.files)} files are listed and unchanged"


def ledger(facts: SiteFacts, found: Findings) -> str:
    book = check_extract(facts.raw.files.get(MARK, b""), facts.own().certificate)
    found.expect(book.commitments == 0, "records are hidden behind commitments")
    facts.ledger = book
    return (f"lineage {book.lineage[:12]}...: {book.head.seq + 1} records, {len({r.run for r in book.reserves})} jobs with "
            f"{len(book.reserves)} charges, {len(book.refusals)} refusals, {len(book.registrations)} registrations")


def contracts(facts: SiteFacts, found: Findings) -> str:
    own, book = facts.own(), facts.book()
    files = {path[10:-5]: data for path, data in facts.raw.files.items() if path.startswith("contracts/")}
    for name, data in files.items():
        if "." in name:
            continue
        agreed = load_contract(data)
        short = name[:12]
        if not found.expect(agreed.digest == name and agreed.to_bytes() == data,
                            f"contract {short} stands under another digest than its own"):
            continue
        facts.contracts[name] = agreed
        try:
            read_approval(files.get(f"{name}.approval", b""), agreed, own.name, facts.names)
            read_signature(files.get(f"{name}.signature", b""), agreed, lambda c: peer_of(facts.trust, c, Role.ENGINEER))
        except ConsiloError as e:
            found.append(f"contract {short}: signature or approval is refused ({e.code})")
    for r in book.reserves:
        agreed_on = facts.contracts.get(r.contract)
        if found.expect(agreed_on is not None, f"record {r.seq} is of a contract that isn't here") and agreed_on:
            found.expect(r.run == agreed_on.run and r.charge == charge(agreed_on.mechanism(own.name, r.round)),
                         f"record {r.seq} reserved another mechanism than its contract's")
    return f"{len(facts.contracts)} contracts, each signed by an engineer and approved here"


def statements(facts: SiteFacts, found: Findings) -> str:
    own, book = facts.own(), facts.book()
    hashes = [parse(line)["hash"] for line in facts.raw.files[MARK].splitlines()]
    charged = {(r.run, r.round, r.attempt): r.seq for r in book.reserves}
    count = 0
    for path, data in facts.raw.under("statements").items():
        kind = KINDS[path[7:]]
        said = open_envelope(data, facts.names)
        predicate: Any = validate(kind.model, said.predicate)
        count += 1
        found.expect(said.predicate_type == kind.predicate_type and kind.role == "site" and predicate.site == own.name,
                     f"statement {path[:6]} is of another kind, or speaks for another site")
        if isinstance(predicate, RoundSite) and predicate.lineage:
            where = f"statement {path[:6]} on round {predicate.round}, attempt {predicate.attempt}"
            found.expect(predicate.lineage == book.lineage, f"{where} is of another lineage")
            found.expect((predicate.run, predicate.round, predicate.attempt) in charged, f"{where} was never charged")
            found.expect(predicate.ledger_seq < len(hashes) and hashes[predicate.ledger_seq] == predicate.ledger_head,
                         f"{where} names a head that the ledger doesn't hold")
    return f"{count} statements, each the site's own and charged"


def epsilons(facts: SiteFacts, found: Findings) -> str:
    book = facts.book()
    stride = max(1, len(book.reserves) // MAX_PREFIXES)
    for last in book.reserves[::-stride]:
        spent = epsilon([r.release for r in book.reserves if r.seq <= last.seq], book.delta)
        found.expect(float(last.epsilon) >= spent - ULP,
                     f"record {last.seq} claims less epsilon than was spent until then")
        found.expect(max(float(last.epsilon), spent - ULP) <= book.cap, f"record {last.seq} is above the cap")
    return f"recomputed over the whole lineage: {book.epsilon} of {book.cap:g} at delta {book.delta:g}"


def witness(facts: SiteFacts, found: Findings) -> str:
    found.expect("witness/witness-conflict.json" not in facts.raw.files,
                 "this site holds a proof of a changed history: a coordinator's two heads, or its own older ledger")
    heads = parse(facts.raw.files["witness/witness.json"]) if "witness/witness.json" in facts.raw.files else {}
    try:
        seen = [(log, kept["certificate"].encode(), kept["checkpoint"].encode(), kept["head"])
                for log, kept in sorted(heads.items())]
    except (AttributeError, KeyError, TypeError) as e:
        raise CheckFailed("bundle.layout", "witness.json isn't of the documented form.", "Export the bundle again.") from e
    names = []
    for log, certificate, checkpoint, claimed in seen:
        signer = peer_of(facts.trust, load_certificate(certificate), Role.COORDINATOR)
        head = open_checkpoint(checkpoint, {signer.fingerprint: signer.certificate})
        found.expect((head.log, signer.name) == (log, log) and head.model_dump() == claimed,
                     "a head that the site saw is of another log, or isn't what was signed")
        names.append(f"{signer.name} at {head.size} entries")
    return f"last heads seen: {', '.join(names) or 'none'}"


STEPS: tuple[tuple[str, Callable[[Any, Findings], str]], ...] = (
    ("anchor", anchor), ("certificates", certificates), ("manifest", manifest), ("ledger", ledger),
    ("contracts", contracts), ("statements", statements), ("epsilon", epsilons), ("witness", witness),
)
