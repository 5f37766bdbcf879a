"""Histories under faults: honest code violates nothing, every planted bug is found, and what was found can be replayed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random

import chaos_plants as plants
import pytest

import simulations.chaos as chaos_module
import simulations.chaos_world as world_module
from fl_server.log import TransparencyLog
from privacy import cli_edge
from privacy.bundle import BundleWriter
from privacy.errors import Refused
from privacy.files import FileLayer, write_private
from privacy.ledger import Ledger
from privacy.ledger_records import Register, sign_record
from privacy.transparency import Entry
from simulations.chaos import Chaos, Player, chaos
from simulations.chaos_machine import Crash, Machine, System, installed
from simulations.chaos_parts import Consortium
from simulations.chaos_plan import Fault, Plan
from simulations.cli import app

CALM = 0.0
Find = tuple[plants.Plant, str]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("chaos") / "consortium", chaos_module.MOST_SITES)


@pytest.fixture(scope="module")
def player(consortium: Consortium) -> Iterator[Player]:
    with Player(0, ["privacy.rounds=2"], consortium=consortium) as player:
        yield player


def found(player: Player, seed: int, histories: range) -> set[str]:
    """Rules that the first history with a violation breaks."""
    player.seed = seed
    for history in histories:
        rules = {v.rule for v in player.play(history).violations}
        if rules:
            return rules
    return set()


class Directed(Plan):
    """The named faults strike, and no other."""

    due: Mapping[str, str] = {}

    def draw(self, place: str, rates: Mapping[str, float]) -> Fault | None:
        kind = self.due.get(place)
        return Fault(place, kind, Random(0)) if kind else None


def directed(player: Player, monkeypatch: pytest.MonkeyPatch, **due: str) -> set[str]:
    monkeypatch.setattr(Directed, "due", {place.replace("__", "."): kind for place, kind in due.items()})
    monkeypatch.setattr(chaos_module, "Plan", Directed)
    return {f"{v.rule}: {v.what}" for v in player.play(0).violations}


def test_a_history_without_faults_is_done_round_by_round(player: Player) -> None:
    player.seed = 0
    played = player.play(0, only=())
    assert not played.violations and not played.faults and not played.void
    assert played.rounds >= 2 and set(played.ends) == {"done"}


def test_histories_under_faults_violate_nothing(player: Player) -> None:
    player.seed = 4
    played = player.play(1)
    assert not played.violations and played.rounds >= 2 and len(played.faults) >= 20


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1000, 1020))
def test_a_thousand_rounds_of_twenty_seeds_violate_nothing(seed: int) -> None:
    out = chaos(seed, 50)
    assert out.rounds >= 50 and not out.violations, out.as_dict()


def test_the_same_seed_is_the_same_history(player: Player) -> None:
    """Keys, masks and rounding differ; when which fault strikes, and what comes of it, doesn't."""
    player.seed = 1
    first, again = player.play(0), player.play(0)
    assert first.faults and first.trace
    assert (first.faults, first.trace) == (again.faults, again.trace)


QUICK: dict[str, str] = {  # plant -> rule, in the first histories of seed 0
    "reserves_not_synced": "charge-before-draw", "journal_not_synced": "journal-before-statement",
    "no_fsync_of_the_folder": "head-before-signature",
    "names_not_synced": "log-before-head", "drawn_before_the_reserve": "charge-before-draw",
    "drawn_twice": "one-draw", "not_committed": "charge-before-send", "secrets_kept_for_a_retry": "fresh-secrets",
    "masks_out_of_context": "fresh-secrets", "replies_made_anew": "stored-reply",
    "started_is_not_journaled": "journal-before-key",
    "spent_is_not_journaled": "journal-before-vector", "unmasked_is_not_journaled": "journal-before-shares",
    "statements_not_kept": "journal-before-statement", "witness_forgets": "head-before-signature",
    "head_before_entries": "log-before-head", "one_site_more": "exact-sum", "epsilon_halved": "evidence",
    "refusals_pile_up": "bounded-disk"}
BUSY = 1  # a seed under which much happens at once
DEEP = ("begun_again", "errors_of_the_disk_ignored", "refunded_after_a_restart", "two_agents", "key_created_in_place",
        "torn_creation", "asked_once", "untyped_error")


