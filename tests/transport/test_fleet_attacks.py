"""Attacks on the Fleet listener and on the link, over real mutual TLS on loopback. Each is named after the attack."""

from __future__ import annotations

import http.server
import io
import json
import os
import shutil
import ssl
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_id, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from transport_kit import HOST, Pki, link_to, server, serving

from fl_client import link_tls
from fl_client.link import FleetLink, StageRefused, build_app
from fl_client.link_tls import coordinator_check
from fl_server import fleet_grid, fleet_guard
from fl_server.exchange import MALFORMED, UNREACHABLE, Answer, Exchange, Note
from fl_server.fleet import FleetServer
from fl_server.serve import _admits
from privacy import ca
from privacy.errors import Refused, SiteCode, Unreachable, UsageError
from privacy.identity import Role
from privacy.trust_files import WatchedTrust

ECHO = build_app({"train.update": lambda body, arrays: (body, arrays)})


@pytest.fixture(scope="module")
def fleet(pki: Pki) -> Iterator[FleetServer]:
    with server(pki) as running:
        yield running


@pytest.fixture
def exchange(fleet: FleetServer) -> Exchange:
    return Exchange(fleet.grid, fleet.nodes)


def client_tls(pki: Pki, name: str | None, ca_role: Role = Role.COORDINATOR) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(pki.issuing(ca_role))
    if name:
        context.load_cert_chain(pki.cert(name), pki.key(name))
    return context


OPEN: list[FleetHttpClient] = []


@pytest.fixture(autouse=True)
def _close_attackers() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def anyone(server: x509.Certificate) -> None:
    """What a link without the check of the server's certificate takes."""


def connect(link: FleetLink) -> int:
    with link:
        return link.connect()


class Attacker:
    """A node of its own making: TLS certificate and node key may differ, and every message is made by hand."""

    def __init__(self, fleet: FleetServer, pki: Pki, name: str, node_key_of: str | None = None) -> None:
        key: Any = load_pem_private_key(pki.key(node_key_of or name).read_bytes(), None)
        self.http = FleetHttpClient(f"https://{HOST}:{fleet.port}", verify=client_tls(pki, name),
                                    interceptors=[NodeAuthHttpInterceptor(key, key.public_key())])
        self.public = public_key_to_bytes(key.public_key())
        self.node = Node(node_id=fleet.nodes[node_key_of or name])
        OPEN.append(self.http)

    def activate(self) -> None:
        self.http.ActivateNode(ActivateNodeRequest(public_key=self.public, heartbeat_interval=10))

    def pull(self) -> tuple[Any, Any]:
        answer = self.http.PullMessages(PullMessagesRequest(node=self.node))
        return message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]

    def push(self, message: Any, tree: Any = None) -> Any:
        message.metadata.__dict__["_message_id"] = message.object_id
        return self.http.PushMessages(PushMessagesRequest(
            node=self.node, messages_list=[message_to_proto(message)], clientapp_runtime_list=[0.0],
            message_object_trees=[tree or ObjectTree(object_id=message.object_id)]))


def asking(exchange: Exchange, deadline_s: float = 3.0, **notes: Note) -> tuple[threading.Thread, dict[str, Answer]]:
    """`ask` in a thread; the answers are in the dict after the join."""
    answers: dict[str, Answer] = {}
    thread = threading.Thread(target=lambda: answers.update(exchange.ask("update", notes, deadline_s=deadline_s)))
    thread.start()
    return thread, answers


def status_of(call: Any) -> int:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        call()
    return int(caught.value.response.status_code)


# Who may connect

def test_no_client_certificate(fleet: FleetServer, pki: Pki) -> None:
    url = f"https://{HOST}:{fleet.port}/v1/fleet/pull-messages"
    assert httpx.post(url, verify=client_tls(pki, "a")).status_code >= 400  # with one, HTTP answers
    with pytest.raises(httpx.TransportError):
        httpx.post(url, verify=client_tls(pki, None))


@pytest.mark.case(36)
def test_certificate_of_another_consortium(fleet: FleetServer, pki: Pki, tmp_path: Path) -> None:
    other = Pki(tmp_path)
    ca.init(tmp_path / "ca", "Consortium")
    other.enrol("a", Role.SITE)
    with pytest.raises(Refused, match=r"link\.refused"):
        connect(link_to(fleet, pki, "a", tls_cert=other.cert("a"), tls_key=other.key("a")))


