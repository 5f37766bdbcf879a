"""Faults that only real machines have: a full disk, a process that stands still, a killed trainer, a certificate that
ends in mid-run, a link that is cut, slow or half open. Five sites, real processes over mutual TLS; four make a sum.

A fault begins while a round is under way and lasts for two whole rounds; then it ends, and the site must come back.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from forward import Forwarder
from test_dropouts import Probe
from test_kill_loop import SITES, Place

from fl_server.journal import status
from privacy import ca
from privacy.ca_requests import read_request
from privacy.identity import read_subject
from simulations import demo

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

END_S = 300.0  # of the wait for a run's end, once nothing holds it back
LIFETIMES_S = (45, 90, 180)  # of a certificate that is to end in mid-run, and not before it: a slow machine needs longer
STILL_S = 70.0  # a site waits for 30 s, Flower for 60 s
Make = Callable[..., Place]


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path]) -> Iterator[Make]:
    """make("privacy.rounds=3", ...): a run with these overrides."""
    probe, runs = Probe(), iter(range(99))
    try:
        yield lambda *more, **how: Place(probe, tmp_path / f"out{next(runs)}", tiny_model, tiny_data, *more, **how)
    finally:
        probe.close()


def command(*words: str) -> None:
    """Skips the test where this machine doesn't have or allow it."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount or to make a network namespace")
    if shutil.which(words[0]) is None:
        pytest.skip(f"needs the command {words[0]}")
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    if done.returncode:
        pytest.skip(f"{' '.join(words[:4])}: {done.stderr.strip()[:100]}")


def begin(place: Place, site: str, fault: Callable[[], object], last: int = 5) -> None:
    """Two rounds with all sites; the fault, in the third; those after it up to the last."""
    place.allow(2, gather=True)
    place.until(2)
    place.allow(3)
    wait(lambda: place.drawn(site) >= 3, place)
    fault()
    place.allow(last)
    place.until(last)


def end(place: Place, *, gather: bool = True) -> list[dict[str, Any]]:
    """The rounds that were done, of a run that ended well with evidence that holds. gather: all sites take part again."""
    place.allow(place.rounds, gather=gather)
    code, limit = None, time.monotonic() + END_S
    while code is None:
        assert time.monotonic() < limit, "the run doesn't end"
        code = place.ended("coordinator", 1.0)
    alive = {name for name in SITES if place.ended(name) is None}
    place.close()
    place.check(code)
    assert code == 0 and alive == set(SITES), "no agent fell"
    return [r for r in status(place.out / "journal.jsonl")["rounds"] if r["outcome"] == "done"]


def assert_out_and_back(rounds: list[dict[str, Any]], site: str, last: int = 5) -> None:
    others = [name for name in SITES if name != site]
    assert [r["sites"] for r in rounds[:2]] == [list(SITES)] * 2
    assert [r["sites"] for r in rounds[last - 2:last]] == [others] * 2, "all others went on"
    assert site in rounds[-1]["sites"], "it came back"


def wait(there: Callable[[], bool], place: Place) -> None:
    limit = time.monotonic() + END_S
    while not there():
        assert time.monotonic() < limit and place.ended("coordinator") is None
        time.sleep(0.005)


def ledger(place: Place, site: str) -> list[dict[str, Any]]:
    lines = (place.out / "sites" / site / "state" / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line)["body"] for line in lines]


