"""How long `ask` waits for whom, on a clock of its own: deadline, quorum with grace, sites that go offline, slow checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.metadata import Metadata

import fl_server.exchange as module
from fl_server.exchange import GONE_S, GRACE_S, UNREACHABLE, Answer, Exchange, Note

NODES = {name: 100 + i for i, name in enumerate("abcdefgh")}


class Clock:
    """A grid whose replies arrive at given seconds; waiting moves the clock to the next event."""

    def __init__(self, arrives: dict[str, float], offline: dict[str, float]) -> None:
        self.now, self.arrives, self.offline = 0.0, arrives, offline
        self.asked: dict[str, Message] = {}
        self.forgotten: list[str] = []

    def monotonic(self) -> float:
        return self.now

    def create_message(self, content: Any, kind: str, node: int, group: str) -> Message:
        return Message(content=content, metadata=Metadata(
            run_id=1, message_id="", src_node_id=1, dst_node_id=node, reply_to_message_id="", group_id=group,
            created_at=0.0, ttl=60.0, message_type=kind))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            self.asked[str(message.metadata.dst_node_id)] = message
        return list(self.asked)

    def get_node_ids(self) -> list[int]:
        return [node for name, node in NODES.items() if self.now < self.offline.get(name, 1e9)]

    def pull_messages(self, ids: Iterable[str]) -> Iterator[Any]:
        for asked in ids:
            name = next(n for n, node in NODES.items() if str(node) == asked)
            if self.arrives.get(name, 1e9) <= self.now:
                message = self.asked[asked]
                message.metadata.__dict__["_message_id"] = asked
                yield Message(RecordDict({"c": ConfigRecord({"body": name.encode()})}), reply_to=message)

    def wait(self, timeout_s: float) -> bool:
        events = [t for t in self.arrives.values() if t > self.now]
        self.now = min([self.now + timeout_s, *events])
        return True

    def forget(self, ids: Iterable[str]) -> None:
        self.forgotten += ids

    def close(self) -> None:
        pass


def ask(monkeypatch: pytest.MonkeyPatch, arrives: dict[str, float], *, offline: dict[str, float] | None = None,
        deadline_s: float = 120.0, quorum: int | None = None, check_s: float = 0.0,
        refused: str = "") -> tuple[Clock, dict[str, Answer]]:
    clock = Clock(arrives, offline or {})
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)

    def on_answer(name: str, answer: Answer) -> bool:
        clock.now += check_s
        return name not in refused

    answers = Exchange(clock, NODES).ask("vote", dict.fromkeys(NODES, Note(b"{}")), deadline_s=deadline_s,
                                         on_answer=on_answer, quorum=quorum)
    return clock, answers


def silent(answers: dict[str, Answer]) -> str:
    return "".join(name for name, answer in answers.items() if answer.code == UNREACHABLE)


def test_all_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, answers = ask(monkeypatch, dict.fromkeys(NODES, 2.0))
    assert (silent(answers), clock.now, clock.forgotten) == ("", 2.0, [])


@pytest.mark.case(22)
def test_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, answers = ask(monkeypatch, dict.fromkeys("abcdefg", 2.0))
    assert (silent(answers), clock.now, clock.forgotten) == ("h", 120.0, [str(NODES["h"])])


def test_slow_checks_put_nobody_out_who_answered_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, answers = ask(monkeypatch, dict.fromkeys(NODES, 1.0), deadline_s=5.0, check_s=2.0)
    assert silent(answers) == ""


@pytest.mark.case(22)
def test_a_quorum_gives_the_rest_a_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict.fromkeys("abcde", 1.0) | {"f": 1.0 + GRACE_S - 0.5, "g": 1.0 + GRACE_S + 2}
    clock, answers = ask(monkeypatch, times, quorum=5)
    assert silent(answers) == "gh" and clock.now <= 1.0 + GRACE_S


def test_attack_answers_that_will_not_do_make_no_quorum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sites answer at once with rubbish: the honest ones are waited for all the same."""
    times = dict.fromkeys("abcde", 1.0) | {"f": 40.0, "g": 50.0, "h": 60.0}
    _, answers = ask(monkeypatch, times, quorum=5, refused="abc")
    assert silent(answers) == ""


def test_slow_checks_after_a_quorum(monkeypatch: pytest.MonkeyPatch) -> None:
    _, answers = ask(monkeypatch, dict.fromkeys(NODES, 1.0), quorum=2, check_s=3.0)
    assert silent(answers) == ""


def test_who_goes_offline_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One dead, one slow: the slow one keeps the stage open, the dead one doesn't."""
    times = dict.fromkeys("abcdef", 1.0) | {"g": 30.0}
    clock, answers = ask(monkeypatch, times, offline={"h": 10.0})
    assert silent(answers) == "h" and clock.now == 30.0


def test_who_reconnects_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator takes a node that activates again offline for a moment."""
    times = dict.fromkeys("abcdefg", 1.0) | {"h": 30.0}
    original = Clock.get_node_ids
    monkeypatch.setattr(Clock, "get_node_ids", lambda self: [
        node for node in original(self) if node != NODES["h"] or not 5 <= self.now < 5 + GONE_S - 0.5])
    _, answers = ask(monkeypatch, times)
    assert silent(answers) == ""


def test_an_answer_sent_before_going_offline_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict.fromkeys("abcdefg", 0.5) | {"h": 0.95}
    _, answers = ask(monkeypatch, times, offline={"h": 0.9})
    assert silent(answers) == ""


@pytest.mark.parametrize(("online", "least", "took"), [("abcdefgh", 5, 0.0), ("abcdefg", 5, GONE_S), ("abc", 5, 20.0),
                                                       ("abcdefg", None, 20.0)])
def test_a_round_waits_for_all_but_not_long_once_there_are_enough(monkeypatch: pytest.MonkeyPatch, online: str,
                                                                 least: int | None, took: float) -> None:
    clock = Clock({}, {name: 0.0 for name in NODES if name not in online})
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(module.time, "sleep", lambda s: setattr(clock, "now", clock.now + s))
    assert Exchange(clock, NODES).wait_online(list(NODES), 20.0, least) == set(online)
    assert clock.now == pytest.approx(took, abs=0.2)