@pytest.mark.parametrize("name", ["coordinator", "engineer"])
@pytest.mark.case(36)
def test_certificate_of_another_role(fleet: FleetServer, pki: Pki, name: str) -> None:
    with pytest.raises(Refused, match=r"link\.refused"):
        connect(link_to(fleet, pki, name))


@pytest.mark.case(36)
def test_revoked_certificate(pki: Pki, tmp_path: Path) -> None:
    pki.enrol("leaver", Role.SITE)
    roster = {name: pki.cert(name).read_bytes() for name in ("a", "leaver")}
    with server(pki, roster=roster, crl=pki.crl(Role.SITE)) as before:
        assert connect(link_to(before, pki, "leaver")) == before.nodes["leaver"]
    ca.revoke(pki.root / "ca", "leaver")
    with server(pki, roster=roster, crl=pki.crl(Role.SITE)) as after:
        assert connect(link_to(after, pki, "a")) == after.nodes["a"]
        with pytest.raises(Refused, match=r"link\.refused"):
            connect(link_to(after, pki, "leaver"))


@pytest.mark.case(36)
def test_revoked_while_connected(pki: Pki, tmp_path: Path) -> None:
    """The connection was accepted; its next request isn't, once the list in the coordinator's folder has changed."""
    pki.enrol("quitter", Role.SITE)
    trust = tmp_path / "trust"
    shutil.copytree(pki.cert("quitter").parent / "trust", trust)
    roster = {name: pki.cert(name).read_bytes() for name in ("a", "quitter")}
    with server(pki, roster=roster, admits=_admits(WatchedTrust(trust, [Role.SITE]))) as fleet, \
            link_to(fleet, pki, "quitter") as leaving, link_to(fleet, pki, "a") as staying:
        leaving.connect()
        ca.revoke(pki.root / "ca", "quitter")
        leaving.connect()
        shutil.copy(pki.crl(Role.SITE), trust / "crl-site.pem")
        with pytest.raises(Unreachable):
            leaving.connect()
        staying.connect()


@pytest.fixture
def hub(pki: Pki, tmp_path: Path) -> Iterator[tuple[FleetServer, Path]]:
    """A coordinator of its own, and a site's trust folder that doesn't know yet of its revocation."""
    name = f"hub-{tmp_path.name}"
    pki.enrol(name, Role.COORDINATOR)
    shutil.copytree(pki.cert(name).parent / "trust", tmp_path / "trust")
    with server(pki, certificate=pki.cert(name), key=pki.key(name)) as running:
        ca.revoke(pki.trust, name)
        yield running, tmp_path / "trust"


@pytest.mark.case(36)
def test_attack_revoked_coordinator(hub: tuple[FleetServer, Path], pki: Pki) -> None:
    fleet, trust = hub
    assert connect(link_to(fleet, pki, "a", check=coordinator_check(trust))) == fleet.nodes["a"]
    with pytest.raises(Refused, match=r"identity\.revoked"):
        connect(link_to(fleet, pki, "a"))


def test_attack_coordinator_revoked_while_connected(hub: tuple[FleetServer, Path], pki: Pki) -> None:
    """Not one more request over the connection that is open; then none over a new one."""
    fleet, trust = hub
    with link_to(fleet, pki, "a", check=coordinator_check(trust)) as link:
        link.connect()
        shutil.copy(pki.crl(Role.COORDINATOR), trust)
        for _ in range(2):
            with pytest.raises(Refused, match=r"identity\.revoked"):
                link.connect()