@pytest.mark.parametrize("name", QUICK)
def test_planted_bug_is_found(player: Player, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    getattr(plants, name)(monkeypatch)
    assert QUICK[name] in found(player, BUSY, range(1, 6))


def test_planted_second_mask_of_one_attempt_is_found(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    plants.rounded_anew(monkeypatch)
    assert {"one-vector", "mask-once", "stored-reply"} <= found(player, 5, range(1))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DEEP)
def test_planted_bug_is_found_in_time(player: Player, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    getattr(plants, name)(monkeypatch)
    assert any(found(player, seed, range(12)) for seed in range(6))


@pytest.mark.parametrize("name", ["applied_twice", *(pytest.param(name, marks=pytest.mark.long) for name in (
    "change_lost", "momentum_lost", "attempts_forgotten", "unsealed_by_an_error"))])
@pytest.mark.timeout(900)
def test_planted_bug_of_recovery_is_found(player: Player, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Under a coordinator that is killed near its journal's writes, again and again."""
    kind = "full" if name == "unsealed_by_an_error" else "kill"
    monkeypatch.setattr(world_module, "COORDINATOR_DISK", {kind: 9.0})
    monkeypatch.setattr(world_module, "COORDINATOR_AIMS", ("journal.jsonl", "-round-coordinator"))
    getattr(plants, name)(monkeypatch)
    assert found(player, 3, range(12)) & {"round-once", "one-offer", "adapter-chain", "exact-sum", "evidence"}


def test_a_closing_statement_that_was_lost_is_asked_for_again(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    due = {"run1.site-b.closing1.answered": "reply-lost", "run1.site-c.witness1.answered": "reply-lost",
           "run1.site-a.accept1.asked": "lost"}
    assert directed(player, monkeypatch, **{p.replace(".", "__"): k for p, k in due.items()}) == set()
    plants.asked_once(monkeypatch)
    assert "signed the log's last head, shows no ledger" in " ".join(directed(player, monkeypatch, **{
        "run1__site-b__closing1__answered": "reply-lost"}))


def test_a_violation_comes_with_the_command_that_replays_it(monkeypatch: pytest.MonkeyPatch, consortium: Consortium,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(chaos_module, "Consortium", lambda folder, n: consortium)
    monkeypatch.setattr(chaos_module, "SHRINK", 4)
    plants.replies_made_anew(monkeypatch)
    assert cli_edge.run(app, ["chaos", "--seed", "1", "--history", "1", "--rounds", "1", "privacy.rounds=2", "--json"]) == 1
    out = capsys.readouterr()
    seen = json.loads(out.out.splitlines()[-1])
    assert {"rounds", "void", "faults", "violations"} <= seen.keys() and seen["violations"] >= 1
    assert seen["found"][0]["rule"] == "stored-reply" and 1 <= len(seen["replay"]["faults"]) < seen["faults"] / 2
    assert f"Replay: {seen['replay']['command']}" in out.err
    argv = seen["replay"]["command"].split()[1:]
    assert cli_edge.run(app, argv) == 1
    assert "stored-reply" in capsys.readouterr().err
    argv[argv.index("--only") + 1] = "none"
    assert cli_edge.run(app, argv) == 0


@pytest.mark.parametrize("when", ["write", "rename"])
def test_what_a_killed_process_left_is_durable_before_it_counts(machine: tuple[System, Machine], when: str,
                                                                consortium: Consortium) -> None:
    """Killed between a write and its fsync: what the next process finds is made durable before anything is built on it."""
    system, m = machine
    first, second = system.start(m, "first"), system.start(m, "second")
    signer, entry = consortium.signers["coordinator"], Entry("ab" * 16, "cd" * 32)
    if when == "write":
        with system.running(first):
            log = TransparencyLog(m.root / "log", "coordinator", signer)
            fd = FileLayer().open_append(m.root / "log" / "entries.txt")
            _write(system, fd, entry.line().encode() + b"\n")
            m.kill(first)
        with system.running(second):
            log = TransparencyLog(m.root / "log", "coordinator", signer)
            assert log.extend([entry])[0].size == 1
            assert m.durable(m.root / "log" / "entries.txt") == entry.line().encode() + b"\n"
        return
    folder = m.root / "evidence"
    with system.running(first):
        BundleWriter(folder, entry.run, b"{}", b"pem", {}, {})
        (folder / "statements" / ".tmp").write_bytes(b"said")
        system.replace(folder / "statements" / ".tmp", path := folder / "statements" / "000001-round-coordinator.json")
        assert m.durable(path) == b"" and path.read_bytes() == b"said"
        m.kill(first)
    with system.running(second):
        assert [kind for kind, _, _ in BundleWriter(folder, entry.run, b"{}", b"pem", {}, {}).statements()] == ["round"]
        assert path not in m.unnamed


def test_a_ledger_is_durable_once_it_is_open(machine: tuple[System, Machine], consortium: Consortium) -> None:
    """Else a closing record that is found could be signed for, and lost."""
    system, m = machine
    path, signer, first = m.root / "ledger.jsonl", consortium.signers["site-a"], system.start(m, "first")
    with system.running(first):
        ledger = Ledger.create(path, signer, lineage="ab" * 16, unit="record", adjacency="add_remove", delta=1e-5, cap=8.0)
        before = m.durable(path)
        line, _ = sign_record(ledger._next(Register, approver="a"), signer)
        _write(system, next(iter(first.fds)), line)
        m.kill(first)
    assert m.durable(path) == before
    with system.running(system.start(m, "second")), Ledger.open(path, signer) as ledger:
        assert ledger.head.seq == 1 and m.durable(path) == path.read_bytes() == before + line


def _write(system: System, fd: int, data: bytes) -> None:
    while data:
        data = data[system.write(fd, data):]


def test_counts_are_those_of_the_histories() -> None:
    out = Chaos(1, rounds=3, void=1)
    out.faults.update({"lost": 2, "kill": 1})
    assert out.as_dict()["faults"] == 3 and out.as_dict()["violations"] == 0


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[tuple[System, Machine]]:
    system = System(Plan(0, 0, only=()))
    system.machines.append(made := Machine("m", tmp_path / "m"))
    made.root.mkdir()
    with installed(system):
        yield system, made


@pytest.mark.parametrize("keep", [0, 1])
def test_a_loss_of_power_takes_what_was_not_synced(machine: tuple[System, Machine], keep: int) -> None:
    system, m = machine
    layer, log, path = FileLayer(), m.root / "log", m.root / "file"
    with system.running(system.start(m, "p")):
        fd = layer.open_append(log)
        layer.sync_folder(m.root)
        layer.append(fd, b"one\n")
        system.write(fd, b"two\n")
        system.write(fd, b"\n")
        layer.write_atomic(path, b"old")
        assert m.durable(log) == b"one\n" and m.durable(path) == b"old"
        layer.open_append(m.root / "new")
        assert m.durable(m.root / "new") == b""

    class Always(Random):
        def choice(self, seq):  # type: ignore[no-untyped-def]
            return seq[2 * keep]

    m.power_off(Always())
    assert log.read_bytes() == (b"one\ntw\n" if keep else b"one\n") and path.read_bytes() == b"old"
    assert (m.root / "new").exists() == bool(keep)
    with pytest.raises(Crash), system.running(m.processes[0]):
        layer.append(fd, b"the dead write nothing")


def test_a_key_file_is_created_whole_or_not_at_all(machine: tuple[System, Machine]) -> None:
    """At every call at which the process may die; and never over another key."""
    system, m = machine
    for at in range(1, 60):
        path = m.root / f"{at}.key"
        process = system.start(m, "p")
        process.trouble, process.at = Fault("p", "power", Random(at)), at
        try:
            with system.running(process):
                write_private(path, b"0123456789")
        except Crash:
            assert not path.exists() or path.read_bytes() == b"0123456789"
            continue
        assert m.durable(path) == path.read_bytes() == b"0123456789" and path.stat().st_mode & 0o777 == 0o600
        assert [p for p in m.root.glob(".*") if str(os.getpid()) in p.name] == []
        with pytest.raises(Refused, match=r"key\.exists"), system.running(system.start(m, "q")):
            write_private(path, b"other")
        assert path.read_bytes() == b"0123456789"
        break
    assert at > 10
