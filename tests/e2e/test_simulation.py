"""The road end to end in one process: both sides' own code, every message serialised, certificates real."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf import load_settings
from fl_client.app import StageRefused
from fl_client.round import SiteRound
from fl_server.journal import status
from privacy.errors import Refused, RoundVoid, SiteCode
from privacy.report import write_report
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.encoding import Encoding
from privacy.verify import verify_bundle
from simulations.local import Outcome, federate

Make = Callable[..., list[str]]


def run(overrides: list[str], **kw: Any) -> Outcome:
    return federate(load_settings(overrides), **kw)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def predicates(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Predicates of the bundle's statements of one kind, read without any of the project's code."""
    files = sorted((folder / "evidence" / "statements").glob(f"*-{kind}-*.json"))
    statements = [json.loads(b64decode(json.loads(f.read_text())["payload"])) for f in files]
    return [s["predicate"] for s in statements if s["predicateType"].startswith(f"urn:consilo:{kind}:")]


@contextmanager
def encoded_vectors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Every vector that a site encodes, as the bytes that must not appear anywhere outside it."""
    seen: list[bytes] = []
    original = Encoding.encode

    def encode(self: Encoding, update: Any, weight: float, **how: bool) -> Any:
        out = original(self, update, weight, **how)
        seen.append(out.tobytes())
        return out

    with monkeypatch.context() as m:
        m.setattr(Encoding, "encode", encode)
        yield seen


def wire(message: Any, reply: Any) -> bytes:
    """All bytes of a reply as the coordinator gets them."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return b"".join(o.deflate() for o in get_all_nested_objects(reply).values())


def on_disk(folder: Path) -> bytes:
    return b"".join(f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file())


def test_federation_learns_and_its_evidence_verifies(overrides: Make, tmp_path: Path) -> None:
    outcome = run(overrides("privacy=none", "privacy.rounds=12", "privacy.q=1.0", "rule.server_lr=1.0"))
    assert outcome.result.after.values["accuracy"] > outcome.result.before.values["accuracy"] + 0.15
    assert verify_bundle(tmp_path / "out" / "evidence", outcome.root).verdict == "PASS"
    assert verify_bundle(tmp_path / "out" / "evidence", None).verdict == "UNANCHORED"
    assert verify_bundle(tmp_path / "out" / "evidence", "0" * 64).verdict == "FAIL"


def test_epsilon_is_recomputed_with_dp_accounting_from_the_evidence_alone(overrides: Make, tmp_path: Path) -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    run(overrides("privacy.rounds=3"))
    for closing in predicates(tmp_path / "out", "closing"):
        lines = (tmp_path / "out" / "evidence" / "ledgers" / f"{closing['site']}.jsonl").read_text().splitlines()
        reserves = [b for b in (json.loads(line)["body"] for line in lines) if b["kind"] == "reserve"]
        accountant = PLDAccountant()
        for r in reserves:
            step = PoissonSampledDpEvent(float(r["q"]), GaussianDpEvent(float(r["sigma"])))
            accountant.compose(SelfComposedDpEvent(step, r["planned_steps"]))
        epsilon = accountant.get_epsilon(float(closing["delta"]))
        assert len(reserves) == 3
        assert float(closing["epsilon"]) == pytest.approx(epsilon, abs=2e-3)
        assert float(closing["epsilon"]) <= 8.0