def test_attack_coordinator_revoked_while_a_poll_is_held(hub: tuple[FleetServer, Path], pki: Pki) -> None:
    """What the held answer brings isn't handled any more."""
    fleet, trust = hub
    handled: list[bytes] = []

    def handle(body: bytes, arrays: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        handled.append(body)
        shutil.copy(pki.crl(Role.COORDINATOR), trust)
        return body, arrays

    link, exchange = link_to(fleet, pki, "a", check=coordinator_check(trust)), Exchange(fleet.grid, fleet.nodes)
    with serving(link, build_app({"train.update": handle})):
        assert exchange.wait_online(["a"], 5)
        for note in (b"first", b"second"):
            exchange.ask("update", {"a": Note(note)}, deadline_s=1)
        assert handled == [b"first"] and link.trouble == "identity.revoked"


def test_certified_but_not_on_the_roster(fleet: FleetServer, pki: Pki) -> None:
    with pytest.raises(Refused, match=r"link\.roster"):
        connect(link_to(fleet, pki, "outsider"))


def test_another_sites_node_key_over_ones_own_tls(fleet: FleetServer, pki: Pki) -> None:
    """Site a got hold of b's node identity, or signs with it; its own certificate gives it away."""
    thief = Attacker(fleet, pki, "a", node_key_of="b")
    assert status_of(thief.activate) == 403
    assert status_of(thief.pull) == 403


def test_another_sites_node_id_under_ones_own_key(fleet: FleetServer, pki: Pki) -> None:
    thief = Attacker(fleet, pki, "a")
    thief.node = Node(node_id=fleet.nodes["b"])
    assert status_of(thief.pull) == 401


def test_tls_below_1_3(fleet: FleetServer, pki: Pki) -> None:
    old = client_tls(pki, "a")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.TransportError):
        httpx.post(f"https://{HOST}:{fleet.port}/", verify=old)


@pytest.mark.parametrize("path", ["/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/get-fab",
                                  "/v1/fleet/get-run", "/v1/fleet/confirm-message-received", "/v1/control/start-run",
                                  "/v1/control/list-runs", "/v1/runtime/push-messages", "/docs", "/openapi.json", "/"])
def test_calls_that_no_agent_makes(fleet: FleetServer, pki: Pki, path: str) -> None:
    headers = {"content-type": "application/protobuf"}
    answer = httpx.post(f"https://{HOST}:{fleet.port}{path}", verify=client_tls(pki, "a"), headers=headers)
    assert answer.status_code in (400, 401, 403, 404, 415)


def test_a_site_may_not_register_another_node(fleet: FleetServer, pki: Pki) -> None:
    from flwr.proto.fab_pb2 import GetFabRequest
    from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest

    site = Attacker(fleet, pki, "a")
    assert status_of(lambda: site.http.RegisterNode(RegisterNodeFleetRequest(public_key=site.public))) == 403
    assert status_of(lambda: site.http.GetFab(GetFabRequest(node=site.node, hash_str="0"))) == 403


def test_body_over_the_limit(fleet: FleetServer, pki: Pki) -> None:
    site = Attacker(fleet, pki, "a")
    big = PushObjectRequest(node=site.node, object_content=bytes(fleet_guard.MAX_REQUEST_BYTES))
    assert status_of(lambda: site.http.PushObject(big)) == 413


# What a site may send

def note_of(body: bytes = b"{}") -> RecordDict:
    return RecordDict({"c": ConfigRecord({"body": body})})


def test_forged_sender(fleet: FleetServer, pki: Pki, exchange: Exchange) -> None:
    """Site b learnt of a's message and answers it in a's name."""
    a, b = Attacker(fleet, pki, "a"), Attacker(fleet, pki, "b")
    a.activate()
    b.activate()
    thread, answers = asking(exchange, 1.0, a=Note(b"{}"))
    asked, _ = a.pull()
    assert status_of(lambda: b.push(Message(note_of(), reply_to=asked))) == 403
    own = Message(note_of(), reply_to=asked)
    own.metadata.__dict__["_src_node_id"] = b.node.node_id  # in its own name: not a's answer either
    b.push(own)
    thread.join()
    assert answers["a"] == Answer(None, UNREACHABLE)


def test_forged_sender_inside_the_uploaded_object(fleet: FleetServer, pki: Pki, exchange: Exchange) -> None:
    """The envelope is honest, the object that it points to says that another node answers another message."""
    a, b = Attacker(fleet, pki, "a"), Attacker(fleet, pki, "b")
    a.activate()
    b.activate()
    thread, answers = asking(exchange, 2.0, a=Note(b"{}"), b=Note(b"{}"))
    (to_a, _), (to_b, _) = a.pull(), b.pull()
    lie = Message(note_of(b'{"from":"b"}'), reply_to=to_a)
    tree, parts = get_object_tree(lie), fleet_grid.get_all_nested_objects(lie)
    envelope = message_to_proto(fleet_grid.remove_content_from_message(Message(RecordDict(), reply_to=to_b)))
    envelope.metadata.message_id = lie.object_id
    todo = b.http.PushMessages(PushMessagesRequest(node=b.node, messages_list=[envelope], message_object_trees=[tree],
                                                   clientapp_runtime_list=[0.0]))
    for object_id in todo.objects_to_push:
        b.http.PushObject(PushObjectRequest(node=b.node, run_id=to_b.metadata.run_id, object_id=object_id,
                                            object_content=parts[object_id].deflate(), session_id=todo.session_id))
    thread.join()
    assert answers["a"] == Answer(None, UNREACHABLE)
    assert answers["b"] == Answer(Note(b'{"from":"b"}'), None)


