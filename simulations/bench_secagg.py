"""`fl-simulate bench secagg`: whole sessions between the product's state machines, timed stage by stage.

Real certificates and signatures, journals in memory (no fsync), no transport between the two sides. A client's data
path (encode, mask, hash) is measured twice: alone, for several numbers of neighbours, which splits it into a base and a
slope; and inside the sessions, whose control cost is that of the same session with one value. docs/benchmarks.md
documents every field.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_server.exchange import Note, pack, unpack
from privacy.secagg import prg
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.encoding import Encoding
from privacy.secagg.messages import Ring
from simulations.adversary import Consortium
from simulations.bench import Samples, environment
from simulations.bench_baselines import Wire, as_message, fedavg, plain_content, secaggplus, tenseal_ckks
from simulations.bench_memory import resident_bytes, traced_bytes

RANGE = 1.0  # C; updates are uniform in it
BITS = {32: 24, 16: 16}  # the most that is used; fewer where a sum of the cohort needs it
BASE_NS, NEIGHBOUR_NS = 5.0, 1.6  # goals: CPU of a client's data path for each element
CONTROL_S, UPLOAD, MEMORY, SERVER = 0.120, 1.01, 2.0, 1.0  # goals; UPLOAD is that of a 32-bit ring
CONTROL = tuple(f"client {stage}" for stage in ("m1", "m3", "m5", "m7", "m9"))
DATA_PATH = ("server take_m5", "server unmask", "server decode")


@dataclass
class Session:
    """One played attempt. upload: bytes by site, as Flower's objects. exact: unmasked = sum of the survivors' encodings."""

    samples: Samples = field(default_factory=Samples)
    upload: dict[int, int] = field(default_factory=dict)
    exact: bool = False
    max_error: float = 0.0
    error_bound: float = 0.0

    @property
    def server_s(self) -> tuple[float, float]:
        """(CPU, wall) of taking every masked vector, unmasking and decoding."""
        return self.samples.total(*DATA_PATH)


def play(consortium: Consortium, offer: tr.Offer, updates: Sequence[NDArray[np.float32]], drop: int) -> Session:
    """The last `drop` sites vanish once they are asked for their masked vectors. Masked vectors are taken only when all
    have been made, so none is still in a cache."""
    out, sites, server = Session(), consortium.sites(offer), CoordinatorSession(offer, consortium.check)
    take, everyone = out.samples.take, range(len(sites))
    encode = partial(offer.encoding.encode, consume=True)  # as a site does
    fresh = {u: updates[u].copy() for u in everyone}
    encoded = {u: take("client encode", encode, fresh[u], 1.0) for u in everyone}
    out.upload = dict.fromkeys(everyone, 0)

    def sent(stage: str, u: int, body: bytes, y: Ring | None = None) -> bytes:
        out.upload[u] += Wire(pack(Note(body, {} if y is None else {"y": y}))).size
        return body

    for u in everyone:
        take("server take_m1", server.take_m1, u, sent("m1", u, take("client m1", sites[u].m1)))
    m2 = take("server m2", server.m2)
    for u in everyone:
        take("server take_m3", server.take_m3, u, sent("m3", u, take("client m3", sites[u].m3, m2)))
    m4 = take("server m4", server.m4)
    survivors = everyone[:len(sites) - drop]
    m5 = {u: take("client m5", sites[u].m5, m4[u], encoded[u].copy()) for u in survivors}
    for u, (body, y) in m5.items():
        take("server take_m5", server.take_m5, u, body, y)
        sent("m5", u, body, y)
    m6 = take("server m6", server.m6)
    for u in survivors:
        take("server take_m7", server.take_m7, u, sent("m7", u, take("client m7", sites[u].m7, m6)))
    m8 = take("server m8", server.m8)
    for u in survivors:
        take("server take_m9", server.take_m9, u, sent("m9", u, take("client m9", sites[u].m9, m8)))
    total, weights = take("server unmask", server.unmask), [1.0] * len(survivors)
    mean = take("server decode", offer.encoding.decode_mean, total, weights)
    out.upload = {u: out.upload[u] for u in survivors}
    expected = np.zeros(offer.dim, np.uint64)
    truth = np.zeros(offer.dim)
    for u in survivors:
        expected += encoded[u]
        truth += updates[u]
    out.exact = bool((total == expected.astype(total.dtype)).all())
    out.max_error = float(np.abs(mean - truth / len(survivors)).max())
    out.error_bound = offer.encoding.error_bound(weights)[0] + float(np.spacing(np.abs(mean).max())) / 2  # float32 mean
    return out


def most_drops(sites: int) -> int:
    """How many of `sites` may vanish at the smallest legal threshold with one colluding site."""
    return sites - _terms(sites)[1]


def run(*, sites: int, dim: int, drop: int, ring: int, repeats: int, threads: int, seed: int) -> dict[str, Any]:
    """All figures of docs/benchmarks.md, `bench secagg`. Needs ring 16 or 32 and drop <= most_drops(sites)."""
    at_start = environment("numpy", "cryptography", "flwr", "tenseal")
    threshold, survivors = _terms(sites)
    bits = min(BITS[ring], ((2 ** (ring - 1) - 1) // sites + 1).bit_length())
    rng = np.random.default_rng(seed)
    updates = [rng.uniform(-RANGE, RANGE, dim).astype(np.float32) for _ in range(sites)]
    neighbours = sorted({0, (sites - 1) // 2, sites - 1})
    alone, kept, lossy, control = Samples(), list[Session](), list[Session](), list[Session]()
    with tempfile.TemporaryDirectory() as folder:
        consortium = Consortium(Path(folder), sites)

        def offer(size: int) -> tr.Offer:
            return consortium.offer(sites, threshold, size, survivors=survivors, ring=ring, bits=bits,
                                    ranges=((size, repr(RANGE)),))

        whole, tiny = offer(dim), offer(1)
        plain = [as_message(plain_content(update)) for update in updates]
        for _ in range(repeats):
            _data_path(whole.encoding, updates[0], neighbours, threads, alone)
            kept.append(play(consortium, whole, updates, 0))
            alone.take("fedavg", fedavg, plain)
            lossy.append(play(consortium, whole, updates, drop))
            control.append(play(consortium, tiny, [update[:1] for update in updates], 0))
            _receive(updates[0], whole.encoding.encode(updates[0], 1.0), alone)
    encoding, sessions = whole.encoding, kept + lossy + control
    worst = max(sessions, key=lambda s: s.max_error / s.error_bound)
    found = {"bench": "secagg", "sites": sites, "dim": dim, "drop": drop, "ring": ring, "bits": bits,
             "dtype": str(encoding.dtype), "threshold": threshold, "repeats": repeats, "threads": threads, "seed": seed,
             "environment": at_start, "exact": all(s.exact for s in sessions),
             "max_error": worst.max_error, "error_bound": worst.error_bound,
             "upload_ratio_fp32": max(max(s.upload.values()) for s in kept + lossy) / updates[0].nbytes,
             "upload_ratio_fp32_median": median(u for s in kept + lossy for u in s.upload.values()) / updates[0].nbytes}
    found |= _client(alone, kept, control, neighbours, dim) | _server(alone, kept, lossy, sites)
    resident = resident_bytes(encoding, seed, sites - 1, threads)
    found |= {"client_memory_ratio": traced_bytes(encoding, updates[0].copy(), sites - 1, threads) / updates[0].nbytes,
              "client_resident_ratio": resident and resident / updates[0].nbytes}
    found |= {"secaggplus": secaggplus(updates[0], neighbours, repeats), "tenseal": tenseal_ckks(updates[0], repeats)}
    found["goals"] = {name: {"value": found[name], "limit": limit, "met": found[name] <= limit} for name, limit in (
        ("client_ns", found["client_limit_ns"]), ("client_session_ns", found["client_limit_ns"]),
        ("client_control_cpu_s", CONTROL_S),
        ("upload_ratio_fp32", UPLOAD * ring / 32), ("client_memory_ratio", MEMORY), ("server_ratio_plain", SERVER),
        ("max_error", found["error_bound"]))}
    found["within"] = found["goals"]["client_ns"]["met"] and found["goals"]["client_session_ns"]["met"]
    found["stages"] = {"no_drop": _stages(kept), "drop": _stages(lossy), "one_value": _stages(control)}
    found["samples"] = dict(alone.taken) | {f"server {name}": [s.server_s for s in played]
                                            for name, played in (("no_drop", kept), ("drop", lossy))}
    return found


def _terms(sites: int) -> tuple[int, int]:
    threshold = tr.least_threshold(sites, 1)
    return threshold, tr.least_survivors(threshold, 1)


def _data_path(encoding: Encoding, update: NDArray[np.float32], neighbours: Sequence[int], threads: int,
               samples: Samples) -> None:
    fresh = update.copy()
    y = samples.take("encode", lambda: encoding.encode(fresh, 1.0, consume=True))
    for k in neighbours:
        masks = [(os.urandom(32), 1 if i % 2 else -1) for i in range(k + 1)]
        samples.take(f"mask {k}", prg.add_masks, y, masks, threads=threads)
    samples.take("hash", hashlib.sha256, y.data)


def _receive(update: NDArray[np.float32], y: Ring, samples: Samples) -> None:
    """What Flower's SuperLink and our transport do with one upload before anyone aggregates it."""
    plain, masked = Wire(plain_content(update)), Wire(pack(Note(b"", {"y": y})))
    samples.take("receive fedavg", plain.received)
    samples.take("receive masked", lambda: unpack(masked.received().content))