def test_wire_and_disk_hold_no_encoded_vector_with_masks_and_hold_it_without(
        overrides: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for group, found in (("masked", False), ("plain", True)):
        received: list[bytes] = []
        with encoded_vectors(monkeypatch) as secret:
            run(overrides(f"secure_aggregation={group}", f"server.out={tmp_path / group}", "privacy.rounds=1"),
                tap=lambda m, r, out=received: out.append(wire(m, r)))
        haystack = b"".join(received) + on_disk(tmp_path / group)
        assert len(secret) == 3
        for vector in secret:  # a window of 16 values: chunks and headers can't hide it
            assert (vector[:64] in haystack) is found, group


STAGES = ("update", "shares", "masked", "vote", "unmask")


def lose(stage: str, nodes: set[int], times: int = 1) -> Callable[[int, Any, int], str | None]:
    """The answers of these nodes to a stage are lost, the first `times` times."""
    lost: dict[int, int] = {}

    def drop(node: int, message: Any, k: int) -> str | None:
        if node in nodes and message.metadata.message_type == f"train.{stage}" and lost.get(node, 0) < times:
            lost[node] = lost.get(node, 0) + 1
            return "reply"
        return None

    return drop


def five_sites(tiny_data: dict[str, Path], *more: str) -> list[str]:
    files = [tiny_data["site-a"], tiny_data["site-b"], tiny_data["site-c"], tiny_data["site-a"], tiny_data["site-b"]]
    sites = ",".join(f"s{i}:{{file:{file}}}" for i, file in enumerate(files))
    return [f"data.sites={{{sites}}}", "privacy.rounds=1", *more]


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """(site -> the vector that it encoded last, totals that the coordinator unmasked)."""
    encoded: dict[str, Any] = {}
    totals: list[Any] = []
    charged, unmask = SiteRound._update, CoordinatorSession.unmask

    def update(self: SiteRound, body: bytes, arrays: Any) -> Any:
        out = charged(self, body, arrays)
        encoded[self.site] = self._encoded.copy()
        return out

    def unmasked(self: CoordinatorSession) -> Any:
        totals.append(unmask(self))
        return totals[-1].copy()

    monkeypatch.setattr(SiteRound, "_update", update)
    monkeypatch.setattr(CoordinatorSession, "unmask", unmasked)
    yield encoded, totals


@pytest.mark.parametrize("ring", ["32", "16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.case(19)
def test_the_sum_is_that_of_the_survivors_whatever_stage_a_site_is_lost_at(
        overrides: Make, tmp_path: Path, tiny_data: dict[str, Path], sums: Any, stage: str, ring: str) -> None:
    """Five sites, t = 4: one may be lost anywhere; a site lost after its masked vector came stays in the sum."""
    encoded, totals = sums
    bits = "secure_aggregation.bits=12" if ring == "16" else "secure_aggregation.bits=24"
    more = five_sites(tiny_data, f"secure_aggregation.ring={ring}", bits)
    outcome = run(overrides(*more), drop=lose(stage, {2}))
    before = stage in ("update", "shares", "masked")
    names = ["s0", "s2", "s3", "s4"] if before else ["s0", "s1", "s2", "s3", "s4"]
    expected = sum(encoded[name].astype(np.uint64) for name in names).astype(totals[0].dtype)
    assert np.array_equal(totals[0], expected)
    assert (outcome.result.rounds, outcome.result.void) == (1, 0)
    said = status(tmp_path / "out" / "journal.jsonl")["rounds"][0]
    assert (said["outcome"], said["sites"], said["lost"]) == ("done", names, [f"s1 {stage} site.unreachable"])
    assert verify_bundle(tmp_path / "out" / "evidence", outcome.root).verdict == "PASS"
    assert predicates(tmp_path / "out", "round")[0]["dropped"] == [
        {"site": "s1", "pass_no": 1, "stage": stage, "code": "site.unreachable"}]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.case(19)
def test_too_few_left_voids_the_attempt_and_the_next_one_counts(
        overrides: Make, tmp_path: Path, tiny_data: dict[str, Path], sums: Any, stage: str) -> None:
    """Five sites, t = 4: two lost at one stage void the attempt; nothing is unmasked, and it stays charged."""
    outcome = run(overrides(*five_sites(tiny_data)), drop=lose(stage, {2, 4}))
    assert (outcome.result.rounds, outcome.result.void, len(sums[1])) == (1, 1, 1)
    void, done = status(tmp_path / "out" / "journal.jsonl")["rounds"]
    assert (void["outcome"], void["reason"], done["outcome"], done["attempt"]) == ("void", "secagg.too_few", "done", 1)
    assert void["lost"] == [f"s1 {stage} site.unreachable", f"s3 {stage} site.unreachable"]
    assert verify_bundle(tmp_path / "out" / "evidence", outcome.root).verdict == "PASS"
    for closing in predicates(tmp_path / "out", "closing"):
        lines = (tmp_path / "out" / "evidence" / "ledgers" / f"{closing['site']}.jsonl").read_text().splitlines()
        assert sum('"kind":"reserve"' in line for line in lines) == 2, "the void attempt stays spent"


def test_attack_abort_storm_ends_with_the_retries_and_every_attempt_is_charged(overrides: Make, tmp_path: Path) -> None:
    """The coordinator (here: a silent site) voids every attempt before the unmasking."""
    def drop(node: int, message: Any, k: int) -> str | None:
        return "reply" if node == 1 and message.metadata.message_type == "train.unmask" else None

    with pytest.raises(RoundVoid):
        run(overrides(), drop=drop, state=tmp_path / "state")
    for site in ("site-a", "site-b", "site-c"):
        ledger = (tmp_path / "state" / site / "ledger.jsonl").read_text()
        assert ledger.count('"kind":"reserve"') == 2
    assert events(tmp_path / "out")[-1] == {"event": "end", "outcome": "secagg.too_few"}
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("trust", ["privacy.trust=local", "privacy=none"])
def test_a_site_that_says_no_states_it(overrides: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: str) -> None:
    compare, said = SiteRound._compare, list[str]()

    def refuse_once(site: SiteRound, *offer: Any) -> None:
        if site.site == "site-b" and not said:
            said.append("no")
            raise StageRefused(SiteCode.CONTRACT)
        compare(site, *offer)

    monkeypatch.setattr(SiteRound, "_compare", refuse_once)
    outcome = run(overrides(trust, "privacy.retries=1", "seed=5"))
    assert outcome.result.void == 1
    stated = [(p["site"], p["code"]) for p in predicates(tmp_path / "out", "refusal")]
    assert stated == [("site-b", "site.contract_mismatch")]
    assert verify_bundle(tmp_path / "out" / "evidence", outcome.root).verdict == "PASS"
    write_report(tmp_path / "out" / "evidence", tmp_path, ca=outcome.root)
    incidents = json.loads((tmp_path / "report.json").read_text())["incidents"]
    refused = [(i["reason"], i["sites"]) for i in incidents if i["kind"] == "refused"]
    assert refused == [("site.contract_mismatch", ["site-b"])]


def test_a_second_job_beyond_the_cap_is_refused_before_anything_is_spent(overrides: Make, tmp_path: Path) -> None:
    """Same data, same lineage, another run under another name: what the first job holds is not there for it."""
    from fl_client.agent import open_ledger
    from fl_client.policy import SitePolicy

    contract = run(overrides()).contract
    policy, signer, twice = SitePolicy(approver="test", max_epsilon=8.0), _Signer(), contract.privacy.rounds
    first = open_ledger(contract, "site-a", policy, signer, tmp_path)
    assert first is not None
    for k in range(twice):
        first.reserve(contract.mechanism("site-a"), run=contract.run, contract=contract.digest, round=k + 1, attempt=0,
                      code="0", approver="test")
    spent = first.epsilon()
    first.close()
    with pytest.raises(Refused, match=r"budget\.exhausted"):
        open_ledger(contract.model_copy(update={"run": "f" * 32}), "site-a", policy, signer, tmp_path)
    again = open_ledger(contract, "site-a", policy, signer, tmp_path)
    assert again is not None and again.epsilon() == spent
    again.close()


class _Signer:
    """An Ed25519 key with a throw-away certificate."""

    def __init__(self) -> None:
        from datetime import UTC, datetime, timedelta

        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.x509.oid import NameOID

        self._key = Ed25519PrivateKey.generate()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site-a")])
        now = datetime.now(UTC)
        self.certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1)
                            .public_key(self._key.public_key()).not_valid_before(now)
                            .not_valid_after(now + timedelta(1)).sign(self._key, None))
        self.fingerprint = "0" * 64

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)