def test_reading_another_sites_message(fleet: FleetServer, pki: Pki, exchange: Exchange) -> None:
    a, b = Attacker(fleet, pki, "a"), Attacker(fleet, pki, "b")
    a.activate()
    b.activate()
    thread, _ = asking(exchange, 1.0, a=Note(b"{}", {"w": np.ones(8, np.float32)}))
    asked, tree = a.pull()
    run_id = asked.metadata.run_id

    def read(site: Attacker) -> Any:
        return site.http.PullObject(PullObjectRequest(node=site.node, run_id=run_id, object_id=tree.object_id))

    assert read(a).object_available
    assert status_of(lambda: read(b)) == 403
    thread.join()


def wide(count: int) -> Any:
    return ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id=f"{i:064x}") for i in range(1, count)])


def test_a_reply_of_too_many_objects(fleet: FleetServer, pki: Pki, exchange: Exchange) -> None:
    a = Attacker(fleet, pki, "a")
    a.activate()
    thread, answers = asking(exchange, 1.0, a=Note(b"{}"))
    asked, _ = a.pull()
    reply = message_to_proto(Message(RecordDict(), reply_to=asked))
    reply.metadata.message_id = "0" * 64
    for trees in ([wide(fleet_guard.MAX_OBJECTS + 1)], [], [wide(2), wide(2)], [ObjectTree(object_id="1" * 64)]):
        request = PushMessagesRequest(node=a.node, messages_list=[reply], message_object_trees=trees)
        assert status_of(lambda request=request: a.http.PushMessages(request)) == 403
    thread.join()
    assert answers["a"] == Answer(None, UNREACHABLE) and len(fleet.state.object_store) == 0


