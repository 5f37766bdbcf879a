"""Verification, rules on the transparency log: nothing is left out, nothing was changed afterwards, sites saw the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from cryptography.x509 import Certificate

from privacy.bundle import statement_name
from privacy.canonical import canonical, parse
from privacy.contract import validate
from privacy.errors import CheckFailed, ConsiloError
from privacy.identity import Role
from privacy.predicates import Count, Round, Strict
from privacy.transparency import Entry, Frontier, Head, least_witnesses, open_checkpoint, open_witness
from privacy.verify_trust import Facts, Findings

_LINE = re.compile(r"([0-9a-f]{32}) ([0-9a-f]{64})")
_HEX = re.compile(r"[0-9a-f]{64}")


class _Before(Strict):
    size: Count
    peaks: list[str]


class _Signed(Strict):
    checkpoint: str
    witnesses: dict[str, str]


def inclusion(facts: Facts, found: Findings) -> str:
    """The entries of this run are its statements, all of them, in their order."""
    run = facts.agreed().run
    logged = [e.sha256 for e in _entries(facts) if e.run == run]
    there = [facts.raw.sha256(path) for path in facts.raw.files if statement_name(path)]
    found.expect(len(set(logged)) == len(logged), "the log holds a statement of this run twice")
    found.expect(set(there) <= set(logged), "there is a statement that the log doesn't hold")
    if found.expect(set(logged) <= set(there), "a statement of this run that the log holds is missing"):
        found.expect(logged == there, "the statements are not in the order of the log")
    others = len(_entries(facts)) - len(logged)
    return (f"the log holds exactly these {len(there)} statements of the run"
            + (f"; {others} of other runs, made meanwhile, as commitments" if others else ""))


def consistency(facts: Facts, found: Findings) -> str:
    """Each signed head is that of a beginning of one log; the last one covers all of it."""
    coordinators = {p.fingerprint: p for p in facts.peers.values() if p.role is Role.COORDINATOR}
    certificates = {f: p.certificate for f, p in coordinators.items()}
    before, entries = _before(facts), _entries(facts)
    signed, heads = dict(_signed(facts, found)), {}
    for size, each in signed.items():
        try:
            heads[size] = open_checkpoint(each.checkpoint.encode(), certificates)
        except ConsiloError as e:
            found.append(f"the signed head of {size} entries is refused ({e.code})")
            continue
        names = {p.name for p in coordinators.values()}
        found.expect(heads[size].log in names and heads[size].size == size,
                     f"the signed head of {size} entries is of another log or size")
    tree = Frontier(before.size, list(before.peaks))
    for entry in [None, *entries]:
        if entry is not None:
            tree.append(entry.leaf)
        if tree.size in heads:
            found.expect(heads[tree.size].root == tree.root.hex(),
                         f"the signed head of {tree.size} entries is not that of this log: there is another history")
            facts.heads[tree.size] = heads[tree.size]
    found.expect(heads.keys() == facts.heads.keys(), "there is a signed head of more or fewer entries than the log has")
    found.expect(tree.size in heads, "no signed head covers the whole log")
    return f"{len(heads)} signed heads, each of a beginning of one log of {tree.size} entries"


def witnesses(facts: Facts, found: Findings) -> str:
    """Every round that changed the adapter lies under a head that enough sites signed, each under its own name; but for
    the last one, after which a site may have vanished: then it says so."""
    agreed = facts.agreed()
    certificates = {p.name: {p.fingerprint: p.certificate} for p in facts.peers.values() if p.role is Role.SITE}
    signers = {size: _signers(size, each, certificates, facts.heads.get(size), found)
               for size, each in _signed(facts, Findings())}
    last, least = max(signers, default=0), least_witnesses(len(agreed.sites))
    covered = max((size for size, names in signers.items() if len(names) >= least), default=0)
    place = {entry.sha256: i for i, entry in enumerate(_entries(facts), _before(facts).size + 1)}
    rounds = [e.path for e in facts.events if isinstance(e.predicate, Round) and e.predicate.outcome == "done"]
    bare = [path for path in rounds if place.get(facts.raw.sha256(path), last + 1) > covered]
    found.expect(bool(covered) and bare in ([], rounds[-1:]),
                 f"a round lies under no head that {least} sites signed: two histories can't be told apart")
    facts.witnesses = signers.get(last, set())
    later = "" if covered == last else (
        f"; {'THE LAST ROUND AND ' if bare else ''}what came later (entries {covered + 1} to {last}) only "
        f"{len(facts.witnesses)} sites signed")
    names = ", ".join(sorted(signers.get(covered, ())))
    return f"{len(signers.get(covered, ()))} of {len(agreed.sites)} sites signed the log: {names}{later}"


def _signers(size: int, each: _Signed, certificates: Mapping[str, Mapping[str, Certificate]], head: Head | None,
             found: Findings) -> set[str]:
    names = set[str]()
    if head is None:
        return names  # `consistency` has said why
    for name, data in each.witnesses.items():
        try:
            said = open_witness(data.encode(), certificates.get(name, {}))
        except ConsiloError as e:
            found.append(f"a witness of the head of {size} entries is refused ({e.code})")
            continue
        same = (said.log, said.size, said.root) == (head.log, head.size, head.root)
        if found.expect(same and said.site == name,
                        f"a witness of the head of {size} entries signed another head, or for another site"):
            names.add(name)
    return names


def _before(facts: Facts) -> Frontier:
    value = validate(_Before, parse(facts.raw.files.get("log/before.json", b"")))
    if not all(_HEX.fullmatch(peak) for peak in value.peaks):
        raise _broken()
    frontier = Frontier(value.size, [bytes.fromhex(peak) for peak in value.peaks])
    if not frontier.holds_together() or canonical(value.model_dump()) != facts.raw.files["log/before.json"]:
        raise _broken()
    return frontier


def _entries(facts: Facts) -> list[Entry]:
    if facts.entries is None:
        lines = facts.raw.files.get("log/entries.txt", b"").decode("ascii", "replace").split("\n")
        found = [_LINE.fullmatch(line) for line in lines[:-1]]
        if lines[-1] or not all(found):
            raise _broken()
        facts.entries = [Entry(m[1], m[2]) for m in found if m]
    return facts.entries


def _signed(facts: Facts, found: Findings) -> Iterator[tuple[int, _Signed]]:
    """The files of signed heads, by size, in order."""
    for path, data in facts.raw.files.items():
        if not path.startswith("log/") or path in ("log/before.json", "log/entries.txt"):
            continue
        try:
            value = validate(_Signed, parse(data))
            if canonical(value.model_dump()) != data:
                raise _broken()
        except ConsiloError as e:
            found.append(f"{path} is refused ({e.code})")
            continue
        yield int(path[4:12]), value


def _broken() -> CheckFailed:
    return CheckFailed("log.form", "A file of the log isn't of the documented form.", "Ask for the bundle again.")