def _shape_of_what_leaves(overrides: list[str]) -> list[tuple[str, str, int]]:
    """(stage, code, size) of every reply: what may depend on no record."""
    seen: list[tuple[str, str, int]] = []

    def tap(message: Any, reply: Any) -> None:
        code = reply.error.reason if reply.has_error() else ""
        vectors = 0 if reply.has_error() else sum(len(a.data) for a in reply.content.get("arrays", {}).values())
        seen.append((message.metadata.message_type, code, vectors))

    run(overrides, tap=tap)
    return seen


@pytest.mark.case(8)
def test_attack_poison_record_changes_nothing_that_leaves(overrides: Make, tmp_path: Path,
                                                          tiny_data: dict[str, Path]) -> None:
    """Records that are malformed, mis-labelled, binary or huge: same stages, codes and sizes as without them."""
    poisoned = tmp_path / "poisoned.csv"
    lines = tiny_data["site-a"].read_text().splitlines()
    bad = ['"\x01\x02",heart', ",,,,,", "only one column", f'"{"x" * 200_000}",heart', '"text",no-such-label', '"",skin']
    poisoned.write_text("\n".join([lines[0], *bad, *lines[1 + len(bad):]]) + "\n")
    sites = ",".join(f"{n}:{{file:{poisoned if n == 'site-a' else tiny_data[n]}}}" for n in ("site-a", "site-b", "site-c"))
    clean = _shape_of_what_leaves(overrides("data.labels=[heart,lung,skin]", "privacy.rounds=1"))
    dirty = _shape_of_what_leaves(overrides("data.labels=[heart,lung,skin]", f"data.sites={{{sites}}}", "privacy.rounds=1",
                                            f"server.out={tmp_path / 'dirty'}"))
    assert clean == dirty
    assert not any(code for _, code, _ in dirty)


