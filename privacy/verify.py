"""Offline verification of a run bundle: needs no network, torch, Flower or hydra, and trusts one number from outside.

The rules, in order. Each is checked even if an earlier one failed; every finding is listed.

 0. files         The folder holds the files of the format only: no links, no strange names, sizes within limits.
 1. anchor        The root certificate is the one whose SHA-256 the reader got from the consortium (--ca). Without it
                  the best verdict is UNANCHORED: the bundle agrees with itself, and that is all.
 2. certificates  Root -> issuing CA of a role -> leaf. Sites, one coordinator, one engineer; nothing else.
 3. manifest      Signed by the coordinator. Every file is listed with its digest; none is missing, none is extra.
 4. statements    Each is signed by a certificate of the role that its type needs, under its signer's own name, about
                  the subject that it names; numbered without a gap.
 5. contract      Its digest is in every statement. The engineer signed it once, with its purpose and expiry. Its sites
                  and their certificates are those of the bundle. Each site accepted it, with the code that it names
                  installed, and approved it before it expired. Its threshold and least sum hide a site from a
                  coordinator with one accomplice.
 6. inclusion     The coordinator's log holds the statements of this run and no other of it, in their order.
 7. consistency   Every signed head is that of a beginning of this one log; the last covers all of it.
 8. witnesses     All rounds lie under a head that so many sites signed that no other history can have as many, unless
                  two of them lie. Where a site vanished at the end, the last round may not, and that is said.
 9. rounds        Numbered without a gap; each starts from the adapter that the one before left; void attempts are
                  numbered; only the last round may lack a result. All who signed trained with the contract's
                  mechanism and saw the same cohort. No sum is over fewer sites than the contract allows; each site in
                  it signed its own vector, at least a threshold of them voted for exactly these vectors, and every
                  other site is named with the stage at which it dropped out.
10. ledgers       Each site's hash chain and signatures hold; it is the extract that the site's closing statement
                  names; every attempt that the site signed was reserved, with the contract's mechanism.
11. epsilon       Recomputed from the reserves of each site: nowhere may a claim be below it, or above the cap.
12. release       The released adapter is the one that the last round left; the metric is one that the contract names,
                  and was stated before as an evaluation of that adapter.

With trust=none there is no ledger and no epsilon: a claim of one fails. What a signature can't prove: that the noise
was really drawn, that a certificate had not been revoked (sites check that while the run goes on), and when something
happened: the time of an approval is what the site says.

Hostile input never raises: an error inside a step is a finding with the error's code. Findings quote nothing that
isn't verified.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from privacy.bundle import RawBundle, read_bundle
from privacy.errors import CheckFailed, ConsiloError, UsageError
from privacy.site_bundle import is_site_bundle, read_site_bundle
from privacy.verify_contract import contract
from privacy.verify_log import consistency, inclusion, witnesses
from privacy.verify_run import epsilons, ledgers, release, rounds
from privacy.verify_site import STEPS as SITE_STEPS
from privacy.verify_site import SiteFacts
from privacy.verify_trust import Facts, Findings, anchor, certificates, manifest, statements

MAX_FINDINGS = 12  # of one step that are spelled out; the rest is counted
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")

Steps = tuple[tuple[str, Callable[[Any, Findings], str]], ...]
STEPS: Steps = (
    ("anchor", anchor), ("certificates", certificates), ("manifest", manifest), ("statements", statements),
    ("contract", contract), ("inclusion", inclusion), ("consistency", consistency), ("witnesses", witnesses),
    ("rounds", rounds), ("ledgers", ledgers), ("epsilon", epsilons), ("release", release),
)


@dataclass(frozen=True)
class Step:
    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """PASS: every step holds, anchored. FAIL: a step doesn't hold. UNANCHORED: all hold, but no fingerprint given."""

    verdict: Literal["PASS", "FAIL", "UNANCHORED"]
    anchored: bool
    steps: tuple[Step, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "anchored": self.anchored,
                "steps": [{"name": s.name, "ok": s.ok, "detail": s.detail} for s in self.steps]}


def verify_bundle(path: Path, ca: str | None = None) -> Verdict:
    """Check the folder of a run bundle, or of a site bundle (`privacy.verify_site`). ca: SHA-256 of the root certificate's
    DER in hex, from outside the bundle.

    Raises UsageError `bundle.missing` (no such folder) and `verify.fingerprint` (not 64 hex digits); anything wrong
    inside the bundle is a FAIL.
    """
    if is_site_bundle(path):
        return _verdict("site", lambda: SiteFacts(read_site_bundle(path), _fingerprint(ca)), SITE_STEPS)[0]
    return examine(path, ca)[0]


def examine(path: Path, ca: str | None = None) -> tuple[Verdict, Facts]:
    """A run bundle's verdict, with the verified facts for a report. Raises as `verify_bundle` does."""
    return _verdict("run", lambda: Facts(read_bundle(path), _fingerprint(ca)), STEPS)


def _fingerprint(ca: str | None) -> str | None:
    if ca is None:
        return None
    ca = ca.strip().replace(":", "").lower()
    if not _FINGERPRINT.fullmatch(ca):
        raise UsageError("verify.fingerprint", "The fingerprint is not 64 hex digits.",
                         "Take it from ca.sha256, which the consortium's CA gave you.")
    return ca


def _verdict(kind: str, read: Callable[[], Facts], checks: Steps) -> tuple[Verdict, Facts]:
    try:
        facts = read()
        steps = [Step("files", True, f"a {kind} bundle: {len(facts.raw.files)} files of the format, within limits")]
    except CheckFailed as e:
        steps = [Step("files", False, f"{e.cause} ({e.code})")]
        steps += [Step(name, False, "not checked: the folder was refused") for name, _ in checks]
        return Verdict("FAIL", False, tuple(steps)), Facts(RawBundle({}), None)
    steps += [_run(name, check, facts) for name, check in checks]
    anchored = facts.ca is not None and steps[1].ok
    if not all(step.ok for step in steps):
        return Verdict("FAIL", anchored, tuple(steps)), facts
    return Verdict("PASS" if anchored else "UNANCHORED", anchored, tuple(steps)), facts


def _run(name: str, check: Callable[[Any, Findings], str], facts: Facts) -> Step:
    """One step. The broad except is the boundary to hostile input: whatever it provokes is a finding."""
    found = Findings()
    detail = ""
    try:
        detail = check(facts, found)
    except ConsiloError as e:
        found.append(f"refused ({e.code})")
    except Exception as e:  # noqa: BLE001
        found.append(f"refused (verify.{type(e).__name__})")
    if not found:
        return Step(name, True, detail)
    more = [f"and {len(found) - MAX_FINDINGS} more"] if len(found) > MAX_FINDINGS else []
    return Step(name, False, "; ".join([*found[:MAX_FINDINGS], *more]))
