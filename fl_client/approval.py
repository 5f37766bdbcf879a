"""`fl-client approve`: what a contract means for this site in plain words, and the record that it was agreed to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from conf.settings import SiteSettings
from fl_client.policy import SitePolicy
from privacy.accountant import Release, epsilon, round_up
from privacy.contract import Contract
from privacy.errors import ConsiloError, Refused
from privacy.files import FileLayer, read_file
from privacy.identity import Signer
from privacy.ledger_chain import LedgerSummary, check_extract, split_lines
from privacy.ledger_file import begun
from privacy.signing import Approval, approval, check_approval

FOLDER = "approvals"


def describe(contract: Contract, site: str, policy: SitePolicy, *, engineer: str, ledger: LedgerSummary | None) -> str:
    """The contract as its approver should read it; one fact a line. engineer: who signed it."""
    return "\n".join(_lines(contract, site, policy, engineer, ledger))


def _lines(contract: Contract, site: str, policy: SitePolicy, engineer: str, ledger: LedgerSummary | None) -> Iterator[str]:
    own, p, s, n = contract.site(site), contract.privacy, contract.secagg, len(contract.sites)
    yield f"Contract {contract.digest}"
    yield f"  run           {contract.run}, until {contract.expires}"
    yield f"  purpose       {contract.purpose}"
    yield f"  signed by     {engineer} (engineer)"
    for who in contract.sign_off:
        yield f"  {who.body:<13} {who.who}: {who.reference}"
    if not contract.sign_off:
        yield "  sign-off      none is recorded in the contract"
    yield (f"  data          {contract.data.name!r}: {' and '.join(contract.data.fields)}; this site declares about "
           f"{own.n_decl} {p.unit}s (at least {contract.data.floor})")
    yield (f"  training      LoRA r={contract.lora.r} on {', '.join(contract.lora.targets)} of one base model "
           f"({contract.model.weights[:12]}...), rule {contract.rule.name}, {p.rounds} rounds and up to {p.retries} retries")
    yield from _privacy(contract, site, policy, ledger)
    if s.enabled:
        yield (f"  updates       hidden in sums of at least {s.survivors} of {n} sites; if {policy.colluding} of them "
               f"collude with the coordinator, still among {s.survivors - policy.colluding}")
    else:
        yield "  updates       NOT HIDDEN: the coordinator sees every update of this site"
    yield ("  leaves here   masked updates, signed statements and the ledger of this run; no record, no count, no error text"
           if s.enabled else "  leaves here   updates, signed statements and the ledger of this run; no record, no count")
    yield f"  made public   the trained adapter, and {', '.join(contract.metrics)} on a public split"
    yield f"  code          version {contract.code_version}, digest {contract.code[:12]}...: the same as installed here"


def _privacy(contract: Contract, site: str, policy: SitePolicy, ledger: LedgerSummary | None) -> Iterator[str]:
    own, p = contract.site(site), contract.privacy
    if p.epsilon is None:
        yield "  privacy       NONE: updates carry no noise; what the model learns of a record isn't bounded"
        return
    plans = [[Release(m.q, m.sigma, m.steps * rounds, m.group) for m, rounds in plan] for plan in contract.plans(site)]
    worst = max(round_up(epsilon(plan, own.delta)) for plan in plans)
    yield (f"  privacy       one {p.unit} changes what leaves by at most epsilon {worst} (the contract allows {p.epsilon}) "
           f"at delta {own.delta}, noise multiplier {own.sigma:.3f}")
    cap, spent = (ledger.cap, ledger.epsilon) if ledger else (policy.max_epsilon, "0.0")
    yield f"  budget        the data's cap is {cap}; earlier jobs spent {spent}; this one takes up to {worst}"


def summary(path: Path, signer: Signer) -> LedgerSummary | None:
    """The site's ledger, checked; None where no job has begun one. An agent may hold it."""
    data = read_file(path) if begun(path) else b""
    return check_extract(data[:split_lines(data)[1]], signer.certificate) if data else None


def approve(contract: Contract, site: str, policy: SitePolicy, signer: Signer, state: Path, *, approver: str,
            signature: bytes = b"") -> Path:
    """Write this site's signed approval, durably; an older one of the same contract is replaced.

    The contract stays beside it, and the engineer's signature file if given, for the site's own evidence.
    """
    folder = state / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    FileLayer().write_atomic(folder / f"{contract.digest}.contract.json", contract.to_bytes())
    if signature:
        FileLayer().write_atomic(folder / f"{contract.digest}.signature.json", signature)
    path = folder / f"{contract.digest}.json"
    FileLayer().write_atomic(path, approval(contract, site, policy=policy.digest, approver=approver, signer=signer))
    return path


def hand_in(site: SiteSettings, contract: Contract, path: Path) -> str | None:
    """Send the approval to the control plane. Returns the code of what went wrong: the approval holds all the same."""
    from fl_client.control import ControlClient

    try:
        ControlClient(site.control_url or "", Path(site.keys), Path(site.certificates),
                      proxy=site.proxy).approve(contract.digest, read_file(path))
    except ConsiloError as e:
        return e.code
    return None


def approved(contract: Contract, site: str, policy: SitePolicy, signer: Signer, state: Path) -> Approval:
    """Raises Refused `contract.not_approved`."""
    path = state / FOLDER / f"{contract.digest}.json"
    if not path.is_file():
        raise Refused("contract.not_approved", "Nobody has approved this contract at this site.",
                      "Read it with fl-client approve, and approve it if you agree.")
    return check_approval(read_file(path), contract, site, policy=policy.digest, signer=signer)
