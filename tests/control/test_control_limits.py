"""CASES 22 and floods: peers that are slow, silent, greedy or many end at a limit, and the others proceed."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from control_kit import HOST, Running, World, running, status_of
from relay_kit import BadNetwork

from fl_client.control import ControlClient
from fl_server.control_admission import OPEN, REMEMBERED, Rate, _address
from fl_server.control_guard import PER_PEER
from privacy.control import consilo_control_pb2 as pb
from privacy.errors import ConsiloError, Unreachable

ROSTER = "/consilo.control.v1.Roster/Get"
ADAPTER = "/consilo.control.v1.Adapters/Fetch"
SUBMIT = "/consilo.control.v1.Enrolment/Submit"
BIG = "ee" * 16
CUT = {("CANCELLED", "CANCELLED"), ("CANCELLED", "")}


@pytest.fixture(scope="module")
def brief(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Listeners whose limits of time are short, and a run with an adapter of 64 MiB."""
    root = tmp_path_factory.mktemp("brief")
    with running(world, root, control={"unary_s": 0.5, "stream_s": 0.5, "handshake_s": 0.3},
                 enrol={"unary_s": 0.5, "handshake_s": 0.3}) as made:
        shutil.copytree(world.root / "run" / "evidence", root / "big" / "evidence")
        (root / "big" / "adapter").mkdir()
        with (root / "big" / "adapter" / "adapter_model.safetensors").open("wb") as file:
            file.truncate(64 * 2**20)
        made.store.publish_run(BIG, root / "big")
        yield made


def hang(channel: grpc.Channel) -> grpc.Future:
    """A call whose request never comes."""
    ended = threading.Event()

    def never() -> Iterator[bytes]:
        ended.wait()
        yield from ()

    call = channel.stream_unary(ROSTER).future(never(), timeout=20)
    call.add_done_callback(lambda _: ended.set())
    return call


def ok(control: Running, name: str) -> bool:
    return control.raw(name, ROSTER) == ("OK", "")


def test_case_22_a_request_that_never_comes_ends_and_others_proceed(brief: Running) -> None:
    with brief.channel("clinic-a") as channel:
        stuck = hang(channel)
        assert ok(brief, "clinic-b")
        assert status_of(stuck.result) in CUT
    assert ok(brief, "clinic-a")


def test_case_22_one_peer_can_not_hold_all_calls(brief: Running) -> None:
    """Its calls are bounded, whatever number of connections it makes; when they have ended it may call again."""
    with brief.channel("clinic-a") as first, brief.channel("clinic-a") as second:
        stuck = [hang(channel) for channel in (first, second) for _ in range(PER_PEER)]
        ends = [status_of(each.result) for each in stuck]
    refused = [end for end in ends if end == ("RESOURCE_EXHAUSTED", "control.busy")]
    assert len(refused) == PER_PEER and all(end in CUT for end in ends if end not in refused)
    assert ok(brief, "clinic-a")


def test_case_22_peers_that_do_not_read(brief: Running) -> None:
    """64 MiB wait for each of them; they read one message, and their calls end all the same."""
    with brief.channel("clinic-a") as channel:
        streams = [channel.unary_stream(ADAPTER)(pb.FetchRequest(run=BIG).SerializeToString(), timeout=60)
                   for _ in range(PER_PEER)]
        assert all(next(stream) for stream in streams)
        assert ok(brief, "clinic-b")
        assert brief.raw("clinic-a", ROSTER) == ("RESOURCE_EXHAUSTED", "control.busy")
        while not ok(brief, "clinic-a"):
            pass
        assert all(status_of(lambda s=s: list(s)) in CUT for s in streams)


def test_case_22_a_peer_at_one_kilobyte_a_second(brief: Running) -> None:
    """Its request of 60 kB would take a minute: the server ends it, and serves others meanwhile."""
    with BadNetwork((HOST, brief.server.port), up=20_000, per_s=1000).running() as network, \
            brief.world.channel(network.port, "clinic-a") as channel:
        body = pb.ApproveRequest(digest="0" * 64, envelope=bytes(60_000)).SerializeToString()
        slow = channel.unary_unary("/consilo.control.v1.Contracts/Approve").future(body, timeout=20)
        assert ok(brief, "clinic-b")
        assert status_of(slow.result) in CUT


def test_case_22_half_closed(brief: Running) -> None:
    """A stream that ends without a message, and a connection that is shut after its preface."""
    with brief.channel("clinic-a") as channel:
        assert status_of(lambda: channel.stream_unary(ROSTER)(iter(()), timeout=10)) == (
            "INVALID_ARGUMENT", "control.malformed")
    with BadNetwork((HOST, brief.server.port), up=0).running() as network, \
            socket.create_connection(("127.0.0.1", network.port)) as half:
        half.sendall(b"\x16\x03\x01")
        half.shutdown(socket.SHUT_WR)
        assert ok(brief, "clinic-b")


@pytest.mark.parametrize("port", ["port", "enrol_port"])
def test_case_22_connections_that_never_shake_hands_are_closed(brief: Running, port: str) -> None:
    silent = [socket.create_connection((HOST, getattr(brief.server, port)), 10) for _ in range(20)]
    assert ok(brief, "clinic-b")
    for each in silent:
        with each:
            assert each.recv(1) == b""


