"""A valid small bundle made from scratch: a CA, an engineer, four sites, three rounds and a void attempt; real signatures,
votes, transcripts, ledgers and statements, random digests, no training. An `Edit` changes one thing before it is signed."""

from __future__ import annotations

import hashlib
import shutil
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privacy import ca
from privacy.bundle import BundleWriter
from privacy.canonical import decimal
from privacy.contract import Contract
from privacy.identity import FileSigner, Role, create_request
from privacy.ledger import Ledger
from privacy.predicates import BEFORE_SUM, KINDS
from privacy.secagg import transcript as tr
from privacy.signing import code_digest
from privacy.statements import make
from privacy.transparency import Entry, Frontier, Head, sign_checkpoint, sign_witness

RUN = "ab" * 16
SITES = ("clinic-a", "clinic-b", "clinic-c", "clinic-d")
HUB, LAB = "hub", "lab"  # the coordinator, the engineer
ROLES = {HUB: Role.COORDINATOR, LAB: Role.ENGINEER, **dict.fromkeys(SITES, Role.SITE)}
METRICS = {0: 0.5, 1: 0.6, 2: 0.75, 3: 0.81}
ATTEMPTS = ((1, 0, True), (2, 0, False), (2, 1, True), (3, 0, True))  # round, attempt, done
SUBJECTS = {"contract": ["contract"], "acceptance": ["contract"], "round-site": ["view", "masked"],
            "round": ["adapter_out", "adapter_in"], "release": ["adapter"],
            "evaluation": ["adapter"]}  # the first field that isn't empty
Edit = Callable[[str, dict[str, Any]], dict[str, Any] | None]  # (kind, predicate) -> what is signed; None: left out
Drops = Mapping[tuple[int, int], Mapping[str, tuple[str, str]]]  # (round, attempt) -> site -> (stage, code)
DROPS: Drops = {(1, 0): {"clinic-c": ("masked", "secagg.vector")},
                (2, 0): {"clinic-b": ("update", "site.failed"), "clinic-d": ("unmask", "site.unreachable")},
                (2, 1): {"clinic-d": ("shares", "site.unreachable")},
                (3, 0): {"clinic-a": ("vote", "site.session_aborted")}}


def sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass
class Consortium:
    """A CA folder and the signers of the coordinator, the engineer and four sites; made once, shared by bundles."""

    folder: Path
    fingerprint: str = ""
    signers: dict[str, FileSigner] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fingerprint = ca.init(self.folder / "ca", "Test consortium")
        for name, role in ROLES.items():
            self.enrol(name, role)

    def enrol(self, name: str, role: Role) -> FileSigner:
        keys = self.folder / "keys" / name
        request = create_request(keys, name, f"Organisation of {name}")
        issued = ca.issue(self.folder / "ca", request, role, hosts=["localhost"] if role is Role.COORDINATOR else [])
        self.signers[name] = FileSigner(keys / "sign.key", issued.folder / "sign.pem")
        return self.signers[name]

    def pem(self, name: str) -> bytes:
        return (self.folder / "ca" / name).read_bytes()

    def certificates(self) -> dict[str, bytes]:
        return {name: self.pem(f"issued/{name}/sign.pem") for name in self.signers}


def contract(signers: Mapping[str, FileSigner], **changes: Any) -> Contract:
    """Four sites, three rounds, one retry. `changes` replace fields of the privacy section; `secagg=False`, `threshold`,
    `survivors` and those of `around` change the contract around it."""
    secagg = {"enabled": changes.pop("secagg", True), "threshold": changes.pop("threshold", 3),
              "survivors": changes.pop("survivors", 3), "range": 1.0}
    around = {"purpose": "A test of evidence", "sign_off": [], "expires": "2099-01-01T00:00:00Z", "code_version": "0.1.0",
              "code": code_digest(), "metrics": ["accuracy"]}
    around = {key: changes.pop(key, value) for key, value in around.items()}
    privacy = {"q": 0.5, "clip": 5.0, "epsilon": 8.0, "rounds": 3, "retries": 1, "local_steps": 2, **changes}
    fields = ["text", "label", *(["person"] if privacy.get("unit") == "person" else [])]
    sigma = 0.0 if privacy.get("trust") == "none" else 3.0
    return Contract.model_validate({
        "run": RUN, **around,
        "model": {"weights": sha("weights"), "tokenizer": sha("tokenizer")},
        "data": {"name": "letters", "labels": ["no", "yes"], "fields": fields}, "lora": {}, "rule": {}, "privacy": privacy,
        "secagg": secagg,
        "sites": [{"name": n, "signer": signers[n].fingerprint, "n_decl": 1000, "delta": 1e-5, "sigma": sigma}
                  for n in SITES]})


@dataclass(frozen=True)
class Sum:
    """What one attempt leaves: T2, H(y) by site that sent one, names in the sum, T3, votes by site. All hex, "" for none."""

    view: str
    masked: Mapping[str, str]
    sites: Sequence[str]
    transcript: str = ""
    votes: Mapping[str, bytes] = field(default_factory=dict)


