"""`fl-simulate bench round`: whole rounds without training, real processes over mutual TLS on loopback.

This process is the coordinator (FleetServer, Exchange, RoundDriver); each site is a process of its own (FleetLink,
SiteRound, SiteJournal with fsync). Only the trainer isn't the product's: it draws its update. Rounds with and without
secure aggregation alternate between the same processes; stock Flower (bench_flower) plays before and after them.
docs/benchmarks.md documents every field.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding as CertificateEncoding
from numpy.typing import NDArray

from fl_client.app import Handler, Reply, Vector
from fl_client.approval import approve, approved
from fl_client.journal import SiteJournal
from fl_client.link import FleetLink, build_app
from fl_client.link_tls import coordinator_check
from fl_client.policy import SitePolicy, accept
from fl_client.round import SiteRound
from fl_client.witness import Witness
from fl_server.attempt import Deadlines
from fl_server.exchange import Exchange
from fl_server.fleet import FleetServer
from fl_server.round import RoundDriver
from privacy import __version__, ca
from privacy.canonical import canonical, parse
from privacy.contract import Contract, load_contract
from privacy.errors import Unreachable
from privacy.files import FileLayer, read_file
from privacy.identity import FileSigner, Role, create_request
from privacy.secagg.encoding import Encoding
from privacy.secagg.peers import certificate_check
from privacy.secagg.transcript import least_threshold
from privacy.signing import code_digest
from privacy.trust import TrustStore
from simulations.bench import environment
from simulations.bench_flower import Stock
from strategies.adapter import AdapterSpec, Tensors, initial

COORDINATOR, MODES = "coordinator", ("masked", "plain")
UPDATE = "update"  # the one tensor
HOSTS = ["localhost", "127.0.0.1"]  # Flower's own processes use the address
RANGE = 1.0  # C; updates are uniform in it
STEP = np.float32(2.0**-22)  # they are multiples of it, so that adding one to an adapter isn't rounded
GOAL_S = 2.0
START_S, STAGE_S, LEAVE_S = 120.0, 60.0, 60.0  # a machine may be busy
POLICY = SitePolicy(approver="bench", allow_non_private=True, reveal_update=True)


class Drawn:
    """The trainer's place: an update from (site, round), so that the coordinator can tell whether the mean is right."""

    def __init__(self, index: int, dim: int) -> None:
        self.spec, self._index = _spec(dim), index

    def train(self, adapter: Tensors, round_no: int) -> NDArray[np.float32]:
        drawn = np.random.default_rng((self._index, round_no)).random(self.spec.dim, np.float32) * (2 * RANGE) - RANGE
        return np.asarray(np.round(drawn / STEP) * STEP, np.float32)