def _client(alone: Samples, kept: Sequence[Session], control: Sequence[Session], neighbours: Sequence[int],
            dim: int) -> dict[str, Any]:
    parts = {name: alone.cpu(name) / dim * 1e9 for name in alone.taken}
    ns = [parts["encode"] + parts[f"mask {k}"] + parts["hash"] for k in neighbours]
    slope, base = np.polyfit(neighbours, ns, 1)
    cost = {name: median(s.samples.cpu(name) for s in kept) for name in ("client encode", "client m5")}
    without = median(s.samples.cpu("client m5") for s in control)
    return {"client_ns_per_element": float(base), "client_ns_per_element_per_neighbour": float(slope), "client_ns": ns[-1],
            "client_limit_ns": BASE_NS + NEIGHBOUR_NS * neighbours[-1],
            "client_parts_ns": {name: parts[name] for name in ("encode", "mask 0", "hash")},
            "client_session_ns": (sum(cost.values()) - without) / dim * 1e9,
            "client_control_cpu_s": median(sum(s.samples.cpu(name) for name in CONTROL) for s in control)}


def _server(alone: Samples, kept: Sequence[Session], lossy: Sequence[Session], sites: int) -> dict[str, Any]:
    """Ratios are medians over the pairs of one repetition; those of CPU unless the name says wall."""
    flower = alone.taken["fedavg"]
    receive, receive_flower = alone.cpu("receive masked") * sites, alone.cpu("receive fedavg") * sites
    last = [sum(s.samples.wall(name) for name in DATA_PATH) for s in kept]  # one vector's take_m5
    return {"server_cpu_s": median(s.server_s[0] for s in kept), "server_drop_cpu_s": median(s.server_s[0] for s in lossy),
            "flower_cpu_s": alone.cpu("fedavg"),
            "server_ratio_plain": median(s.server_s[0] / cpu for s, (cpu, _) in zip(kept, flower, strict=True)),
            "server_ratio_plain_received": median((receive + s.server_s[0]) / (receive_flower + cpu)
                                                  for s, (cpu, _) in zip(kept, flower, strict=True)),
            "server_after_last_wall_ratio": median(own / wall for own, (_, wall) in zip(last, flower, strict=True))}


