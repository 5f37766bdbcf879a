"""The watchdog on real processes: whatever the trainer does, the agent goes on, and nothing of the trainer is left."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fl_client import sandbox, supervisor
from fl_client.sandbox import MENDS, WALLS, Sandbox
from fl_client.supervisor import TrainerProcess
from privacy.contract import Contract
from privacy.errors import Refused, Unreachable, UsageError
from strategies.adapter import initial

TURNED = str(Path(__file__).with_name("turned.py"))
CANARY = "canary-93fe"
HONEST, SPIN, STOP, EXIT, SHORT = 1, 2, 3, 4, 6  # rounds of turned.py
ADAPTER = {"w": np.array([1, 2, 3], np.float32)}
BRIEF_S = 0.5  # after which a hung trainer is given up: a slow machine makes no test fail
PATIENT_S = 200.0  # nothing here comes near it

Make = Callable[..., TrainerProcess]


@pytest.fixture
def turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """turned("filter", ...): a trainer that does what a test asks for; without names, all mechanisms work."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "data.csv").touch()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    made: list[TrainerProcess] = []

    def make(*mechanisms: str, **request: Any) -> TrainerProcess:
        monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-P", TURNED, *mechanisms))
        where = {"model": str(tmp_path), "data": str(tmp_path / "data.csv")}
        made.append(TrainerProcess(where | request, limit_s=PATIENT_S))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()
    assert not any(scratch.iterdir()), "a scratch folder was left"


def child(trainer: TrainerProcess) -> supervisor._Child:
    assert trainer._child is not None
    return trainer._child


def pid(trainer: TrainerProcess) -> int:
    return child(trainer)._process.pid


def ends(number: int) -> bool:
    """Whether that process, of whomever it is a child, has ended or does so within a minute."""
    try:
        exited = os.pidfd_open(number)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([exited], [], [], 60)[0])
    finally:
        os.close(exited)


def descendants() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("how", [SPIN, STOP])
def test_hung_trainer_is_killed_and_the_next_round_gets_another(turned: Make, how: int) -> None:
    before = descendants()
    trainer = turned()
    first, trainer._limit_s = pid(trainer), BRIEF_S
    with pytest.raises(Unreachable) as caught:
        trainer.train(ADAPTER, how)
    assert caught.value.code == "trainer.timeout"
    assert not psutil.pid_exists(first) and descendants() == before
    trainer._limit_s = PATIENT_S
    np.testing.assert_array_equal(trainer.train(ADAPTER, HONEST), ADAPTER["w"])
    assert pid(trainer) != first


def test_trainer_that_reads_nothing_does_not_hang_the_agent(turned: Make) -> None:
    """More than a pipe holds, to a stopped process: writing has the deadline, too."""
    trainer = turned()
    first = pid(trainer)
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(Unreachable, match=r"trainer\.timeout"):
        child(trainer).ask({"round": HONEST}, bytes(2**22), limit_s=BRIEF_S)
    assert not psutil.pid_exists(first)


def test_trainer_that_ends_is_replaced(turned: Make) -> None:
    trainer = turned()
    with pytest.raises(Unreachable, match=r"trainer\.gone"):
        trainer.train(ADAPTER, EXIT)
    trainer.train(ADAPTER, HONEST)
    os.kill(pid(trainer), signal.SIGKILL)
    assert ends(pid(trainer))
    np.testing.assert_array_equal(trainer.train(ADAPTER, HONEST), ADAPTER["w"])


@pytest.mark.parametrize(("then", "code"), [
    ("spin", "trainer.timeout"), ("stop", "trainer.timeout"), ("exit", "trainer.gone")])
def test_children_of_the_trainer_end_with_it(turned: Make, then: str, code: str) -> None:
    """Where no filter forbids children: one keeps the pipes open while the trainer hangs, or after it has ended."""
    before = descendants()
    trainer = turned("namespace")
    first = pid(trainer)
    left = child(trainer).ask({"do": "leave_child"}, limit_s=PATIENT_S)[0]["got"]
    with pytest.raises(Unreachable) as caught:
        child(trainer).ask({"do": then}, limit_s=PATIENT_S if then == "exit" else BRIEF_S)
    assert caught.value.code == code
    assert not psutil.pid_exists(first) and ends(left) and descendants() == before