def sum_of(agreed: Contract, signers: Mapping[str, FileSigner], round_no: int, attempt: int,
           drops: Mapping[str, tuple[str, str]]) -> Sum:
    """Real T2, T3 and votes over made-up keys and vectors. A site that drops out at `masked` has sent one that is too
    late or wrong; sites that vote do so honestly."""
    stage_of = {name: drops[name][0] if name in drops else "" for name in SITES}
    masked = {n: sha("y", n, round_no, attempt) for n in SITES if stage_of[n] not in ("update", "shares")}
    sites = [n for n in masked if stage_of[n] not in BEFORE_SUM]
    if not agreed.secagg.enabled:
        return Sum("", masked, sites)
    t1 = tr.t1(bytes.fromhex(sha("ctx", round_no, attempt)), [(u, sha(n).encode()) for u, n in enumerate(SITES)])
    view = tr.t2(t1, [(SITES.index(n), sha("M3", n).encode()) for n in masked])
    t3 = tr.t3(view, [(SITES.index(n), bytes.fromhex(masked[n])) for n in sites])
    votes = {n: signers[n].sign(tr.signed_m7(t3, SITES.index(n))) for n in sites if stage_of[n] != "vote"}
    return Sum(view.hex(), masked, sites, t3.hex(), votes)


def vote(site: str, signature: bytes) -> dict[str, str]:
    return {"site": site, "signature": b64encode(signature).decode()}


def write_bundle(folder: Path, parties: Consortium, agreed: Contract | None = None, *, edit: Edit | None = None,
                 drops: Drops = DROPS, summed: Callable[..., Sum] = sum_of, cap: float = 10.0, spent_before: int = 0,
                 seal: bool = True,
                 ledger_mechanism: Callable[[Any], Any] = lambda m: m,
                 encumbered: Callable[[Any], Any] = lambda plans: plans, refused: tuple[str, str] | None = None,
                 signers: Mapping[str, FileSigner] | None = None,
                 extract: Callable[[str, bytes], bytes] = lambda _, data: data) -> Path:
    """Run the bookkeeping of a job and write its bundle; a round has one sum, whose parts `edit` sees beside the rest.
    `drops`: who drops out where; `summed`: what an attempt leaves,
    called as `sum_of`. `edit` lies before signing; `ledger_mechanism` and `encumbered` (the plans) in the ledger;
    `extract` in what a site shows of it; `spent_before`: rounds of an earlier run in every ledger; `refused`: (code, what)
    that every site said no with."""
    agreed = agreed or contract(parties.signers)
    signers = signers or parties.signers
    private = agreed.privacy.trust != "none"
    common = {"run": agreed.run, "contract": agreed.digest}
    issuing = {r: parties.pem(f"issuing-{r}.pem") for r in ("site", "coordinator", "engineer")}
    writer = BundleWriter(folder, agreed.run, agreed.to_bytes(), parties.pem("root.pem"), issuing, parties.certificates())

    def say(kind: str, who: str, predicate: dict[str, Any], subject: str = "") -> None:
        changed: dict[str, Any] | None = {**common, **predicate}
        if edit is not None:
            changed = edit(kind, dict(changed))
        if changed is not None:
            if kind == "round" and "sums" not in changed:
                first = {key: changed.pop(key) for key in ("view", "transcript", "votes")}
                changed["sums"] = [first] if changed["outcome"] == "done" or any(first.values()) else []
            subject = subject or next(changed[k] for k in SUBJECTS[kind] if changed[k])
            envelope = make(signers[who], KINDS[kind].predicate_type, [(kind, subject)], changed)
            writer.add_statement(kind, who, envelope)
            entries.append(Entry(agreed.run, hashlib.sha256(envelope).hexdigest()))

    before, entries = [Entry("cd" * 16, sha("earlier", i)) for i in range(3)], list[Entry]()

    say("contract", LAB, {"purpose": agreed.purpose, "expires": agreed.expires})
    books: dict[str, Ledger] = {}
    ledger_folder = folder.with_name(folder.name + "-ledgers")
    ledger_folder.mkdir(exist_ok=True)
    for name in SITES:
        lineage = sha("lineage", name)[:32]
        m = agreed.mechanism(name)
        if private:
            books[name] = Ledger.create(ledger_folder / f"{name}.jsonl", signers[name], lineage=lineage, unit=m.unit,
                                        adjacency=m.adjacency, delta=m.delta, cap=cap)
            if spent_before:
                books[name].encumber("cd" * 16, [[(m, spent_before)]], contract=sha("other"), approver="someone")
            for i in range(spent_before):
                seq = books[name].reserve(m, run="cd" * 16, contract=sha("other"), round=i + 1, attempt=0,
                                          code="0.1.0", approver="someone")
                books[name].commit(seq, m.steps)
            plans = [[(ledger_mechanism(mechanism), n) for mechanism, n in plan] for plan in agreed.plans(name)]
            books[name].encumber(agreed.run, encumbered(plans), contract=agreed.digest, approver=f"officer of {name}")
        say("acceptance", name, {
            "site": name, "lineage": lineage if private else "", "cap": decimal(cap) if private else "",
            "delta": decimal(m.delta), "trust": m.trust, "approver": f"officer of {name}",
            "approved_by": f"director of {name}", "approved": "2026-03-01T09:30:00+00:00",
            "policy": sha("policy", name), "code": agreed.code})
    def measure(round_: int, adapter: str) -> None:
        say("evaluation", HUB, {"round": round_, "adapter": adapter, "metric_name": "accuracy", "split": "public test",
                                "metric": decimal(METRICS[round_]), "units": 400})

    adapter = sha("adapter", 0)
    measure(0, adapter)
    for round_, attempt, done in ATTEMPTS:
        fell = drops.get((round_, attempt), {})
        got = summed(agreed, signers, round_, attempt, fell)
        where = {"round": round_, "attempt": attempt}
        for name in SITES:
            m = agreed.mechanism(name, round_)
            seq, head, spent = 0, "", ""
            if private:
                at = books[name].reserve(ledger_mechanism(m), run=agreed.run, contract=agreed.digest, code="0.1.0",
                                         approver=f"officer of {name}", **where)
                books[name].commit(at, m.steps)
                (seq, head), spent = books[name].head, decimal(books[name].epsilon())
            if name in got.masked:
                say("round-site", name, {
                    "site": name, "lineage": books[name].lineage if private else "", **where, "pass_no": 1,
                    "adapter_in": adapter,
                    "view": got.view, "masked": got.masked[name], "q": decimal(m.q), "clip": decimal(m.clip),
                    "sigma": decimal(m.sigma), "steps": m.steps, "n_decl": m.n_decl, "ledger_seq": seq,
                    "ledger_head": head, "epsilon": spent})
        out = sha("adapter", round_) if done else ""
        say("round", HUB, {
            **where, "outcome": "done" if done else "void", "reason": "" if done else "secagg.forged_share",
            "sites": list(got.sites) if done else [], "adapter_in": adapter, "adapter_out": out,
            "view": got.view if done else "",
            "transcript": got.transcript if done else "",
            "votes": [vote(*cast) for cast in got.votes.items()] if done else [],
            "dropped": [{"site": n, "pass_no": 1, "stage": stage, "code": code} for n, (stage, code) in fell.items()]})
        adapter = out or adapter
        if done:
            measure(round_, adapter)
        witness(writer, signers, before, entries)
    for name, book in books.items():
        if refused:
            book.refuse(refused[0], agreed.run, agreed.digest, refused[1])
        book.close_run(agreed.run)
        data = extract(name, book.extract(agreed.run))
        writer.add_ledger(name, data)
        say("closing", name, {
            "site": name, "lineage": book.lineage, "records": book.head.seq + 1, "ledger_seq": book.head.seq,
            "ledger_head": book.head.hash, "epsilon": decimal(book.epsilon()), "delta": decimal(book.delta),
            "cap": decimal(book.cap)}, hashlib.sha256(data).hexdigest())
        book.close()
    say("release", HUB, {
        "adapter": adapter, "rounds": sum(done for *_, done in ATTEMPTS), "metric_name": "accuracy",
        "metric_before": "0.5", "metric_after": "0.81", "split": "public test", "units": 400})
    witness(writer, signers, before, entries)
    if seal:
        writer.seal(signers[HUB])
    return folder