def test_neighbouring_data_sets_differ_in_no_unnoised_byte(overrides: Make, tmp_path: Path,
                                                           tiny_data: dict[str, Path]) -> None:
    """N against N - 1 records at one site: same contract but for the run's id and keys, same stages, codes and sizes."""
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("\n".join(tiny_data["site-a"].read_text().splitlines()[:-1]) + "\n")
    seen = []
    for name, first in (("n", tiny_data["site-a"]), ("n-1", fewer)):
        files = {**tiny_data, "site-a": first}
        sites = ",".join(f"{n}:{{file:{files[n]},n_decl:60}}" for n in ("site-a", "site-b", "site-c"))
        sizes: list[tuple[str, str, int]] = []

        def tap(message: Any, reply: Any, sizes: list[tuple[str, str, int]] = sizes) -> None:
            kind, code = message.metadata.message_type, reply.error.reason if reply.has_error() else ""
            # M1 carries a certificate, whose ECDSA signature varies in length
            body = 0 if code or kind == "train.update" else len(reply.content["c"]["body"])
            sizes.append((kind, code, body))

        outcome = run(overrides(f"data.sites={{{sites}}}", f"server.out={tmp_path / name}"), tap=tap)
        contract = outcome.contract.model_dump(exclude={"run": True, "expires": True, "sites": {"__all__": {"signer"}}})
        seen.append((contract, sizes))
    assert seen[0] == seen[1]


