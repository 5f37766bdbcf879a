"""`fl-client doctor`: everything that a site needs to run, each failure with its mend. Nothing of the data is shown."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from conf.settings import Settings
from fl_client.agent import LEDGER, Papers, find_tags, open_link, sandbox
from fl_client.approval import approved, summary
from fl_client.policy import load_policy
from fl_client.sandbox import ENFORCED, MENDS
from fl_client.supervisor import walls
from privacy import guard
from privacy.accountant import Release, epsilon, round_up
from privacy.errors import CheckFailed, ConsiloError, Refused
from privacy.files import FileLayer, read_file
from privacy.identity import FileSigner, Role, load_certificate, load_key, public_key
from privacy.ledger_chain import LedgerSummary
from privacy.trust import TrustStore

RENEW_DAYS = 14
FREE_BYTES = 2 * 2**30
DEVICE_S = 60.0


@dataclass(frozen=True)
class Finding:
    """One check. code and mend are "" where it is well."""

    name: str
    ok: bool
    detail: str
    code: str = ""
    mend: str = ""


class Doctor:
    """`examine` yields a finding for each check, in order; a check that needs an earlier one says so by its own failure."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._site = settings, settings.site
        self._state, self._trust = Path(settings.site.state), Path(settings.site.certificates) / "trust"

    def examine(self) -> Iterator[Finding]:
        checks: dict[str, Callable[[], str]] = {
            "install": self._install, "keys": self._keys, "certificates": self._certificates, "route": self._route,
            "disk": self._disk, "device": self._device, "sandbox": self._sandbox, "contract": self._contract,
            "model": self._model, "data": self._data, "budget": self._budget}
        for name, check in checks.items():
            try:
                yield Finding(name, True, check())
            except ConsiloError as e:
                yield Finding(name, False, e.cause, e.code, e.mend)
            except Exception as e:  # noqa: BLE001 - a text from below may hold what must not be shown
                yield Finding(name, False, f"The check itself failed ({type(e).__name__}).", "doctor.failed",
                              "Report it, with the version of consilo.")

    def _install(self) -> str:
        guard.check()
        return "the installed packages are this distribution's"

    def _keys(self) -> str:
        keys, certificates = Path(self._site.keys), Path(self._site.certificates)
        FileSigner(keys / "sign.key", certificates / "sign.pem")
        tls = load_certificate(read_file(certificates / "tls.pem"), "tls.pem")
        if load_key(keys / "tls.key").public_key() != public_key(tls):
            raise Refused("key.other", "tls.key and tls.pem don't belong together.", "Install both from one enrolment.")
        return "both keys are private to this user and belong to their certificates"

    def _certificates(self) -> str:
        now, certificates = datetime.now(UTC), Path(self._site.certificates)
        trust = TrustStore.load(self._trust)
        trust.require_revocation_list(Role.SITE)
        left = []
        for name, usage in (("tls.pem", "tls"), ("sign.pem", "signing")):
            cert = load_certificate(read_file(certificates / name), name)
            trust.check(cert, Role.SITE, usage=usage, at=now)  # type: ignore[arg-type]
            left.append(cert.not_valid_after_utc - now)
        if min(left) < timedelta(days=RENEW_DAYS):
            raise CheckFailed("doctor.expiring", f"A certificate expires in {min(left).days} days.", "Run fl-client renew.")
        return f"valid for {min(left).days} days, in the role site, not revoked; revocation list at hand"

    def _route(self) -> str:
        if _held(self._state / "rounds.jsonl"):
            return "not tried: the agent is running, and would be cut off for a moment"
        start = time.monotonic()
        with open_link(self._site) as link:
            link.connect()  # signs the time too: a wrong clock is refused
        return f"the coordinator accepts this site's certificate and clock ({time.monotonic() - start:.2f} s)"

    def _disk(self) -> str:
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        free, probe = shutil.disk_usage(self._state).free, self._state / ".doctor"
        if free < FREE_BYTES:
            raise CheckFailed("doctor.disk", f"{free // 2**20} MiB are free for the site's state.",
                              f"Free at least {FREE_BYTES // 2**20} MiB.")
        try:
            FileLayer().write_atomic(probe, b"written and synced")
        except OSError as e:
            raise CheckFailed("doctor.disk", f"The state folder can't be written ({e.strerror}).",
                              "Give the agent's user write permission, on a disk of this machine.") from e
        finally:
            with suppress(OSError):
                probe.unlink()
        return f"state can be written and synced; {free // 2**30} GiB free"

    def _device(self) -> str:
        code = "import torch; print(torch.__version__, 'CUDA' if torch.cuda.is_available() else 'CPU')"
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=DEVICE_S,
                              check=False)
        if done.returncode:
            raise CheckFailed("doctor.device", "torch can't be imported here.", "Install consilo[site] again.")
        if self._site.device == "cuda" and "CUDA" not in done.stdout:
            raise CheckFailed("doctor.device", "site.device is cuda, and torch can't use a CUDA device here.",
                              "Set site.device=cpu, or install a driver and a torch build with CUDA.")
        return f"torch {done.stdout.strip()}, {os.cpu_count()} processors"

    def _sandbox(self) -> str:
        held = walls(sandbox(self._site, load_policy(Path(self._site.policy))))
        missing = {name: why for name, why in held.items() if why != ENFORCED}
        if missing:
            raise CheckFailed("doctor.sandbox", "Not enforced by the operating system: "
                              + ", ".join(f"{name} ({why})" for name, why in missing.items()) + ".",
                              " ".join(dict.fromkeys(MENDS[why] for why in missing.values())))
        return f"enforced by the operating system: {', '.join(held)}"

    def _contract(self) -> str:
        papers = Papers.load(self._site, record=False)
        got = approved(papers.contract, self._site.name, papers.policy, papers.signer, self._state)
        return (f"signed by {papers.engineer.name}, within the policy, approved by {got.approver}, "
                f"until {papers.contract.expires}")

    def _model(self) -> str:
        from strategies.folder import check_folder

        check_folder(Path(self._settings.model.path), Papers.load(self._site, record=False).contract.model)
        return "weights, tokenizer and chat template are the contract's"

    def _data(self) -> str:
        from privacy.population import Population
        from strategies.examples import open_examples

        contract, site = Papers.load(self._site, record=False).contract, self._site
        records = open_examples(Path(site.data), contract, text=site.text, label=site.label,
                                person=site.person if contract.privacy.unit == "person" else None)
        units = Population(len(records), contract.mechanism(site.name), owners=records.owners, lineage="",
                           contents=records.contents).units
        if units < contract.data.floor:
            raise Refused("data.floor", "The site has fewer units than the contract's floor.",
                          "Take no part in this contract, or ask for a lower floor.")
        find_tags(contract, site)
        return "readable, of the contract's fields, and not under its floor"

    def _budget(self) -> str:
        papers = Papers.load(self._site, record=False)
        contract, own = papers.contract, papers.contract.site(self._site.name)
        if contract.privacy.epsilon is None:
            return "none is needed: the contract is NON-PRIVATE"
        ledger = summary(self._state / LEDGER, papers.signer)
        held = _spent(ledger, contract.run)
        worst = max(round_up(epsilon([*held, *(Release(m.q, m.sigma, m.steps * n, m.group) for m, n in plan)], own.delta))
                    for plan in contract.plans(self._site.name))
        cap = ledger.cap if ledger else papers.policy.max_epsilon
        if worst > cap:
            raise Refused("budget.exhausted", f"With this job the data's epsilon would reach {worst}; the cap is {cap}.",
                          "Ask for a smaller job; the cap is the site's own decision.")
        return f"with this job the data's epsilon stays at most {worst} of {cap}"


def _spent(ledger: LedgerSummary | None, run: str) -> list[Release]:
    """What other runs have reserved; this one is counted by its whole schedule."""
    return [r.release for r in ledger.reserves if r.run != run] if ledger else []


def _held(path: Path) -> bool:
    """Whether another process holds the lease of a file."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False