def blob(kind: str, children: list[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body


def answered(fleet: FleetServer, pki: Pki, exchange: Exchange, *parts: Callable[[str], bytes]) -> Answer:
    """What comes of a reply whose objects are a chain, each made with the id of the one before; last a RecordDict."""
    a = Attacker(fleet, pki, "a")
    a.activate()
    thread, answers = asking(exchange, 3.0, a=Note(b"{}"))
    asked, _ = a.pull()
    reply, contents, inner = Message(RecordDict(), reply_to=asked), dict[str, bytes](), ""
    for part in (*parts, lambda child: blob("Message", [child], reply.deflate().partition(b"\x00")[2])):
        content = part(inner)
        inner = get_object_id(content)
        contents[inner] = content
    tree = ObjectTree()
    at = tree
    for object_id in reversed(contents):
        at.object_id = object_id
        last, at = at, at.children.add()
    del last.children[:]
    envelope = message_to_proto(reply)
    envelope.metadata.message_id = inner
    todo = a.http.PushMessages(PushMessagesRequest(node=a.node, messages_list=[envelope], message_object_trees=[tree],
                                                   clientapp_runtime_list=[0.0]))
    for object_id in todo.objects_to_push:
        assert a.http.PushObject(PushObjectRequest(
            node=a.node, run_id=asked.metadata.run_id, object_id=object_id, object_content=contents[object_id],
            session_id=todo.session_id)).stored
    thread.join()
    return answers["a"]


def named(kind: str, name: str) -> Callable[[str], bytes]:
    return lambda child: blob(kind, [child], json.dumps({name: child}).encode())


@pytest.mark.parametrize("times", [2**40, 100_000], ids=["not a list", "bomb"])
def test_an_array_that_grows_a_thousandfold(fleet: FleetServer, pki: Pki, exchange: Exchange, times: int) -> None:
    """A few bytes that name one chunk many times, so that the coordinator builds gigabytes of it."""
    ids: Any = times if times > 2**30 else [0] * times
    array = json.dumps({"dtype": "float32", "shape": [1], "stype": "consilo.le", "arraychunk_ids": ids}).encode()
    assert answered(
        fleet, pki, exchange, lambda _: blob("ArrayChunk", [], bytes(2**20)), lambda chunk: blob("Array", [chunk], array),
        named("ArrayRecord", "w"), named("RecordDict", "arrays")) == Answer(None, MALFORMED)


@pytest.mark.parametrize("kind", ["ConfigRecord", "MetricRecord"])
def test_a_record_that_no_one_can_read(fleet: FleetServer, pki: Pki, exchange: Exchange, kind: str) -> None:
    """Protobuf's error is of its own kind; it must not end the run."""
    assert answered(fleet, pki, exchange, lambda _: blob(kind, [], b"\x01\x0c\xff"), named("RecordDict", "c")) == Answer(
        None, MALFORMED)


# What a coordinator may not do to a site

def bundle(marker: Path) -> bytes:
    """A Flower app bundle whose every module writes a marker file, and that would shadow `privacy`."""
    code = f"import pathlib; pathlib.Path({str(marker)!r}).write_text('ran')\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("privacy/__init__.py", code)
        archive.writestr("app.py", code + "from flwr.clientapp import ClientApp\napp = ClientApp()\n")
        archive.writestr("pyproject.toml", '[project]\nname="evil"\nversion="1"\n[tool.flwr.app]\npublisher="x"\n'
                                           '[tool.flwr.app.components]\nserverapp="app:app"\nclientapp="app:app"\n')
    return out.getvalue()


@pytest.mark.case(33)
def test_app_bundle_is_never_run(pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator creates the run with a bundle, as `flwr run` does; the sites answer with their own code."""
    marker, content, served = tmp_path / "ran", bundle(tmp_path / "ran"), []
    create = InMemoryLinkState.create_run

    def with_bundle(state: Any, **terms: Any) -> Any:
        fab_hash = state.store_fab(Fab("", content, {}))
        return create(state, **{**terms, "fab_id": "evil/app", "fab_version": "1.0.0", "fab_hash": fab_hash})

    monkeypatch.setattr(InMemoryLinkState, "create_run", with_bundle)
    monkeypatch.setattr(fleet_guard, "SERVED", fleet_guard.SERVED | {"/v1/fleet/get-fab", "/v1/fleet/get-run"})
    monkeypatch.setattr(InMemoryLinkState, "get_fab", lambda state, fab_hash: served.append(fab_hash))
    with server(pki) as evil, serving(link_to(evil, pki, "a"), ECHO):
        assert evil.grid.run.fab_hash
        exchange = Exchange(evil.grid, evil.nodes)
        exchange.wait_online(["a"], 5)
        assert exchange.ask("update", {"a": Note(b"mine")}, deadline_s=5)["a"] == Answer(Note(b"mine"), None)
    assert not marker.exists() and not served


def test_server_with_a_sites_certificate(pki: Pki) -> None:
    with server(pki, certificate=pki.cert("b"), key=pki.key("b")) as fake, \
            pytest.raises(Refused, match=r"link\.untrusted"):
        connect(link_to(fake, pki, "a"))


def test_server_certified_by_the_sites_issuing_ca(pki: Pki, tmp_path: Path) -> None:
    """A certificate for this very host and for servers, from the consortium, but from the CA of another role."""
    issuer = x509.load_pem_x509_certificate(pki.issuing(Role.SITE).read_bytes())
    issuer_key: Any = load_pem_private_key((pki.root / "ca/keys/issuing-site.key").read_bytes(), None)
    template = x509.load_pem_x509_certificate(pki.cert("coordinator").read_bytes())
    builder = x509.CertificateBuilder(
        issuer.subject, template.subject, template.public_key(), x509.random_serial_number(),
        template.not_valid_before_utc, template.not_valid_after_utc,
        [e for e in template.extensions if e.oid != x509.AuthorityKeyIdentifier.oid])
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), False)
    (tmp_path / "fake.pem").write_bytes(
        builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    with server(pki, certificate=tmp_path / "fake.pem") as fake:
        assert connect(link_to(fake, pki, "a", server_ca=pki.issuing(Role.SITE), check=anyone))  # with that CA
        with pytest.raises(Refused, match=r"link\.untrusted"):
            connect(link_to(fake, pki, "a"))


def test_server_under_another_host_name(fleet: FleetServer, pki: Pki) -> None:
    wrong = FleetLink(f"https://localhost:{fleet.port}", pki.cert("a"), pki.key("a"), pki.issuing(Role.COORDINATOR),
                      check=anyone)
    with pytest.raises(Refused, match=r"link\.untrusted"):
        connect(wrong)


def test_redirect_is_not_followed(pki: Pki) -> None:
    """A coordinator that sends the agent on into the hospital's own network."""
    hits: list[str] = []

    class Redirect(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hits.append(self.path)
            self.send_response(307)
            self.send_header("location", "/internal")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.cert("coordinator"), pki.key("coordinator"))
    with http.server.ThreadingHTTPServer((HOST, 0), Redirect) as evil:
        evil.socket = context.wrap_socket(evil.socket, server_side=True)
        thread = threading.Thread(target=evil.serve_forever, args=(0.05,))
        thread.start()
        link = FleetLink(f"https://{HOST}:{evil.server_port}", pki.cert("a"), pki.key("a"),
                         pki.issuing(Role.COORDINATOR), check=anyone)
        with pytest.raises(Unreachable):
            connect(link)
        evil.shutdown()
        thread.join()
    assert hits == ["/v1/fleet/activate-node"]


@pytest.mark.parametrize("records", [
    {"x": ConfigRecord({"y": 1})},
    {"c": ConfigRecord({"body": "text"})},
    {"c": ConfigRecord({"body": b"{}"}), "arrays": ArrayRecord({"w": Array(np.zeros(2))})},
], ids=["another record", "text", "numpy's format"])
def test_a_message_that_is_no_note(fleet: FleetServer, pki: Pki, records: dict[str, Any]) -> None:
    with serving(link_to(fleet, pki, "a"), ECHO):
        Exchange(fleet.grid, fleet.nodes).wait_online(["a"], 5)
        message = fleet.grid.create_message(RecordDict(records), "train.update", fleet.nodes["a"], "")
        (reply,) = fleet.grid.send_and_receive([message], timeout=5)
        assert reply.error.reason == SiteCode.BAD_MESSAGE


# Life of the connection

def test_restarted_agent_gets_the_message_again(fleet: FleetServer, pki: Pki, exchange: Exchange) -> None:
    dead = Attacker(fleet, pki, "a")
    dead.activate()
    thread, answers = asking(exchange, 5.0, a=Note(b"{}", {"w": np.ones(8, np.float32)}))
    dead.pull()  # and dies
    with serving(link_to(fleet, pki, "a"), ECHO):
        thread.join()
    assert answers["a"].code is None


def test_reply_cut_off_half_way_is_made_again(fleet: FleetServer, pki: Pki, exchange: Exchange) -> None:
    dying = Attacker(fleet, pki, "a")
    dying.activate()
    thread, answers = asking(exchange, 5.0, a=Note(b"{}"))
    asked, _ = dying.pull()
    reply = Message(note_of(b"half"), reply_to=asked)
    envelope = fleet_grid.remove_content_from_message(reply)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    assert dying.http.PushMessages(PushMessagesRequest(
        node=dying.node, messages_list=[message_to_proto(envelope)], message_object_trees=[get_object_tree(reply)],
        clientapp_runtime_list=[0.0])).objects_to_push
    with serving(link_to(fleet, pki, "a"), ECHO):
        thread.join()
    assert answers["a"] == Answer(Note(b"{}"), None)


def test_poll_of_a_dead_agent_takes_no_message(fleet: FleetServer, pki: Pki, exchange: Exchange) -> None:
    """The dead agent's poll is still held when its successor polls: the message goes to the successor."""
    dead = Attacker(fleet, pki, "a")
    dead.activate()
    dead.http.PullMessages(PullMessagesRequest(node=dead.node))  # empty; the next one is held
    held: list[int] = []
    old = threading.Thread(target=lambda: held.append(status_of(dead.pull)))
    old.start()
    time.sleep(0.1)
    with serving(link_to(fleet, pki, "a"), ECHO):
        old.join(2)
        assert held == [409]
        assert exchange.ask("update", {"a": Note(b"{}")}, deadline_s=3)["a"].code is None


def test_coordinator_restart(pki: Pki) -> None:
    first = server(pki).start()
    with serving(link_to(first, pki, "a"), ECHO):
        Exchange(first.grid, first.nodes).wait_online(["a"], 5)
        first.stop()
        with server(pki, port=first.port) as second:
            exchange = Exchange(second.grid, second.nodes)
            assert exchange.wait_online(["a"], 8) == {"a"}
            assert exchange.ask("update", {"a": Note(b"2")}, deadline_s=5)["a"] == Answer(Note(b"2"), None)


@pytest.mark.parametrize("broken", ["Sockets.cut", "FleetGuard._drop_poll"])
def test_stop_during_a_long_poll(pki: Pki, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Either way alone ends the poll: the coordinator lets go of it, or the link cuts its sockets."""
    module = link_tls if broken.startswith("Sockets") else fleet_guard
    owner, _, method = broken.partition(".")
    monkeypatch.setattr(getattr(module, owner), method, lambda *args: None)
    with server(pki) as fleet:
        stop = threading.Event()
        thread = threading.Thread(target=link_to(fleet, pki, "a").run, args=(ECHO, None, stop))
        thread.start()
        Exchange(fleet.grid, fleet.nodes).wait_online(["a"], 5)
        time.sleep(0.3)
        start = time.monotonic()
        stop.set()
        thread.join(5)
        assert not thread.is_alive() and time.monotonic() - start < 2


def test_nothing_is_left_after_a_stage(fleet: FleetServer, pki: Pki, exchange: Exchange) -> None:
    def refuse(body: bytes, arrays: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        if body == b"refuse":
            raise StageRefused(SiteCode.FAILED)
        return body, arrays

    with serving(link_to(fleet, pki, "a"), build_app({"train.update": refuse})):
        exchange.wait_online(["a"], 5)
        for body in (b"refuse", b"inline", b"vectors"):
            arrays = {"w": np.ones(8, np.float32)} if body == b"vectors" else {}
            exchange.ask("update", {"a": Note(body, arrays), "b": Note(body, arrays)}, deadline_s=0.3)
    state = fleet.state
    assert not state.message_ins_store and not state.message_res_store and not state._object_push_sessions
    assert len(state.object_store) == 0


def test_nothing_is_printed(pki: Pki, capfd: pytest.CaptureFixture[str]) -> None:
    with server(pki) as fleet, serving(link_to(fleet, pki, "a"), ECHO):
        exchange = Exchange(fleet.grid, fleet.nodes)
        exchange.wait_online(["a"], 5)
        exchange.ask("update", {"a": Note(b"{}")}, deadline_s=5)
        exchange.ask("none", {"a": Note(b"{}")}, deadline_s=5)
        with pytest.raises(Refused):
            connect(link_to(fleet, pki, "outsider"))
    assert capfd.readouterr() == ("", "")


def test_flower_does_not_phone_home() -> None:
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0" and os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"


# Operator's errors

def test_port_in_use(fleet: FleetServer, pki: Pki) -> None:
    with pytest.raises(Unreachable, match=r"fleet\.port"), server(pki, port=fleet.port):
        pass


def test_bad_files(pki: Pki, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    open_key = tmp_path / "open.key"
    open_key.write_bytes(pki.key("a").read_bytes())
    open_key.chmod(0o644)
    ok = (pki.cert("a"), pki.key("a"), pki.issuing(Role.COORDINATOR))
    url = f"https://{HOST}:1"
    with pytest.raises(UsageError, match=r"fleet\.certificate"):
        server(pki, certificate=junk)
    with pytest.raises(UsageError, match=r"fleet\.roster"):
        server(pki, roster={"a": b"junk"})
    with pytest.raises(Refused, match=r"key\.permissions"):
        server(pki, key=open_key)
    with pytest.raises(Refused, match=r"key\.permissions"):
        FleetLink(url, ok[0], open_key, ok[2], check=anyone)
    with pytest.raises(UsageError, match=r"link\.certificate"):
        FleetLink(url, junk, *ok[1:], check=anyone)
    for wrong in ("http://x:1", "https://x:port", "x:1", "https://"):
        with pytest.raises(UsageError, match=r"link\.url"):
            FleetLink(wrong, *ok, check=anyone)
    with pytest.raises(Unreachable, match=r"link\.unreachable"):
        connect(FleetLink(url, *ok, check=anyone))


def test_app_without_the_category() -> None:
    assert isinstance(build_app({}), ClientApp)
