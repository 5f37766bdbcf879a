"""The rules on the log: for each, a lie that breaks it and nothing else. `reseal`: the coordinator lies alone; `relog`: with
sites that sign what it shows them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import evidence_fixture
import pytest
from evidence_fixture import HUB, RUN, SITES, Consortium, contract, relog, reseal, sha, statement_path, write_bundle

import privacy.bundle
from privacy.bundle import BundleWriter
from privacy.canonical import canonical, parse
from privacy.predicates import KINDS
from privacy.statements import make
from privacy.transparency import Entry, Frontier, Head, sign_checkpoint, sign_witness
from privacy.verify import Verdict, verify_bundle

Heads = Mapping[int, Sequence[str]]  # who signs the head of so many entries


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="module")
def good(parties: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("good") / "bundle", parties)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def detail(verdict: Verdict, step: str) -> str:
    return next(s.detail for s in verdict.steps if s.name == step)


def failed(verdict: Verdict) -> set[str]:
    return {s.name for s in verdict.steps if not s.ok}


class Case:
    """A bundle that is changed and then verified."""

    def __init__(self, folder: Path, parties: Consortium) -> None:
        self.folder, self.parties = folder, parties
        before = parse((folder / "log/before.json").read_bytes())
        self.before = Frontier(before["size"], [bytes.fromhex(p) for p in before["peaks"]])
        self.entries = [Entry(*line.split(" ")) for line in (folder / "log/entries.txt").read_text().splitlines()]
        self.sizes = [int(p.stem) for p in self.head_files]

    @property
    def head_files(self) -> list[Path]:
        return sorted((self.folder / "log").glob("[0-9]*.json"))

    def fails(self, step: str, words: str) -> None:
        """At that step, for that reason, and nowhere else; by the coordinator's word all is well."""
        verdict = verify_bundle(reseal(self.folder, self.parties), self.parties.fingerprint)
        assert verdict.verdict == "FAIL"
        assert failed(verdict) == {step}, verdict.as_dict()
        assert words in detail(verdict, step), detail(verdict, step)

    def passes(self) -> Verdict:
        verdict = verify_bundle(reseal(self.folder, self.parties), self.parties.fingerprint)
        assert verdict.verdict == "PASS", verdict.as_dict()
        return verdict

    def log(self, heads: Heads, before: Frontier | None = None, entries: Sequence[Entry] | None = None, **head: Any) -> None:
        """Another log with these signed heads: what the coordinator and these sites can sign. head: changes to it."""
        before = self.before if before is None else before
        entries = self.entries if entries is None else entries
        shutil.rmtree(self.folder / "log")
        tree = Frontier(before.size, list(before.peaks))
        (self.folder / "manifest.json").unlink(missing_ok=True)
        writer = BundleWriter(self.folder, RUN, (self.folder / "contract.json").read_bytes(),
                              (self.folder / "certificates/root.pem").read_bytes(), {}, {})
        for entry in entries:
            tree.append(entry.leaf)
            if tree.size in heads:
                said = Head(**{"log": HUB, "size": tree.size, "root": tree.root.hex(), **head})
                writer.add_checkpoint(tree.size, sign_checkpoint(self.parties.signers[HUB], said), {
                    name: sign_witness(self.parties.signers[name], name, said) for name in heads[tree.size]})
        writer.set_log(before, entries)

    def edit(self, size: int, change: Callable[[dict[str, Any]], Any], where: int | None = None) -> None:
        """One file of a signed head."""
        path = self.folder / f"log/{size:08d}.json"
        said = parse(path.read_bytes())
        changed = change(said)
        path.with_name(f"{where or size:08d}.json").write_bytes(canonical(said if changed is None else changed))

    def drop(self, *paths: Path) -> None:
        """Statements, as if they had never been made; the numbers close up."""
        for path in paths:
            path.unlink()
        for number, path in enumerate(sorted((self.folder / "statements").iterdir()), 1):
            path.rename(path.with_name(f"{number:06d}{path.name[6:]}"))

    def say(self, kind: str, who: str, subject: str, **said: Any) -> Path:
        """One statement more."""
        agreed = contract(self.parties.signers)
        number = 1 + len(list((self.folder / "statements").iterdir()))
        path = self.folder / f"statements/{number:06d}-{kind}-{who}.json"
        path.write_bytes(make(self.parties.signers[who], KINDS[kind].predicate_type, [(kind, subject)],
                              {"run": RUN, "contract": agreed.digest, **said}))
        return path