def run(*, sites: int, dim: int, rounds: int) -> dict[str, Any]:
    """All figures of docs/benchmarks.md, `bench round`. sites >= 3.

    Raises Unreachable `run.sites_missing`; RoundVoid if a site falls out.
    """
    at_start, names = environment("numpy", "cryptography", "flwr"), [f"site-{i}" for i in range(sites)]
    with tempfile.TemporaryDirectory(prefix="consilo-") as name:
        folder = Path(name)
        trust = folder / "ca"
        roster = consortium(folder, names)
        contracts = _contracts(folder, {n: roster[n].sign_fingerprint for n in names}, rounds + 1)
        issued, spec = trust / "issued" / COORDINATOR, _spec(dim)
        with FleetServer(host="127.0.0.1", port=0, certificate=issued / "tls.pem",
                         key=folder / "keys" / COORDINATOR / "tls.key", trusted=[trust / "issuing-site.pem"],
                         roster={n: roster[n].tls.public_bytes(CertificateEncoding.PEM) for n in names},
                         crl=trust / "crl-site.pem") as fleet, _sites(folder, names, fleet.port, dim) as processes:
            exchange = Exchange(fleet.grid, fleet.nodes)
            if missing := sorted(set(names) - exchange.wait_online(names, START_S)):
                raise Unreachable("run.sites_missing", f"Not online: {', '.join(missing)}.", "Their errors are above.")
            drivers = {mode: RoundDriver(contract, spec, exchange, deadlines=Deadlines(STAGE_S, STAGE_S),
                                         check_certificate=certificate_check(TrustStore.load(trust)),
                                         certificates={n: roster[n].sign for n in names})
                       for mode, contract in contracts.items()}
            with Stock(folder / "flower", sites=sites, dim=dim, certificate=issued / "tls.pem",
                       key=folder / "keys" / COORDINATOR / "tls.key", roots=_roots(trust)) as stock:
                stock.play(rounds - rounds // 2)
                measured = _measure(drivers, spec, rounds, [os.getpid(), *(p.pid for p in processes)])
                stock.play(rounds // 2)
            _compare(measured, stock)
    return {"bench": "round", "sites": sites, "dim": dim, "rounds": rounds, "environment": at_start,
            "threshold": contracts["masked"].secagg.threshold} | measured


def _measure(drivers: Mapping[str, RoundDriver], spec: AdapterSpec, rounds: int, pids: Sequence[int]) -> dict[str, Any]:
    """Round 1 of each mode opens connections and loads code; it isn't counted."""
    adapter: Tensors = initial(spec, 0)
    wall: dict[str, list[float]] = {mode: [] for mode in drivers}
    cpu: dict[str, list[float]] = {mode: [] for mode in drivers}
    errors, bound = [], 0.0
    for round_no in range(1, rounds + 2):
        for mode, driver in drivers.items():
            cpu_start, start = _cpu_s(pids), time.perf_counter()
            mean = driver.attempt(round_no, 0, adapter).change[UPDATE]
            seconds, cpu_end = time.perf_counter() - start, _cpu_s(pids)
            if round_no > 1:
                wall[mode].append(seconds)
                if cpu_start is not None and cpu_end is not None:
                    cpu[mode].append(cpu_end - cpu_start)
            adapter = spec.add(adapter, np.full(spec.dim, STEP, np.float32))  # a site sends one update from an adapter
            cohort = driver.contract.sites
            truth = np.mean([Drawn(i, spec.dim).train(adapter, round_no) for i in range(len(cohort))], 0, np.float64)
            errors.append(float(np.abs(mean - truth).max()))
            terms = driver.contract.secagg
            encoding = Encoding(bits=terms.bits, ring=terms.ring, cohort=len(cohort),
                                ranges=((spec.dim, driver.setup.bound(UPDATE)),))
            bound = max(bound, encoding.error_bound([site.weight for site in cohort])[0]
                        + float(np.spacing(np.abs(mean).max())) / 2)  # float32 mean
    overhead = median(wall["masked"])
    return {"overhead_s": overhead, "overhead_cpu_s": median(cpu["masked"]) if cpu["masked"] else None,
            "plain_s": median(wall["plain"]), "plain_cpu_s": median(cpu["plain"]) if cpu["plain"] else None,
            "ratio_plain_round": median(m / p for m, p in zip(wall["masked"], wall["plain"], strict=True)),
            "exact": max(errors) <= bound, "max_error": max(errors), "error_bound": bound,
            "goals": {"overhead_s": {"value": overhead, "limit": GOAL_S, "met": overhead <= GOAL_S}},
            "samples": {"wall": wall, "cpu": cpu}}


def _compare(measured: dict[str, Any], stock: Stock) -> None:
    """Adds stock Flower's figures; null, and why, where it couldn't be run."""
    done = stock.why is None
    measured |= {"stock_flower_s": median(stock.wall) if done else None,
                 "stock_flower_cpu_s": median(stock.cpu) if done else None,
                 "ratio_stock_flower": measured["overhead_s"] / median(stock.wall) if done else None,
                 "ratio_stock_flower_why": stock.why}
    measured["samples"]["wall"]["stock_flower"], measured["samples"]["cpu"]["stock_flower"] = stock.wall, stock.cpu


def render(found: dict[str, Any]) -> str:
    """The same for people."""
    goal, cpu, ratio = found["goals"]["overhead_s"], found["overhead_cpu_s"], found["ratio_stock_flower"]
    return "\n".join((
        f"{found['sites']} sites, {found['dim']} values, {found['rounds']} rounds without training, mTLS on loopback",
        f"means right: {'yes' if found['exact'] else 'NO'} (error {found['max_error']:.3g} of {found['error_bound']:.3g})",
        f"a round: {found['overhead_s']:.3f} s (goal {goal['limit']} {'met' if goal['met'] else 'MISSED'}), CPU of all "
        f"processes {'unknown' if cpu is None else f'{cpu:.3f} s'}",
        f"masks off: {found['plain_s']:.3f} s; ratio {found['ratio_plain_round']:.2f}",
        f"stock Flower: {found['ratio_stock_flower_why']}" if ratio is None else
        f"stock Flower: {found['stock_flower_s']:.3f} s, CPU {found['stock_flower_cpu_s']:.3f} s; ratio {ratio:.3f}"))


def site(folder: Path, name: str, port: int, dim: int) -> None:
    """A site process: serves both contracts until its stdin ends, so that it never outlives the coordinator."""
    trust, state = folder / "ca", folder / "state" / name
    state.mkdir(mode=0o700, parents=True)
    issued, keys = trust / "issued" / name, folder / "keys" / name
    signer, check = FileSigner(keys / "sign.key", issued / "sign.pem"), certificate_check(TrustStore.load(trust))
    journal, served, stop = SiteJournal(state / "rounds.jsonl"), dict[str, SiteRound](), threading.Event()
    for mode in MODES:
        contract = load_contract(read_file(folder / f"{mode}.json"))
        accept(contract, name, POLICY)
        approve(contract, name, POLICY, signer, state, approver=POLICY.approver)
        index = [s.name for s in contract.sites].index(name)
        served[contract.digest] = SiteRound(
            contract, name, trainer=Drawn(index, dim), policy=POLICY, signer=signer, check_certificate=check,
            journal=journal, ledger=None, approval=approved(contract, name, POLICY, signer, state),
            witness=Witness(state, name, signer, certificate_check(TrustStore.load(trust), Role.COORDINATOR)))

    def watch() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=watch, name="parent", daemon=True).start()
    FleetLink(f"https://localhost:{port}", issued / "tls.pem", keys / "tls.key", trust / "issuing-coordinator.pem",
              check=coordinator_check(trust)).run(
        build_app(_either({digest: each.handlers() for digest, each in served.items()})), None, stop)
    journal.close()


def _either(served: Mapping[str, Mapping[str, Handler]]) -> dict[str, Handler]:
    """Handlers of whichever contract the last offer named."""
    current = dict[str, Handler]()

    def of(stage: str) -> Handler:
        def handle(body: bytes, arrays: dict[str, Vector]) -> Reply:
            if stage == "train.update":
                current.update(served[parse(body)["contract"]])
            return current[stage](body, arrays)

        return handle

    return {stage: of(stage) for stage in next(iter(served.values())) if stage.startswith("train.")}


@contextmanager
def _sites(folder: Path, names: Sequence[str], port: int, dim: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    variables = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for name in names:
            job = json.dumps([str(folder), name, port, dim])
            processes.append(subprocess.Popen([sys.executable, "-P", "-m", "simulations.bench_round", job],
                                              stdin=subprocess.PIPE, env=variables))
        yield processes
    finally:
        for process in processes:
            if process.stdin:
                process.stdin.close()
        for process in processes:
            try:
                process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def consortium(folder: Path, names: Sequence[str]) -> dict[str, ca.RosterEntry]:
    """CA, identities and the roster."""
    trust = folder / "ca"
    ca.init(trust, "Bench consortium", days=1)
    for name, role in (dict.fromkeys(names, Role.SITE) | {COORDINATOR: Role.COORDINATOR}).items():
        request = create_request(folder / "keys" / name, name, f"Organisation of {name}")
        ca.issue(trust, request, role, days=1, hosts=HOSTS if role is Role.COORDINATOR else [])
    return {e.name: e for e in ca.verify_roster(ca.roster(trust), TrustStore.load(trust))}


def _contracts(folder: Path, signers: Mapping[str, str], rounds: int) -> dict[str, Contract]:
    """By mode, also as files; they differ in run and secagg.enabled alone. A round without one of the sites is void."""
    contracts = {}
    for index, mode in enumerate(MODES):
        contracts[mode] = load_contract(canonical({
            "run": f"{index:032x}", "purpose": "benchmark", "code_version": __version__, "code": code_digest(),
            "expires": "2099-01-01T00:00:00Z", "model": {"weights": "0" * 64, "tokenizer": "0" * 64},
            "data": {"name": "none", "labels": ["a", "b"]}, "lora": {}, "rule": {"max_norm": 1e9},
            "privacy": {"trust": "none", "epsilon": None, "rounds": rounds, "retries": 0},
            "secagg": {"enabled": mode == "masked", "threshold": least_threshold(len(signers), 1),
                       "survivors": len(signers), "range": RANGE},
            "sites": [{"name": name, "signer": signer, "n_decl": 100, "delta": 1e-5, "sigma": 0.0}
                      for name, signer in signers.items()]}))
        FileLayer().write_atomic(folder / f"{mode}.json", contracts[mode].to_bytes())
    return contracts


def _roots(trust: Path) -> Path:
    """A bundle for clients that take no intermediate CA for an anchor."""
    bundle = trust / "roots.pem"
    FileLayer().write_atomic(bundle, read_file(trust / "root.pem") + read_file(trust / "issuing-coordinator.pem"))
    return bundle


def _spec(dim: int) -> AdapterSpec:
    return AdapterSpec(((UPDATE, (dim,)),), frozenset({UPDATE}))


def _cpu_s(pids: Sequence[int]) -> float | None:
    """User and system seconds of these processes so far, dead threads included. None where it isn't Linux."""
    if sys.platform != "linux":
        return None
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)  # clock_getcpuclockid(3)


if __name__ == "__main__":
    where, *rest = json.loads(sys.argv[1])
    site(Path(where), *rest)