def witness(writer: BundleWriter, signers: Mapping[str, FileSigner], before: Sequence[Entry], entries: Sequence[Entry],
            who: Sequence[str] = SITES) -> None:
    """The log as it is now, its signed head, and the sites' signatures on that."""
    frontier, tree = Frontier(), Frontier()
    for entry in before:
        frontier.append(entry.leaf)
    for entry in [*before, *entries]:
        tree.append(entry.leaf)
    head = Head(log=HUB, size=tree.size, root=tree.root.hex())
    writer.set_log(frontier, entries)
    writer.add_checkpoint(tree.size, sign_checkpoint(signers[HUB], head),
                          {name: sign_witness(signers[name], name, head) for name in who})


def relog(folder: Path, parties: Consortium, who: Sequence[str] = SITES) -> Path:
    """What a coordinator and these sites do that lie together: another log, of the statements that are there now."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "log")
    root = (folder / "certificates/root.pem").read_bytes()
    writer = BundleWriter(folder, RUN, (folder / "contract.json").read_bytes(), root, {}, {})
    entries = [Entry(RUN, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted((folder / "statements").iterdir())]
    witness(writer, parties.signers, [], entries, who)
    writer.seal(parties.signers[HUB])
    return folder


def reseal(folder: Path, parties: Consortium) -> Path:
    """What a lying coordinator does after changing files: sign a manifest of what is there now."""
    (folder / "manifest.json").unlink(missing_ok=True)
    root = (folder / "certificates/root.pem").read_bytes()
    BundleWriter(folder, RUN, (folder / "contract.json").read_bytes(), root, {}, {}).seal(parties.signers[HUB])
    return folder


def statement_path(folder: Path, kind: str, who: str, index: int = 0) -> Path:
    """The index-th statement of that kind by that signer."""
    return sorted((folder / "statements").glob(f"[0-9][0-9][0-9][0-9][0-9][0-9]-{kind}-{who}.json"))[index]
