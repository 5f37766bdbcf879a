"""`fl-simulate bench scale`: what the coordinator needs as sites join: resident memory and CPU, of a process of its own.

That process is the product's coordinator (Exchange, RoundDriver) with secure aggregation. The sites (SiteRound, journals)
are in another one, without a model: an update is drawn. Between them is a pipe, over which one reply comes at a time, or,
with `network`, all of FleetServer and one FleetLink a site, over mutual TLS on loopback. More than GROUP sites are summed
in groups, one after the other. docs/benchmarks.md documents every field.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding as CertificateEncoding

from fl_client.approval import approve, approved
from fl_client.frames import Peer
from fl_client.journal import SiteJournal
from fl_client.link import FleetLink, build_app
from fl_client.link_tls import coordinator_check
from fl_client.policy import accept
from fl_client.round import SiteRound
from fl_client.witness import Witness
from fl_server.assemble import site_certificates
from fl_server.attempt import Deadlines
from fl_server.exchange import Exchange
from fl_server.fleet import FleetServer
from fl_server.round import RoundDriver
from privacy import __version__, ca
from privacy.canonical import canonical
from privacy.contract import Contract, load_contract
from privacy.errors import Unreachable
from privacy.files import FileLayer, read_file
from privacy.identity import FileSigner, Role
from privacy.secagg.encoding import Encoding
from privacy.secagg.peers import certificate_check
from privacy.secagg.transcript import least_threshold
from privacy.signing import code_digest
from privacy.trust import TrustStore
from simulations.bench import environment, finished, process
from simulations.bench_memory import resident
from simulations.bench_round import COORDINATOR, POLICY, RANGE, UPDATE, Drawn, consortium
from simulations.bench_scale_pipe import PipeGrid, answer
from strategies.adapter import Tensors

BASELINE, GROUP, ROUNDS = 8, 64, 2
RATIO = 1.2  # goal: peak memory to that with BASELINE sites
WAIT_S = 600.0
MODULE = "simulations.bench_scale"


def run(*, sites: int, dim: int, network: bool = False) -> dict[str, Any]:
    """All figures of docs/benchmarks.md, `bench scale`. Raises Unreachable `bench.process` where a process fails."""
    at_start = environment("numpy", "cryptography", "flwr")
    at = {n: measured(n, dim, network) for n in sorted({min(BASELINE, sites), sites})}
    own, base = at[sites], at[min(BASELINE, sites)]
    peak, least = own["peak_bytes"], base["peak_bytes"]
    ratio = None if peak is None or least is None else peak / least
    found = {"bench": "scale", "sites": sites, "dim": dim, "network": network, "rounds": ROUNDS,
             "groups": len(groups(sites)), "dtype": "uint32", "environment": at_start,
             "peak_rss_mib": None if peak is None else peak / 2**20, "cpu_s_per_site": own["cpu_s"] / sites / ROUNDS,
             "wall_s": own["wall_s"] / ROUNDS, "exact": own["exact"],
             "baseline": {"sites": min(BASELINE, sites), "peak_rss_mib": None if least is None else least / 2**20,
                          "cpu_s_per_site": base["cpu_s"] / min(BASELINE, sites) / ROUNDS},
             "ratio_baseline": ratio, "samples": at}
    if ratio is not None:
        found["goals"] = {"ratio_baseline": {"value": ratio, "limit": RATIO, "met": ratio <= RATIO}}
    return found


def groups(sites: int) -> list[range]:
    """As few as hold at most GROUP sites each, of about the same size."""
    count = -(-sites // GROUP)
    return [range(a, b) for a, b in pairwise(i * sites // count for i in range(count + 1))]


def render(found: dict[str, Any]) -> str:
    """The same for people."""
    own, base, ratio = found["peak_rss_mib"], found["baseline"], found["ratio_baseline"]
    memory = "unknown: this isn't Linux" if ratio is None else (
        f"{own:.1f} MiB; {base['peak_rss_mib']:.1f} MiB with {base['sites']} sites: ratio {ratio:.3f} (goal {RATIO})")
    return "\n".join((
        f"{found['sites']} sites in {found['groups']} group(s), {found['dim']} values, {found['rounds']} rounds, "
        f"{'mutual TLS on loopback' if found['network'] else 'a pipe'}",
        f"means right: {'yes' if found['exact'] else 'NO'}", f"coordinator, peak resident memory: {memory}",
        f"coordinator, CPU ms a site and round: {1e3 * found['cpu_s_per_site']:.2f}"))


def measured(sites: int, dim: int, network: bool) -> dict[str, Any]:
    """Of a coordinator process: peak and idle bytes (None where the kernel doesn't tell), CPU and wall seconds of ROUNDS
    rounds, and whether every mean is right. Raises Unreachable `bench.process`."""
    with tempfile.TemporaryDirectory(prefix="consilo-") as name:
        folder, names = Path(name), [f"site-{i:04d}" for i in range(sites)]
        roster = consortium(folder, names)
        for i, members in enumerate(groups(sites)):
            _write_contract(folder / f"group-{i}.json", i, {names[k]: roster[names[k]].sign_fingerprint for k in members})
        found = finished(MODULE, "coordinate", str(folder), len(groups(sites)), dim, network)
        return found | {"exact": all(_exact(folder, i) for i in range(len(groups(sites))))}


def coordinate(folder: Path, count: int, dim: int, network: bool) -> None:
    """The coordinator process. What was measured goes to stdout, each group's last mean to a file."""
    trust, cpu, wall = folder / "ca", 0.0, 0.0
    check = certificate_check(TrustStore.load(trust))
    with _fleet(folder, _roster(trust)) if network else nullcontext() as fleet:
        idle = resident("VmRSS")
        for i in range(count):
            contract = load_contract(read_file(folder / f"group-{i}.json"))
            names = [site.name for site in contract.sites]
            with process(MODULE, "serve", str(folder), i, fleet.port if fleet else 0, dim) as sites:
                exchange = Exchange(fleet.grid, fleet.nodes) if fleet else _piped(sites, names)
                if missing := set(names) - exchange.wait_online(names, WAIT_S):
                    raise Unreachable("run.sites_missing", f"{len(missing)} sites aren't online.", "Their errors are above.")
                driver = RoundDriver(contract, Drawn(0, dim).spec, exchange, deadlines=Deadlines(WAIT_S, WAIT_S),
                                     check_certificate=check, certificates=site_certificates(contract, _roster(trust)))
                started, began = time.process_time(), time.perf_counter()
                for no in range(1, ROUNDS + 1):
                    done = driver.attempt(no, 0, _adapter(dim, no))
                cpu, wall = cpu + time.process_time() - started, wall + time.perf_counter() - began
            done.change[UPDATE].tofile(folder / f"mean-{i}")
        peak = resident("VmHWM")
    sys.stdout.write(json.dumps({"peak_bytes": peak, "idle_bytes": idle, "cpu_s": cpu, "wall_s": wall}))


def _roster(trust: Path) -> dict[str, ca.RosterEntry]:
    return {e.name: e for e in ca.verify_roster(ca.roster(trust), TrustStore.load(trust)) if e.role is Role.SITE}


def serve(folder: Path, group: int, port: int, dim: int) -> None:
    """The process of a group's sites, until stdin ends: an agent in each thread, or with port 0 all behind the pipe."""
    contract, apps = load_contract(read_file(folder / f"group-{group}.json")), dict[int, Any]()
    peer = Peer(os.dup(0), os.dup(1)) if not port else None
    os.dup2(2, 1)  # whatever a library prints isn't a frame
    for node, site in enumerate(contract.sites, 1):
        apps[node] = build_app(_site(folder, contract, site.name, dim).handlers())
    if peer:
        answer(peer, apps)
        return
    stop, trust = threading.Event(), folder / "ca"
    for node, site in enumerate(contract.sites, 1):
        link = FleetLink(f"https://localhost:{port}", trust / "issued" / site.name / "tls.pem",
                         folder / "keys" / site.name / "tls.key", trust / "issuing-coordinator.pem",
                         check=coordinator_check(trust))
        threading.Thread(target=link.run, args=(apps[node], None, stop), daemon=True).start()
    sys.stdin.read()
    stop.set()


def _site(folder: Path, contract: Contract, name: str, dim: int) -> SiteRound:
    trust, state = folder / "ca", folder / "state" / name
    state.mkdir(mode=0o700, parents=True)
    signer = FileSigner(folder / "keys" / name / "sign.key", trust / "issued" / name / "sign.pem")
    accept(contract, name, POLICY)
    approve(contract, name, POLICY, signer, state, approver=POLICY.approver)
    index = [site.name for site in contract.sites].index(name)
    return SiteRound(
        contract, name, trainer=Drawn(index, dim), policy=POLICY, signer=signer, ledger=None,
        check_certificate=certificate_check(TrustStore.load(trust)), journal=SiteJournal(state / "rounds.jsonl"),
        approval=approved(contract, name, POLICY, signer, state),
        witness=Witness(state, name, signer, certificate_check(TrustStore.load(trust), Role.COORDINATOR)))


def _fleet(folder: Path, roster: Mapping[str, ca.RosterEntry]) -> FleetServer:
    trust, own = folder / "ca", folder / "keys" / COORDINATOR
    return FleetServer(host="127.0.0.1", port=0, certificate=trust / "issued" / COORDINATOR / "tls.pem", key=own / "tls.key",
                       trusted=[trust / "issuing-site.pem"], crl=trust / "crl-site.pem",
                       roster={n: e.tls.public_bytes(CertificateEncoding.PEM) for n, e in roster.items()})


def _piped(sites: subprocess.Popen[str], names: Sequence[str]) -> Exchange:
    if sites.stdout is None or sites.stdin is None:
        raise Unreachable("bench.process", "A process has no pipes.", "Run the bench again.")
    nodes = {name: node for node, name in enumerate(names, 1)}
    return Exchange(PipeGrid(Peer(sites.stdout.fileno(), sites.stdin.fileno()), list(nodes.values())), nodes)


def _adapter(dim: int, round_no: int) -> Tensors:
    """Another one in each round: a site sends one update from an adapter."""
    return {UPDATE: np.full(dim, round_no * 1e-6, np.float32)}


def _exact(folder: Path, group: int) -> bool:
    """A group's last mean is within the encoding's bound of the mean of what its sites drew."""
    contract = load_contract(read_file(folder / f"group-{group}.json"))
    mean, sites, terms = np.fromfile(folder / f"mean-{group}", np.float32), contract.sites, contract.secagg
    truth = np.zeros(len(mean))
    for i in range(len(sites)):
        truth += Drawn(i, len(mean)).train(_adapter(len(mean), ROUNDS), ROUNDS)
    encoding = Encoding(bits=terms.bits, ring=terms.ring, cohort=len(sites), ranges=((len(mean), RANGE),))
    bound = encoding.error_bound([site.weight for site in sites])[0] + float(np.spacing(np.float32(2 * RANGE)))  # as float32
    return bool(np.abs(mean - truth / len(sites)).max() <= bound)


def _write_contract(file: Path, run: int, signers: dict[str, str]) -> None:
    """A round without one of the sites is void."""
    FileLayer().write_atomic(file, load_contract(canonical({
        "run": f"{run:032x}", "purpose": "benchmark", "code_version": __version__, "code": code_digest(),
        "expires": "2099-01-01T00:00:00Z", "model": {"weights": "0" * 64, "tokenizer": "0" * 64},
        "data": {"name": "none", "labels": ["a", "b"]}, "lora": {}, "rule": {"max_norm": 1e9},
        "privacy": {"trust": "none", "epsilon": None, "rounds": ROUNDS, "retries": 0},
        "secagg": {"threshold": least_threshold(len(signers), 1), "survivors": len(signers), "range": RANGE,
                   "bits": min(24, ((2**31 - 1) // len(signers) + 1).bit_length())},
        "sites": [{"name": name, "signer": signer, "n_decl": 100, "delta": 1e-5, "sigma": 0.0}
                  for name, signer in signers.items()]})).to_bytes())


if __name__ == "__main__":
    work, where, *rest = json.loads(sys.argv[1])
    (coordinate if work == "coordinate" else serve)(Path(where), *rest)