@pytest.mark.parametrize("file", ["ledger.jsonl", "rounds.jsonl"])
@pytest.mark.case(25)
def test_case_25_a_full_disk_stops_the_site_before_anything_leaves(file: str, make: Make) -> None:
    """The state folder is a small tmpfs that fills up in mid-run. First, this file can't grow: the other one has room for
    more, and each has what is left of its last page, which a few rounds use up."""
    mounted: list[Path] = []

    def mount(place: Place) -> None:
        disk = place.out / "sites" / "site-b" / "state"
        kept = {p.relative_to(disk): p.read_bytes() for p in disk.rglob("*") if p.is_file()}
        command("mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "tmpfs", str(disk))
        mounted.append(disk)
        for name, data in kept.items():
            (disk / name).parent.mkdir(parents=True, exist_ok=True)
            (disk / name).write_bytes(data)
            (disk / name).chmod(0o600)

    def fill() -> None:
        room = {"ledger.jsonl": "rounds.jsonl", "rounds.jsonl": "ledger.jsonl"}[file]
        command("fallocate", "--keep-size", "--length", "64KiB", str(mounted[0] / room))
        with (mounted[0] / "filler").open("wb", buffering=0) as f, pytest.raises(OSError) as caught:
            while True:
                f.write(bytes(4096))
        assert caught.value.errno == errno.ENOSPC

    try:
        place = make(prepare=mount)
        begin(place, "site-b", fill, last=9)
        notes = [json.loads(line) for line in (place.out / "site-b.dump").read_text().splitlines()]
        assert not {8, 9} & {n["round"] for n in notes if n["stage"] == "drawn"}, "it drew nothing that it couldn't send"
        (mounted[0] / "filler").unlink()
        assert place.kill("site-b") is None, "it had not fallen"
        place.pids["site-b"] = place.start("site-b")
        assert_out_and_back(end(place), "site-b", last=9)
    finally:
        for disk in mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.case(22)
def test_case_22_a_stopped_agent_is_left_out_and_comes_back(make: Make) -> None:
    place = make()
    stop = {"do": "signal", "pid": place.pids["site-c"]}
    begin(place, "site-c", lambda: place.probe.ask(**stop, signal=signal.SIGSTOP))
    place.probe.ask(**stop, signal=signal.SIGCONT)
    assert_out_and_back(end(place), "site-c")


@pytest.mark.case(22)
def test_case_22_a_coordinator_that_stood_still_goes_on(make: Make) -> None:
    """For longer than its sites wait, and than Flower lets a run be silent: a machine that slept, or was moved."""
    place = make("privacy.rounds=6")
    stop = {"do": "signal", "pid": place.pids["coordinator"]}

    def sleep() -> None:
        place.probe.ask(**stop, signal=signal.SIGSTOP)
        over = time.monotonic() + STILL_S
        while time.monotonic() < over:
            time.sleep(1)
        place.probe.ask(**stop, signal=signal.SIGCONT)

    begin(place, "site-a", sleep)
    rounds = end(place)
    assert [r["sites"] for r in rounds[:2] + rounds[-1:]] == [list(SITES)] * 3


@pytest.mark.case(24)
def test_case_24_a_killed_trainer_costs_its_site_one_update_and_nobody_else_anything(make: Make) -> None:
    """kill -9 in a step: charged, never committed, never sent. The agent stays, and starts another."""
    place = make("privacy.rounds=5", "privacy.local_steps=100", "privacy.sigma=60", "privacy.retries=3",
                 "server.deadline_s=120", "server.stage_deadline_s=30", trains="site-b")

    def begun(round_no: int) -> set[str]:
        return {b["kind"] for b in ledger(place, "site-b") if b.get("round") == round_no}

    def trainer() -> psutil.Process:
        child, = psutil.Process(place.pids["site-b"]).children()
        return child

    place.allow(2, gather=True)
    place.until(2)
    first = trainer()
    place.allow(3)
    wait(lambda: "reserve" in begun(3), place)
    first.kill()
    place.until(3)
    place.allow(4)
    place.until(4)
    second = trainer()
    rounds = end(place)
    assert [("site-b" in r["sites"], r["lost"]) for r in rounds] == [
        (True, []), (True, []), (False, ["site-b update site.failed"]), (True, []), (True, [])]
    assert second.pid != first.pid
    bodies = ledger(place, "site-b")
    reserved = {b["seq"]: b["round"] for b in bodies if b["kind"] == "reserve"}
    committed = [reserved[b["reserve"]] for b in bodies if b["kind"] == "commit"]
    assert (list(reserved.values()), committed) == ([1, 2, 3, 4, 5], [1, 2, 4, 5])


@pytest.mark.case(36)
def test_case_36_a_certificate_that_ends_in_mid_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on nothing of its site is taken, and the others go on without it."""
    for lifetime in LIFETIMES_S:
        with monkeypatch.context() as patch:
            over = short_lived(patch, "site-d", timedelta(seconds=lifetime))
            place = make("privacy.rounds=5", prepare=lambda p: p.allow(2, gather=True))
        while len(place.events("done")) < 2 and datetime.now(UTC) < over[0] and place.ended("coordinator") is None:
            time.sleep(0.1)
        if len(place.events("done")) == 2:
            break
        place.close()
    while datetime.now(UTC) < over[0]:
        time.sleep(0.1)
    rounds = end(place, gather=False)
    assert [r["sites"] for r in rounds] == [list(SITES)] * 2 + [[name for name in SITES if name != "site-d"]] * 3


def short_lived(patch: pytest.MonkeyPatch, site: str, lifetime: timedelta) -> list[datetime]:
    """The certificates that the site will be issued end so soon; returns where it will be said when."""
    issue, over = ca.issue, list[datetime]()

    def issued(folder: Path, request: bytes, *args: Any, **how: Any) -> Any:
        with patch.context() as brief:
            if read_subject(read_request(request)[0].subject)[0] == site:
                now = datetime.now(UTC)
                over.append(now + lifetime)
                brief.setattr(ca, "_validity", lambda days: (now - timedelta(minutes=1), over[-1]))
            return issue(folder, request, *args, **how)

    patch.setattr(ca, "issue", issued)
    return over


@pytest.mark.parametrize(("how", "value"), [("per_s", 1000), ("half", True)])
@pytest.mark.case(22)
def test_case_22_a_peer_at_one_kilobyte_a_second_or_half_closed(how: str, value: int, make: Make) -> None:
    with forwarded() as (forwarder, prepare):
        place = make(prepare=prepare)
        begin(place, "site-e", lambda: setattr(forwarder(), how, value))
        setattr(forwarder(), how, 0)
        assert_out_and_back(end(place), "site-e")


@contextmanager
def forwarded() -> Iterator[tuple[Callable[[], Forwarder], Callable[[Place], None]]]:
    """What site-e's traffic goes through, and what makes it so."""
    made: list[Forwarder] = []

    def prepare(place: Place) -> None:
        made.append(Forwarder(("127.0.0.1", place.port)))
        place.urls["site-e"] = f"https://localhost:{made[0].port}"

    try:
        yield lambda: made[0], prepare
    finally:
        for each in made:
            each.close()


@contextmanager
def virtual_link(delay_s: float = 0.0) -> Iterator[tuple[str, Callable[[Place], None]]]:
    """The near end of a virtual link to a network namespace, and what puts site-e's traffic on it: there, and back.
    delay_s: on the way, in each direction."""
    name, inside = f"c{os.getpid()}", list[subprocess.Popen[str]]()
    near, made = f"{name}h", list[Forwarder]()

    def prepare(place: Place) -> None:
        back = Forwarder(("127.0.0.1", place.port), ("198.18.0.1", 0))
        port, script = demo.free_port(), Path(__file__).with_name("forward.py")
        inside.append(subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, script, "198.18.0.2", str(port), "198.18.0.1", str(back.port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert inside[0].stdout and inside[0].stdout.readline() == "ready\n"
        made.extend((back, Forwarder(("198.18.0.2", port))))
        made[1].delay_s = delay_s
        place.urls["site-e"] = f"https://localhost:{made[1].port}"

    command("ip", "netns", "add", name)
    try:
        command("ip", "link", "add", near, "type", "veth", "peer", "name", f"{name}s", "netns", name)
        command("ip", "addr", "add", "198.18.0.1/30", "dev", near)
        command("ip", "link", "set", near, "up")
        command("ip", "-n", name, "addr", "add", "198.18.0.2/30", "dev", f"{name}s")
        command("ip", "-n", name, "link", "set", f"{name}s", "up")
        yield near, prepare
    finally:
        for forwarder in made:
            forwarder.close()
        for process in inside:
            process.communicate("", timeout=10)
        subprocess.run(["ip", "netns", "del", name], check=True)  # the link goes with it


@pytest.mark.case(22)
def test_case_22_a_link_that_is_cut(make: Make) -> None:
    with virtual_link() as (link, prepare):
        place = make(prepare=prepare)
        begin(place, "site-e", lambda: command("ip", "link", "set", link, "down"))
        command("ip", "link", "set", link, "up")
        assert_out_and_back(end(place), "site-e")


@pytest.mark.case(22)
def test_case_22_a_link_that_is_slow_but_in_time_is_waited_for(make: Make) -> None:
    """128 kbit/s for both ways together, 0.2 s late in each."""
    with virtual_link(delay_s=0.2) as (link, prepare):
        place = make("privacy.rounds=5", "server.deadline_s=60", "server.stage_deadline_s=60", prepare=prepare)
        begin(place, "site-e", lambda: command("tc", "qdisc", "add", "dev", link, "root", "tbf", "rate", "128kbit", "burst",
                                               "4kb", "latency", "10s"))
        assert [r["sites"] for r in end(place)] == [list(SITES)] * 5