def test_trainer_that_no_signal_ends_is_reported(turned: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device driver can hold a killed process for ever; the agent must not wait for it."""
    trainer = turned()
    first, process = pid(trainer), child(trainer)._process
    trainer._limit_s = BRIEF_S
    with monkeypatch.context() as planted:
        planted.setattr(os, "killpg", lambda *_: None)
        planted.setattr(supervisor, "KILL_S", BRIEF_S)
        with pytest.raises(Unreachable) as caught:
            trainer.train(ADAPTER, STOP)
    assert caught.value.code == "trainer.stuck"
    os.kill(first, signal.SIGKILL)
    process.wait()


AGENT = """
import sys, tempfile, threading
from fl_client import supervisor
from fl_client.supervisor import TrainerProcess
tempfile.tempdir = sys.argv[2]
supervisor.COMMAND = (sys.executable, "-P", sys.argv[1])
trainer = TrainerProcess({"model": sys.argv[2], "data": sys.argv[2]}, limit_s=600)
print(trainer._child._process.pid, flush=True)
if sys.argv[3] == "hung":
    trainer._child._peer.send({"do": "spin"})
    print("sent", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("state", ["idle", "hung"])
def test_trainer_ends_with_a_killed_agent(tmp_path: Path, state: str) -> None:
    command = [sys.executable, "-P", "-c", AGENT, TURNED, str(tmp_path), state]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        number = int(agent.stdout.readline())
        if state == "hung":
            agent.stdout.readline()
        agent.kill()
    try:
        assert ends(number)
    finally:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def test_trainer_outlives_the_thread_that_asked_for_it(turned: Make) -> None:
    """The kernel ends it with the thread that started it: that must not be a round's."""
    trainer = turned()
    os.kill(pid(trainer), signal.SIGKILL)
    assert ends(pid(trainer))
    thread = threading.Thread(target=trainer.train, args=(ADAPTER, HONEST))
    thread.start()
    thread.join()
    while Path(f"/proc/self/task/{thread.native_id}").exists():  # the kernel's end of it comes after Python's
        os.sched_yield()
    second = pid(trainer)
    np.testing.assert_array_equal(trainer.train(ADAPTER, HONEST), ADAPTER["w"])
    assert pid(trainer) == second


@pytest.mark.parametrize(("raised", "kind"), [("UsageError", UsageError), ("Refused", Refused)])
def test_error_of_loading_keeps_its_kind_and_leaves_nothing(turned: Make, raised: str, kind: type[Exception]) -> None:
    before = descendants()
    with pytest.raises(kind, match=r"lora\.targets: cause Mend: mend"):
        turned(do="refuse", **{"with": {"kind": raised}})
    assert descendants() == before


@pytest.mark.case(34)
def test_failure_in_training_is_a_code_and_the_trainer_stays(turned: Make, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = turned()
    first = pid(trainer)
    with pytest.raises(Refused) as caught:
        child(trainer).ask({"do": "fail", "with": {"text": CANARY}}, limit_s=PATIENT_S)
    assert caught.value.code == "trainer.failed" and CANARY not in str(caught.value)
    logged = "".join(capfd.readouterr())
    assert "trainer: ValueError at fail:" in logged and CANARY not in logged
    trainer.train(ADAPTER, HONEST)
    assert pid(trainer) == first


def test_answer_of_another_size_is_no_answer(turned: Make) -> None:
    trainer = turned()
    first = pid(trainer)
    with pytest.raises(Unreachable, match=r"trainer\.gone"):
        trainer.train(ADAPTER, SHORT)
    assert not psutil.pid_exists(first)


def test_missing_wall_is_logged_at_each_start(turned: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "consilo.trainer")
    trainer = turned("-")
    assert sorted(r.getMessage() for r in caplog.records) == sorted(
        f"the trainer's wall {wall} doesn't hold ({reason}): {MENDS[reason]}" for wall, reason in trainer.walls.items())
    assert trainer.walls.keys() == set(WALLS) and sandbox.ENFORCED not in trainer.walls.values()


def test_real_training_inside_all_walls(tiny_model: Path, tiny_data: dict[str, Path],
                                        tiny_contract: Callable[..., Contract]) -> None:
    """torch, transformers and peft start and train where nothing else is possible."""
    if set(supervisor.walls().values()) != {sandbox.ENFORCED}:
        pytest.skip("not all walls hold here")
    request = {"contract": tiny_contract().to_bytes().decode(), "site": "site-a", "model": str(tiny_model),
               "data": str(tiny_data["site-a"]), "text": "text", "label": "label", "threads": 1, "person": "", "lineage": "",
               "compute": {}}
    trainer = TrainerProcess(request, limit_s=PATIENT_S, sandbox=Sandbox(required=WALLS))
    try:
        delta = trainer.train(initial(trainer.spec, 0), 1)
        assert delta.shape == (trainer.spec.dim,) and np.isfinite(delta).all() and delta.any()
        with pytest.raises(UsageError, match=r"data\.missing"):
            TrainerProcess(request | {"data": str(tiny_model.parent / "none.csv")}, limit_s=PATIENT_S)
    finally:
        trainer.close()
