"""`fl-server run`: the embedded Fleet listener, one run, and what it leaves behind."""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate

from conf.settings import Settings
from fl_server.assemble import begun, check_folder, make_run, site_certificates
from fl_server.exchange import Exchange
from fl_server.finish import METRICS, finish, sealed
from fl_server.fleet import FleetServer
from fl_server.progress import Reporter
from fl_server.run import Result
from privacy.ca import verify_roster
from privacy.canonical import canonical
from privacy.contract import Contract, load_contract
from privacy.errors import ConsiloError, Unreachable, UsageError
from privacy.files import FileLayer, read_file
from privacy.identity import FileSigner, Role
from privacy.report import write_report
from privacy.trust import TrustStore
from privacy.trust_files import WatchedTrust

if TYPE_CHECKING:
    from fl_server.control import ControlServer


def serve(settings: Settings, *, plain: bool, resume: bool = False) -> dict[str, Any]:
    """Run the contract of `settings.server.contract`. Returns the metrics, which are also written to metrics.json.

    plain: progress goes to stderr as plain lines. resume: go on with the run in `settings.server.out` whose coordinator
    was killed. Raises Unreachable `run.sites_missing`, RoundVoid, Refused (`run.ended`, `run.other`), UsageError
    (`run.nothing`), CheckFailed `run.state`.
    """
    if not resume:
        check_folder(Path(settings.server.out))
    elif not begun(Path(settings.server.out)):
        raise UsageError("run.nothing", "There is no run to go on with in this folder.", "Use fl-server run.")
    warnings.simplefilter("ignore")  # of torch and transformers; ours are errors in tests
    server, start = settings.server, time.monotonic()
    certificates, keys, trust = Path(server.certificates), Path(server.keys), Path(server.certificates) / "trust"
    contract = load_contract(read_file(Path(server.contract)))
    if resume and sealed(Path(server.out)):
        return finish(contract, Path(server.out), ca=TrustStore.load(trust).fingerprint)
    signers, nodes = _cohort(contract, Path(server.roster), trust)
    crl = trust / "crl-site.pem"
    with Reporter(plain=plain) as report, FleetServer(
            host=server.host, port=server.port, certificate=certificates / "tls.pem", key=keys / "tls.key",
            trusted=[trust / "issuing-site.pem"], roster=nodes, crl=crl if crl.exists() else None,
            admits=_admits(WatchedTrust(trust, [Role.SITE]))) as fleet, \
            _control_plane(settings, contract) as control:
        exchange = Exchange(fleet.grid, fleet.nodes)
        run = make_run(settings, contract, exchange, signer=FileSigner(keys / "sign.key", certificates / "sign.pem"),
                       trust=trust, signature=read_file(Path(server.signature)), certificates=signers, progress=report)
        report.say(f"listening on {server.host}:{fleet.port} for {len(signers)} sites"
                   + (f", control plane on {control.port}" if control else ""))
        there = exchange.wait_online(list(signers), server.wait_s)
        if missing := sorted(set(signers) - there):
            raise Unreachable("run.sites_missing", f"Not online: {', '.join(missing)}.",
                              "Start their agents; nothing was trained or spent.")
        ready = time.monotonic()
        result = run.run()
    metrics = _metrics(contract, result, ready - start, time.monotonic() - start)
    folder = Path(server.out)
    FileLayer().write_atomic(folder / METRICS, canonical(metrics) + b"\n")
    write_report(folder / "evidence", folder, ca=TrustStore.load(trust).fingerprint)
    return metrics


def _cohort(contract: Contract, roster: Path, trust: Path) -> tuple[dict[str, Certificate], dict[str, bytes]]:
    """Of the contract's sites, by name: certificates to sign with, and PEM of those for TLS. The rest of a large roster is
    not kept."""
    entries = {e.name: e for e in verify_roster(read_file(roster), TrustStore.load(trust))}
    signers = site_certificates(contract, entries)
    return signers, {name: entries[name].tls.public_bytes(Encoding.PEM) for name in signers}


def _admits(trust: WatchedTrust) -> Callable[[Certificate], bool]:
    """Whether a site's TLS certificate holds at this moment; False too while the trust folder can't be read."""
    def check(certificate: Certificate) -> bool:
        try:
            trust.current().check(certificate, Role.SITE, usage="tls", at=datetime.now(UTC))
        except (ConsiloError, OSError):
            return False
        return True

    return check


@contextmanager
def _control_plane(settings: Settings, contract: Contract) -> Iterator[ControlServer | None]:
    """Beside the run, where a port is configured: roster, contract, approvals and, once it is sealed, the run's evidence."""
    server = settings.server
    if server.control_port is None:
        yield None
        return
    from fl_server.control import ControlServer
    from fl_server.control_store import ControlStore

    store, certificates = ControlStore(Path(server.store)), Path(server.certificates)
    FileLayer().write_atomic(store.root / "roster.json", read_file(Path(server.roster)))
    store.publish_contract(contract.digest, contract.to_bytes(), read_file(Path(server.signature)))
    store.publish_run(contract.run, Path(server.out))
    with ControlServer(store, certificate=certificates / "tls.pem", key=Path(server.keys) / "tls.key",
                       trust=certificates / "trust", host=server.host, port=server.control_port,
                       enrol_port=server.enrol_port) as control:
        yield control


def _metrics(contract: Contract, result: Result, ready_s: float, total_s: float) -> dict[str, Any]:
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    return {"run": contract.run, "contract": contract.digest, **result.metrics, "units": result.after.units,
            "rounds": result.rounds, "void": result.void, "epsilon": {name: float(e) for name, e in result.epsilon.items()},
            "epsilon_budget": contract.privacy.epsilon,
            "seconds": {"until_all_online": round(ready_s, 2), "total": round(total_s, 2),
                        **{k: round(v, 2) for k, v in result.seconds.items()}},
            "coordinator_cpu_s": round(cpu.ru_utime + cpu.ru_stime, 2), "coordinator_rss_mib": cpu.ru_maxrss // 1024}