@pytest.fixture
def case(copy: Path, parties: Consortium) -> Case:
    return Case(copy, parties)


def entry(path: Path, run: str = RUN) -> Entry:
    return Entry(run, hashlib.sha256(path.read_bytes()).hexdigest())


# What holds ----------------------------------------------------------------------------------------------------------

def test_entries_before_and_of_other_runs_are_commitments(case: Case) -> None:
    assert case.before.size == 3, "the fixture's log is older than the run"
    other = [Entry("cd" * 16, sha("other", i)) for i in range(4)]
    mixed = [*other[:2], *case.entries[:9], other[2], *case.entries[9:], other[3]]
    case.log({case.before.size + len(mixed): SITES}, entries=mixed)
    said = case.passes()
    assert f"exactly these {len(case.entries)} statements" in detail(said, "inclusion")
    assert "4 of other runs, made meanwhile, as commitments" in detail(said, "inclusion")
    assert f"one log of {3 + len(mixed)} entries" in detail(said, "consistency")


def test_first_run_of_a_log(case: Case) -> None:
    case.log({len(case.entries): SITES}, before=Frontier())
    case.passes()


def test_a_head_of_the_part_before_the_run(case: Case) -> None:
    """As a run has that states nothing before its first checkpoint."""
    head = Head(log=HUB, size=case.before.size, root=case.before.root.hex())
    case.edit(case.sizes[0], lambda said: {
        "checkpoint": sign_checkpoint(case.parties.signers[HUB], head).decode(), "witnesses": {}}, where=case.before.size)
    case.passes()