def _stages(sessions: Sequence[Session]) -> dict[str, dict[str, float]]:
    """Of a client stage, the median over sites and repetitions; of a server stage, of all its calls in a session."""
    out = {}
    for name in sessions[0].samples.taken:
        one = name.startswith("client")
        got = [sample for s in sessions for sample in (s.samples.taken[name] if one else [s.samples.total(name)])]
        out[name] = {"cpu_s": median(cpu for cpu, _ in got), "wall_s": median(wall for _, wall in got)}
    return out


def render(found: dict[str, Any]) -> str:
    """The same for people."""
    flower, ckks, vector = found["secaggplus"], found["tenseal"], found["dim"] * 4 / 2**20
    lines = [f"{found['sites']} sites, {found['dim']} values ({vector:.1f} MiB as fp32), ring {found['ring']}, "
             f"{found['bits']} bits, threshold {found['threshold']}, {found['drop']} dropped",
             f"sums exact: {'yes' if found['exact'] else 'NO'}", ""]
    lines += [f"{name:<24}{goal['value']:>12.4g}   goal {goal['limit']:<10.4g} {'met' if goal['met'] else 'MISSED'}"
              for name, goal in found["goals"].items()]
    lines += ["", f"client, ns per element: {found['client_ns_per_element']:.2f} + "
                  f"{found['client_ns_per_element_per_neighbour']:.2f} per neighbour",
              f"  Flower SecAgg+: {flower['client_ns_per_element']:.2f} + "
              f"{flower['client_ns_per_element_per_neighbour']:.2f} per neighbour ({flower['client_ns']:.2f} in all), "
              f"upload {flower['upload_ratio_fp32']:.3f} x fp32",
              "  TenSEAL CKKS: not installed" if ckks is None else
              f"  TenSEAL CKKS: {ckks['client_ns']:.0f} in all, upload {ckks['upload_ratio_fp32']:.2f} x fp32",
              f"server, CPU s: {found['server_cpu_s']:.4f} without drops, {found['server_drop_cpu_s']:.4f} with; "
              f"Flower's FedAvg {found['flower_cpu_s']:.4f}",
              f"  with the transport's work on both sides {found['server_ratio_plain_received']:.2f} x; wall after the last "
              f"upload {found['server_after_last_wall_ratio']:.2f} x", "", f"{'stage':<20}{'CPU ms':>10}{'wall ms':>10}"]
    lines += [f"{name:<20}{cost['cpu_s'] * 1e3:>10.3f}{cost['wall_s'] * 1e3:>10.3f}"
              for name, cost in found["stages"]["no_drop"].items()]
    return "\n".join(lines)