def test_case_22_a_coordinator_that_never_answers(world: World, tmp_path: Path) -> None:
    """Of the client: a port that accepts and says nothing, a handshake that stops, a call that stops."""
    folder = world.folder("clinic-a", tmp_path / "a")
    with socket.create_server((HOST, 0)) as mute:
        client = ControlClient(f"https://{HOST}:{mute.getsockname()[1]}", folder, folder, unary_s=0.3)
        with pytest.raises(Unreachable, match=r"control\.unreachable"):
            client.contracts()
    with running(world, tmp_path / "server") as control:
        for first, down in ((0, 500), (1, 0)):
            with BadNetwork((HOST, control.server.port), down=down, first=first).running() as network:
                client = ControlClient(f"https://{HOST}:{network.port}", folder, folder, unary_s=0.5)
                with pytest.raises(Unreachable) as caught:
                    client.contracts()
                assert caught.value.code in ("control.unreachable", "control.deadline")


def test_oversized_requests(brief: Running) -> None:
    method = "/consilo.control.v1.Contracts/Approve"
    status, details = brief.raw("clinic-a", method, bytes(2**18))
    assert status == "RESOURCE_EXHAUSTED" and details.startswith("SERVER: Received message larger than max")
    over = pb.ApproveRequest(digest=brief.world.contract.digest, envelope=bytes(65 * 1024)).SerializeToString()
    assert brief.raw("clinic-a", method, over) == ("INVALID_ARGUMENT", "control.too_large")
    with brief.channel("clinic-a") as channel:
        headers = [("x", "y" * 20_000)]
        assert status_of(lambda: channel.unary_unary(ROSTER)(b"", timeout=10, metadata=headers))[0] == "RESOURCE_EXHAUSTED"


def test_more_calls_than_the_listener_takes(world: World, tmp_path: Path) -> None:
    with running(world, tmp_path, control={"calls": 1}) as control, control.channel("clinic-a") as channel:
        stuck = hang(channel)
        with ThreadPoolExecutor(1) as pool:
            while (found := pool.submit(control.raw, "clinic-b", ROSTER).result()) == ("OK", ""):
                pass  # the first call hasn't arrived yet
        assert found[0] == "RESOURCE_EXHAUSTED"
        with pytest.raises(Unreachable, match=r"control\.busy"):
            for _ in range(1000):  # the call before may have been what was in the way
                control.client("clinic-b").contracts()
        stuck.cancel()


def test_attack_flood_of_enrolments_from_one_address(world: World, tmp_path: Path) -> None:
    burst = OPEN[SUBMIT][0]
    with running(world, tmp_path) as control, control.channel(None, enrol=True) as channel:
        submit = channel.unary_unary(SUBMIT)
        ends = [status_of(lambda i=i: submit(pb.SubmitRequest(id=f"{i:032x}", document=b"x").SerializeToString(),
                                             timeout=10)) for i in range(burst + 3)]
        assert ends == [("OK", "")] * burst + [("RESOURCE_EXHAUSTED", "control.busy")] * 3
        assert len(list((control.store.root / "enrolments").iterdir())) == burst
        assert ok(control, "clinic-a")  # the other port is not slowed
        over = pb.SubmitRequest(id="f" * 32, document=bytes(2**15)).SerializeToString()
        assert control.raw(None, SUBMIT, over, enrol=True)[0] == "RESOURCE_EXHAUSTED"


def test_rates_recover_and_are_forgotten() -> None:
    now = [0.0]
    rate = Rate(2, 0.5, lambda: now[0])

    def spend(key: str) -> bool:
        try:
            rate.spend(key)
        except ConsiloError:
            return False
        return True

    assert [spend("a") for _ in range(3)] == [True, True, False] and spend("b")
    now[0] = 1.9
    assert not spend("a")
    now[0] = 2.1
    assert spend("a") and not spend("a")
    now[0] = 1000.0
    assert [spend("a") for _ in range(3)] == [True, True, False]
    for i in range(REMEMBERED):
        rate.spend(f"x{i}")
    assert len(rate._left) == REMEMBERED and spend("a")


def test_addresses() -> None:
    assert _address("ipv4:192.0.2.7:41000") == "192.0.2.7" == _address("ipv4:192.0.2.7:41001")
    assert _address("ipv6:%5B2001:db8::1%5D:4") == "2001:db8::/64" == _address("ipv6:[2001:db8::ffff]:5")
    assert _address("unix:/x") == "unix:/x"


def test_stop_lets_calls_end(world: World, tmp_path: Path) -> None:
    with running(world, tmp_path, control={"grace_s": 20.0}) as control:
        with control.channel("clinic-a") as channel:
            answers = channel.unary_stream(ADAPTER)(pb.FetchRequest(run="ab" * 16).SerializeToString(), timeout=20)
            names = {pb.Chunk.FromString(next(answers)).name}
            stopping = threading.Thread(target=control.server.stop)
            stopping.start()
            names |= {pb.Chunk.FromString(part).name for part in answers}
            assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "head.safetensors"}
        stopping.join(20)
        assert not stopping.is_alive()
        with pytest.raises(Unreachable, match=r"control\.unreachable"):
            control.client("clinic-a").contracts()


def test_two_listeners_can_not_share_a_port(world: World, tmp_path: Path) -> None:
    with running(world, tmp_path / "1") as control, pytest.raises(Unreachable, match=r"control\.port"), \
            running(world, tmp_path / "2", port=control.server.port):
        pass