def test_interrupted_attempt(parties: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job ends in an attempt that was charged and has no result; sites that vanished show no ledger."""
    monkeypatch.setattr(evidence_fixture, "ATTEMPTS", ((1, 0, True), (2, 0, False)))
    edit = lambda kind, p: {**p, "metric_after": "0.6"} if kind == "release" else p  # noqa: E731
    case = Case(write_bundle(tmp_path / "b", parties, edit=edit), parties)
    assert "1 void attempts" in detail(case.passes(), "rounds")
    case.log({case.sizes[0]: SITES, case.sizes[-1]: SITES[:2]})
    assert "only 2 sites signed" in detail(case.passes(), "witnesses")


def test_three_of_four_witnesses_are_enough(case: Case) -> None:
    case.log(dict.fromkeys(case.sizes, SITES[1:]))
    assert "3 of 4 sites signed the log: clinic-b, clinic-c, clinic-d" in detail(case.passes(), "witnesses")


# Inclusion -----------------------------------------------------------------------------------------------------------

def test_dropped_statement(case: Case) -> None:
    case.drop(statement_path(case.folder, "evaluation", HUB, 2))
    case.fails("inclusion", "a statement of this run that the log holds is missing")


def test_added_statement(parties: Consortium, tmp_path: Path) -> None:
    """Made up afterwards, true as it may be."""
    edit = lambda kind, p: None if kind == "evaluation" and p["round"] == 2 else p  # noqa: E731
    case = Case(write_bundle(tmp_path / "b", parties, edit=edit), parties)
    case.passes()
    case.say("evaluation", HUB, sha("adapter", 2), round=2, adapter=sha("adapter", 2), metric_name="accuracy",
             metric="0.99", split="public test", units=400)
    case.fails("inclusion", "there is a statement that the log doesn't hold")


def test_exchanged_statement(case: Case) -> None:
    """The figures of an evaluation are made better after the log has closed."""
    old = statement_path(case.folder, "evaluation", HUB, 2)
    new = case.say("evaluation", HUB, sha("adapter", 2), round=2, adapter=sha("adapter", 2), metric_name="accuracy",
                   metric="0.99", split="public test", units=400)
    new.replace(old)
    case.fails("inclusion", "there is a statement that the log doesn't hold")


def test_reordered_statements(case: Case) -> None:
    a, b = (statement_path(case.folder, "acceptance", name) for name in SITES[:2])
    a.rename(case.folder / "aside")
    b.rename(b.with_name(f"{a.name[:6]}{b.name[6:]}"))
    (case.folder / "aside").rename(a.with_name(f"{b.name[:6]}{a.name[6:]}"))
    case.fails("inclusion", "not in the order of the log")


def test_statement_shown_twice(case: Case) -> None:
    path = statement_path(case.folder, "contract", "lab")
    shutil.copy(path, case.folder / f"statements/{len(case.entries) + 1:06d}-contract-lab.json")
    verdict = verify_bundle(reseal(case.folder, case.parties), case.parties.fingerprint)
    assert "inclusion" in failed(verdict)


def test_entry_that_is_logged_twice(case: Case) -> None:
    twice = [*case.entries, case.entries[4]]
    case.log({case.before.size + len(twice): SITES}, entries=twice)
    case.fails("inclusion", "holds a statement of this run twice")


def test_statement_logged_under_another_run(case: Case) -> None:
    at = len(case.entries) // 2
    swapped = [*case.entries[:at], Entry("cd" * 16, case.entries[at].sha256), *case.entries[at + 1:]]
    case.log({case.before.size + len(swapped): SITES}, entries=swapped)
    case.fails("inclusion", "there is a statement that the log doesn't hold")


def test_statement_of_this_run_that_nobody_shows(case: Case) -> None:
    """Logged, and then regretted: as a commitment of this run it can't pass for another run's."""
    more = [*case.entries, Entry(RUN, sha("regretted"))]
    case.log({case.before.size + len(more): SITES}, entries=more)
    case.fails("inclusion", "that the log holds is missing")


def test_statement_hidden_in_the_part_before_the_run(case: Case) -> None:
    before = Frontier(case.before.size, list(case.before.peaks))
    before.append(case.entries[0].leaf)
    case.log(dict.fromkeys(case.sizes, SITES), before=before, entries=case.entries[1:])
    case.fails("inclusion", "there is a statement that the log doesn't hold")


def test_void_attempt_left_out_by_all(parties: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinator and witnesses agree on a log without the job's last, void attempt; only the ledgers know better."""
    monkeypatch.setattr(evidence_fixture, "ATTEMPTS", ((1, 0, True), (2, 0, False)))
    edit = lambda kind, p: {**p, "metric_after": "0.6"} if kind == "release" else p  # noqa: E731
    bundle = write_bundle(tmp_path / "b", parties, edit=edit)
    case = Case(bundle, parties)
    gone = [p for p in sorted((bundle / "statements").iterdir()) if "-round" in p.name
            and (said := _predicate(p))["round"] == 2 and said["attempt"] == 0]
    case.drop(*gone)
    verdict = verify_bundle(relog(bundle, parties), parties.fingerprint)
    assert failed(verdict) == {"ledgers", "epsilon"}
    assert "charged that the coordinator doesn't account for" in detail(verdict, "ledgers")


def _predicate(path: Path) -> dict[str, Any]:
    from base64 import b64decode

    return dict(parse(b64decode(parse(path.read_bytes())["payload"]))["predicate"])


# Consistency ---------------------------------------------------------------------------------------------------------

def test_two_histories_each_with_its_witnesses(case: Case) -> None:
    """With all sites lying: two heads that nobody can have seen one after the other."""
    heads = dict.fromkeys(case.sizes, SITES)
    case.log(heads)
    other = Case(Path(shutil.copytree(case.folder, case.folder.with_name("other"))), case.parties)
    other.log(heads, entries=[Entry(RUN, sha("another history")), *case.entries[1:]])
    name = f"log/{case.sizes[2]:08d}.json"
    shutil.copy(other.folder / name, case.folder / name)
    case.fails("consistency", "there is another history")


def test_history_with_another_beginning(case: Case) -> None:
    """The same run in two logs that differ in other runs: heads of the one under the other."""
    before = Frontier()
    for i in range(3):
        before.append(Entry("cd" * 16, sha("another earlier", i)).leaf)
    heads = {p.name: p.read_bytes() for p in case.head_files}
    case.log(dict.fromkeys(case.sizes, SITES), before=before)
    case.passes()
    for name, data in heads.items():
        (case.folder / "log" / name).write_bytes(data)
    case.fails("consistency", "there is another history")


def test_entry_of_another_run_changed(case: Case) -> None:
    other = [Entry("cd" * 16, sha("other")), *case.entries]
    case.log(dict.fromkeys([case.sizes[-1] + 1], SITES), entries=other)
    case.passes()
    text = (case.folder / "log/entries.txt").read_text()
    (case.folder / "log/entries.txt").write_text(text.replace(sha("other"), sha("changed")))
    case.fails("consistency", "there is another history")


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_entries_after_the_last_head(cut: int, case: Case) -> None:
    """The coordinator appended what no site was shown."""
    more = [*case.entries, *(Entry("cd" * 16, sha("late", i)) for i in range(cut))]
    (case.folder / "log/entries.txt").write_text("".join(f"{e.line()}\n" for e in more))
    case.fails("consistency", "no signed head covers the whole log")


def test_last_head_taken_away(case: Case) -> None:
    case.head_files[-1].unlink()
    case.fails("consistency", "no signed head covers the whole log")


def test_older_head_in_the_place_of_the_last(case: Case) -> None:
    case.edit(case.sizes[-2], lambda said: None, where=case.sizes[-1])
    case.fails("consistency", "of another log or size")


@pytest.mark.parametrize("where", [2, 4711])
def test_head_of_what_the_log_does_not_have(where: int, case: Case) -> None:
    head = Head(log=HUB, size=where, root=sha("x"))
    case.edit(case.sizes[0], lambda said: {
        "checkpoint": sign_checkpoint(case.parties.signers[HUB], head).decode(), "witnesses": {}}, where=where)
    case.fails("consistency", "more or fewer entries than the log has")


def test_head_of_another_log(case: Case) -> None:
    case.log(dict.fromkeys(case.sizes, SITES), log="hub-2")
    case.fails("consistency", "of another log or size")


@pytest.mark.parametrize("lie", ["site", "foreign", "witness", "garbage"])
def test_head_that_the_coordinator_did_not_sign(lie: str, case: Case, tmp_path: Path) -> None:
    size, signers = case.sizes[1], case.parties.signers
    tree = Frontier(case.before.size, list(case.before.peaks))
    for each in case.entries[:size - tree.size]:
        tree.append(each.leaf)
    head = Head(log=HUB, size=size, root=tree.root.hex())
    forged = {"site": lambda: sign_checkpoint(signers["clinic-a"], head), "garbage": lambda: b"{}",
              "foreign": lambda: sign_checkpoint(Consortium(tmp_path / "foreign").signers[HUB], head),
              "witness": lambda: sign_witness(signers[HUB], HUB, head)}[lie]()
    case.edit(size, lambda said: {"checkpoint": forged.decode(), "witnesses": {}})
    case.fails("consistency", "is refused (")


def test_root_changed_by_the_coordinator_and_all_sites(case: Case) -> None:
    case.log(dict.fromkeys(case.sizes, SITES), root=sha("x"))
    case.fails("consistency", "there is another history")


@pytest.mark.parametrize("data", [
    b"", b"{", b"[]", b'{"peaks":[],"size":0,"x":1}', b'{"peaks":[],"size":1}', b'{"peaks":["00"],"size":1}',
    b'{"peaks":["%s"],"size":0}' % (b"0" * 64), b'{"peaks":["%s"],"size":true}' % (b"0" * 64),
    b'{"peaks":["%s"],"size":-1}' % (b"0" * 64), b'{"peaks":["%s"],"size":1e0}' % (b"0" * 64),
    b'{"peaks":["%s"],"size":1}' % (b"A" * 64), b'{"peaks":["%s"],"size":1}' % ("١".encode() * 64),
    b'{"peaks":[%s],"size":1}' % b",".join([b'"%s"' % (b"0" * 64)] * 5000),
    b'{"peaks":["%s"],"size":%d}' % (b"0" * 64, 2**60)])
def test_part_before_the_run_of_another_form(data: bytes, case: Case) -> None:
    (case.folder / "log/before.json").write_bytes(data)
    verdict = verify_bundle(reseal(case.folder, case.parties), case.parties.fingerprint)
    assert failed(verdict) == {"consistency", "witnesses"}
    assert detail(verdict, "consistency") == detail(verdict, "witnesses")
    assert "refused (" in detail(verdict, "consistency")


@pytest.mark.parametrize("edit", [
    lambda d: d + b"\n", lambda d: d.replace(b',"size"', b', "size"'), lambda d: b'{"size":3,' + d[1:],
    lambda d: b'{"size":3,"size":3}', lambda d: d.replace(b'"size":3', b'"size":3.0')])
def test_part_before_the_run_is_canonical(edit: Callable[[bytes], bytes], case: Case) -> None:
    path = case.folder / "log/before.json"
    path.write_bytes(edit(path.read_bytes()))
    verdict = verify_bundle(reseal(case.folder, case.parties), case.parties.fingerprint)
    assert failed(verdict) == {"consistency", "witnesses"}


def test_part_before_the_run_missing_or_of_another_size(case: Case) -> None:
    path = case.folder / "log/before.json"
    said = parse(path.read_bytes())
    path.write_bytes(canonical({"size": 5, "peaks": said["peaks"]}))
    assert failed(verify_bundle(reseal(case.folder, case.parties), case.parties.fingerprint)) >= {"consistency"}
    path.unlink()
    assert failed(verify_bundle(reseal(case.folder, case.parties), case.parties.fingerprint)) == {"consistency", "witnesses"}


@pytest.mark.parametrize("edit", [
    lambda d: d[:-1], lambda d: d + b"\n", lambda d: d.replace(b"\n", b"\r\n"), lambda d: b"\n" + d,
    lambda d: d.replace(b" ", b"  "), lambda d: d.replace(RUN.encode(), RUN.upper().encode(), 1),
    lambda d: d.replace(b"ab", "١ب".encode()[:2], 1), lambda d: d + RUN.encode() + b" 00\n", lambda d: d + b"\xff\n",
    lambda d: "١".encode() * 32 + d[32:], lambda d: d.replace(b"\n", b"\x0b"),
    lambda d: d.replace(b"\n", "\u2028".encode()), lambda d: d.replace(b" ", b"\xff ", 1)])
def test_entries_of_another_form(edit: Callable[[bytes], bytes], case: Case) -> None:
    path = case.folder / "log/entries.txt"
    path.write_bytes(edit(path.read_bytes()))
    verdict = verify_bundle(reseal(case.folder, case.parties), case.parties.fingerprint)
    assert failed(verdict) == {"inclusion", "consistency", "witnesses"}
    assert {detail(verdict, step) for step in ("inclusion", "consistency", "witnesses")} == {"refused (log.form)"}


@pytest.mark.parametrize("edit", [
    lambda d: d + b"\n", lambda d: b" " + d, lambda d: b"{}", lambda d: b"[]", lambda d: b"",
    lambda d: d[:-1] + b',"more":{}}', lambda d: d.replace(b'"witnesses":{', b'"witnesses":{"clinic-a":7,'),
    lambda d: b'{"checkpoint":"x",' + d[1:], lambda d: d.replace(b'"clinic-a":', b'"clinic-a":"","clinic-a":')])
def test_file_of_a_head_of_another_form(edit: Callable[[bytes], bytes], case: Case) -> None:
    path = case.head_files[1]
    path.write_bytes(edit(path.read_bytes()))
    case.fails("consistency", f"log/{path.name} is refused (")


@pytest.mark.parametrize("name", ["log/0000001.json", "log/000000001.json", "log/١0000001.json", "log/entries.json",
                                  "log/before.txt", "log/00000001.json.json", "statements/٠٠٠٠01-round-hub.json"])
def test_file_of_the_log_under_a_strange_name(name: str, case: Case) -> None:
    """Digits of another script would be a second file of one number."""
    (case.folder / name).write_bytes(b"{}")
    verdict = verify_bundle(case.folder, case.parties.fingerprint)
    assert failed(verdict) >= {"files"}
    assert "bundle.layout" in verdict.steps[0].detail


# Witnesses -----------------------------------------------------------------------------------------------------------

def test_too_few_witnesses(case: Case) -> None:
    case.log(dict.fromkeys(case.sizes, SITES[:2]))
    case.fails("witnesses", "under no head that 3 sites signed")


def test_too_few_on_each_of_two_histories(case: Case) -> None:
    """Four sites, one of which lies: shown two histories, neither has the three that are needed."""
    for who in (("clinic-a", "clinic-b"), ("clinic-b", "clinic-c")):
        case.log(dict.fromkeys(case.sizes, who))
        case.fails("witnesses", "under no head")


def test_no_witness_at_all(case: Case) -> None:
    case.log(dict.fromkeys(case.sizes, ()))
    case.fails("witnesses", "under no head")


@pytest.mark.parametrize("attempts", [((1, 0, True),), ((1, 0, False),)])
def test_no_witness_of_a_run_of_one_round_or_none(attempts: Any, parties: Consortium, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last round is its first; and that no round was done is a history, too."""
    monkeypatch.setattr(evidence_fixture, "ATTEMPTS", attempts)
    edit = lambda kind, p: None if kind == "release" and not attempts[0][2] else (  # noqa: E731
        {**p, "metric_after": "0.6"} if kind == "release" else p)
    case = Case(write_bundle(tmp_path / "b", parties, edit=edit), parties)
    case.passes()
    case.log(dict.fromkeys(case.sizes, ()))
    case.fails("witnesses", "under no head")


def test_witnesses_of_the_start_alone(case: Case) -> None:
    """They signed something once; all but the last round must lie under a head of theirs."""
    case.log({size: SITES if i < 2 else () for i, size in enumerate(case.sizes)})
    case.fails("witnesses", "under no head")


def test_last_round_uncovered_is_named(case: Case) -> None:
    *covered, last_round, end = case.sizes
    case.log({**dict.fromkeys(covered, SITES), last_round: SITES[:2], end: SITES[2:]})
    said = detail(case.passes(), "witnesses")
    assert f"THE LAST ROUND AND what came later (entries {covered[-1] + 1} to {end}) only 2 sites signed" in said


def test_void_attempts_after_the_last_round_do_not_count_as_rounds(parties: Consortium, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_fixture, "ATTEMPTS", ((1, 0, True), (2, 0, True), (3, 0, False)))
    edit = lambda kind, p: {**p, "metric_after": "0.75"} if kind == "release" else p  # noqa: E731
    case = Case(write_bundle(tmp_path / "b", parties, edit=edit), parties)
    case.log({case.sizes[0]: SITES, case.sizes[-1]: ()})
    assert "THE LAST ROUND AND" in detail(case.passes(), "witnesses")


def test_what_came_after_the_last_round_uncovered_is_named(case: Case) -> None:
    *covered, end = case.sizes
    case.log({**dict.fromkeys(covered, SITES), end: ()})
    said = detail(case.passes(), "witnesses")
    assert f"; what came later (entries {covered[-1] + 1} to {end}) only 0 sites signed" in said
    assert "LAST ROUND" not in said


def test_round_that_is_stated_after_the_heads_that_sites_signed(parties: Consortium, tmp_path: Path) -> None:
    """Exactly at the edge: a head that ends before the round's own statement doesn't cover it."""
    case = Case(write_bundle(tmp_path / "b", parties), parties)
    place = {e.sha256: i for i, e in enumerate(case.entries, case.before.size + 1)}
    done = [place[entry(p).sha256] for p in sorted((case.folder / "statements").glob("*-round-hub.json"))
            if _predicate(p)["outcome"] == "done"]
    case.log({done[1]: SITES, case.sizes[-1]: ()})
    assert "THE LAST ROUND" in detail(case.passes(), "witnesses")
    case.log({done[1] - 1: SITES, case.sizes[-1]: ()})
    case.fails("witnesses", "under no head")


Forge = Callable[[Consortium, Head, Path], bytes]
FORGED: dict[str, Forge] = {
    "by the coordinator": lambda p, head, _: sign_witness(p.signers[HUB], "clinic-a", head),
    "by another site": lambda p, head, _: sign_witness(p.signers["clinic-b"], "clinic-a", head),
    "by another site, for itself": lambda p, head, _: sign_witness(p.signers["clinic-b"], "clinic-b", head),
    "for another site": lambda p, head, _: sign_witness(p.signers["clinic-a"], "clinic-b", head),
    "by a site of that name elsewhere": lambda p, head, tmp: sign_witness(
        Consortium(tmp / "foreign").signers["clinic-a"], "clinic-a", head),
    "of another root": lambda p, head, _: sign_witness(
        p.signers["clinic-a"], "clinic-a", head.model_copy(update={"root": sha("x")})),
    "of another size": lambda p, head, _: sign_witness(
        p.signers["clinic-a"], "clinic-a", head.model_copy(update={"size": head.size - 1})),
    "of another log": lambda p, head, _: sign_witness(
        p.signers["clinic-a"], "clinic-a", head.model_copy(update={"log": "hub-2"})),
    "that is a checkpoint": lambda p, head, _: sign_checkpoint(p.signers["clinic-a"], head),
    "that is nothing": lambda p, head, _: b"",
}


@pytest.mark.parametrize("forged", FORGED)
def test_witness(forged: str, case: Case, tmp_path: Path) -> None:
    """Enough others are true; a false one fails all the same."""
    from privacy.transparency import open_checkpoint

    hub = case.parties.signers[HUB]

    def change(said: dict[str, Any]) -> None:
        head = open_checkpoint(said["checkpoint"].encode(), {hub.fingerprint: hub.certificate})
        said["witnesses"]["clinic-a"] = FORGED[forged](case.parties, head, tmp_path).decode()

    case.edit(case.sizes[-1], change)
    case.fails("witnesses", "a witness of the head of")


@pytest.mark.parametrize("name", ["clinic-x", HUB, "lab", "", "../clinic-a", "clinic-A"])
def test_witness_that_is_no_site(name: str, case: Case) -> None:
    case.edit(case.sizes[-1], lambda said: said["witnesses"].update({name: said["witnesses"].pop("clinic-a")}))
    case.fails("witnesses", "is refused (statement.key)")


@pytest.mark.parametrize("who", [HUB, "lab"])
def test_coordinator_and_engineer_are_no_witnesses(who: str, case: Case) -> None:
    """Or the coordinator could make up for a site that doesn't sign."""
    for sites in (SITES[:2], SITES):
        case.log(dict.fromkeys(case.sizes, (*sites, who)))
        case.fails("witnesses", "is refused (statement.key)")


def test_witnesses_exchanged(case: Case) -> None:
    def change(said: dict[str, Any]) -> None:
        w = said["witnesses"]
        w["clinic-a"], w["clinic-b"] = w["clinic-b"], w["clinic-a"]

    case.edit(case.sizes[0], change)
    case.fails("witnesses", "is refused (statement.key)")


def test_witnesses_of_an_older_head_under_a_newer_one(case: Case) -> None:
    old = parse(case.head_files[-2].read_bytes())["witnesses"]
    case.edit(case.sizes[-1], lambda said: {**said, "witnesses": old})
    case.fails("witnesses", "signed another head")


def test_witness_of_an_entrys_twin_in_another_run(case: Case) -> None:
    """A round's digest, logged early under another run, doesn't bring the round under an early head."""
    place = {e.sha256: e for e in case.entries}
    twins = [Entry("cd" * 16, place[entry(p).sha256].sha256)
             for p in sorted((case.folder / "statements").glob("*-round-hub.json"))]
    mixed = [*twins, *case.entries]
    case.log({case.before.size + len(twins): SITES, case.before.size + len(mixed): ()}, entries=mixed)
    case.fails("witnesses", "under no head")


# Ledgers -------------------------------------------------------------------------------------------------------------

def silence(case: Case, name: str) -> None:
    """That site's ledger and closing statement never came."""
    statement_path(case.folder, "closing", name).unlink()
    case.drop()
    (case.folder / f"ledgers/{name}.jsonl").unlink()
    digests = {entry(p).sha256 for p in (case.folder / "statements").iterdir()}
    case.entries = [e for e in case.entries if e.sha256 in digests]
    case.sizes[-1] -= 1


def test_site_that_witnessed_the_end_and_shows_no_ledger(case: Case) -> None:
    silence(case, "clinic-b")
    case.log(dict.fromkeys(case.sizes, SITES))
    verdict = verify_bundle(reseal(case.folder, case.parties), case.parties.fingerprint)
    assert failed(verdict) == {"ledgers", "epsilon"}
    assert "that signed the log's last head, shows no ledger" in detail(verdict, "ledgers")


def test_site_that_vanished_is_named(case: Case) -> None:
    silence(case, "clinic-b")
    rest = [name for name in SITES if name != "clinic-b"]
    case.log({**dict.fromkeys(case.sizes, SITES), case.sizes[-1]: rest})
    assert "WITHOUT A LEDGER, which never came: clinic-b" in detail(case.passes(), "ledgers")


# Time ----------------------------------------------------------------------------------------------------------------

def test_log_is_read_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work grows with the log, not with its square: each entry is hashed once, each signature checked once."""
    import privacy.transparency

    calls = {"leaf": 0, "open": 0}
    leaf, opened = privacy.transparency.Entry.leaf.fget, privacy.transparency.open_envelope  # type: ignore[attr-defined]
    monkeypatch.setattr(privacy.transparency.Entry, "leaf", property(
        lambda self: (calls.__setitem__("leaf", calls["leaf"] + 1), leaf(self))[1]))
    monkeypatch.setattr(privacy.transparency, "open_envelope",
                        lambda *a: (calls.__setitem__("open", calls["open"] + 1), opened(*a))[1])
    case.passes()
    assert calls == {"leaf": len(case.entries), "open": len(case.sizes) * (1 + len(SITES))}


def test_names_of_the_layout_are_ascii() -> None:
    assert not privacy.bundle.LAYOUT.names.fullmatch("log/١٢٣٤٥٦٧٨.json")
    assert not privacy.bundle.LAYOUT.names.fullmatch("statements/١٢٣٤٥٦-round-hub.json")
    assert privacy.bundle.LAYOUT.names.fullmatch("log/12345678.json")