@pytest.mark.case(31, 34)
def test_attack_exception_text_and_canary_never_leave(overrides: Make, tmp_path: Path, tiny_data: dict[str, Path],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that fails with a record's text in its exception: the coordinator gets a code, and finds no canary."""
    from fl_client.training import LocalTrainer

    canary = "CANARY-7f3a-patient-text"
    leaky = tmp_path / "leaky.csv"
    leaky.write_text(tiny_data["site-a"].read_text() + f"{canary},heart\n")
    sites = ",".join(f"{n}:{{file:{leaky if n == 'site-a' else tiny_data[n]}}}" for n in ("site-a", "site-b", "site-c"))
    received: list[bytes] = []

    def fail(self: LocalTrainer, adapter: Any, round_no: int) -> Any:
        raise RuntimeError(f"bad record: {canary}")

    with monkeypatch.context() as m, pytest.raises(RoundVoid) as caught:
        m.setattr(LocalTrainer, "train", fail)
        run(overrides(f"data.sites={{{sites}}}"), tap=lambda msg, r: received.append(wire(msg, r)))
    assert (caught.value.code, caught.value.sites) == ("secagg.too_few", ("site-a", "site-b", "site-c"))
    assert "site-a: site.failed" in str(caught.value)
    assert canary.encode() not in b"".join(received) + on_disk(tmp_path / "out")
    assert canary not in str(caught.value)


def test_jsonl_and_own_columns_work_by_configuration_alone(overrides: Make, tmp_path: Path,
                                                           tiny_data: dict[str, Path]) -> None:
    import csv

    files = {}
    for name, path in tiny_data.items():
        files[name] = tmp_path / f"{name}.jsonl"
        with path.open() as f:
            rows = [json.dumps({"note": r["text"], "ward": r["label"]}) for r in csv.DictReader(f)]
        files[name].write_text("\n".join(rows) + "\n")
    sites = ",".join(f"{n}:{{file:{files[n]}}}" for n in ("site-a", "site-b", "site-c"))
    outcome = run(overrides(f"data.sites={{{sites}}}", "data.text=note", "data.label=ward", "privacy.rounds=1",
                            f"data.evaluation.file={files['public']}", "data.evaluation.text=note",
                            "data.evaluation.label=ward"))
    assert outcome.contract.data.labels == ("heart", "lung", "skin")
    assert outcome.result.rounds == 1


def test_released_adapter_loads_with_peft_and_gives_the_metric_again(overrides: Make, tmp_path: Path, tiny_model: Path,
                                                                     tiny_data: dict[str, Path]) -> None:
    """With transformers, peft and safetensors alone, as the model card says."""
    import csv

    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    outcome = run(overrides("privacy=none", "privacy.rounds=3", "privacy.q=1.0", "rule.server_lr=1.0"))
    folder = tmp_path / "out" / "adapter"
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), folder).eval()
    head, labels = load_file(folder / "head.safetensors"), (folder / "labels.txt").read_text().splitlines()
    with tiny_data["public"].open() as f:
        rows = list(csv.DictReader(f))
    tokens = AutoTokenizer.from_pretrained(tiny_model)([r["text"] for r in rows], padding="max_length", truncation=True,
                                                       max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        pooled = torch.nn.functional.normalize((out * mask).sum(1) / mask.sum(1), dim=-1) * 10.0
        predicted = (pooled @ head["weight"].T + head["bias"]).argmax(1)
    accuracy = np.mean([labels[p] == r["label"] for p, r in zip(predicted, rows, strict=True)])
    assert accuracy == pytest.approx(outcome.result.after.values["accuracy"], abs=1e-9)


@pytest.mark.case(3)
def test_non_private_run_says_so_everywhere(overrides: Make, tmp_path: Path) -> None:
    outcome = run(overrides("privacy=none", "privacy.rounds=1"))
    page = write_report(tmp_path / "out" / "evidence", tmp_path / "out", ca=outcome.root).read_text()
    assert "NON-PRIVATE" in page.split("</title>")[0]
    assert "NON-PRIVATE" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert outcome.result.epsilon == {}


@pytest.mark.parametrize("how", ["privacy.sampled=person privacy.draws=2", "privacy.sampled=record privacy.k_max=4"])
def test_person_level_federation(overrides: Make, tmp_path: Path, tiny_data: dict[str, Path], how: str) -> None:
    """A person column by configuration alone, both ways of sampling; the evidence verifies."""
    files = {}
    for name, path in tiny_data.items():
        files[name] = tmp_path / f"{name}.csv"
        header, *lines = path.read_text().splitlines()
        files[name].write_text("\n".join([f"{header},who", *(f"{line},p{i // 3}" for i, line in enumerate(lines))]) + "\n")
    sites = ",".join(f"{n}:{{file:{files[n]}}}" for n in ("site-a", "site-b", "site-c"))
    outcome = run(overrides("privacy.unit=person", *how.split(), "data.person=who", f"data.sites={{{sites}}}",
                            "data.floor=10"))
    assert outcome.result.rounds == 2
    assert all(float(e) <= 8.0 for e in outcome.result.epsilon.values())
    assert verify_bundle(tmp_path / "out" / "evidence", outcome.root).verdict == "PASS"
    page = write_report(tmp_path / "out" / "evidence", tmp_path / "out", ca=outcome.root).read_text()
    assert "each single person at each site" in page


def test_schedule_of_two_phases(overrides: Make, tmp_path: Path) -> None:
    outcome = run(overrides("privacy.rounds=3",
                            "privacy.schedule=[{rounds:1,q:0.25,noise:1.5},{rounds:2,q:0.5,noise:1.0}]"))
    said = [p for p in predicates(tmp_path / "out", "round-site") if p["site"] == "site-a"]
    assert [float(p["q"]) for p in said] == [0.25, 0.5, 0.5]
    assert float(said[0]["sigma"]) == pytest.approx(1.5 * float(said[1]["sigma"]))
    assert verify_bundle(tmp_path / "out" / "evidence", outcome.root).verdict == "PASS"


def test_a_folder_holds_one_run(overrides: Make, tmp_path: Path) -> None:
    run(overrides("privacy.rounds=1"))
    before = on_disk(tmp_path / "out")
    with pytest.raises(Refused, match=r"run\.exists"):
        run(overrides("privacy.rounds=1"))
    assert on_disk(tmp_path / "out") == before
