"""A consortium's certificates, and both transports behind one fixture."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fl_client.link import FleetLink, Handler, build_app
from fl_server.exchange import Exchange
from fl_server.fleet import FleetServer
from privacy import ca, identity
from privacy.identity import Role
from simulations.inprocess import InProcessGrid

HOST = "127.0.0.1"


@dataclass
class Pki:
    """A CA folder and the key folders of everybody it certified."""

    root: Path

    def key(self, name: str) -> Path:
        return self.root / "people" / name / "tls.key"

    def cert(self, name: str) -> Path:
        return self.root / "ca" / "issued" / name / "tls.pem"

    def issuing(self, role: Role) -> Path:
        return self.root / "ca" / f"issuing-{role}.pem"

    def crl(self, role: Role) -> Path:
        return self.root / "ca" / f"crl-{role}.pem"

    def enrol(self, name: str, role: Role) -> None:
        request = identity.create_request(self.root / "people" / name, name, f"Org {name}")
        ca.issue(self.root / "ca", request, role, hosts=[HOST] if role is Role.COORDINATOR else [])


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Sites a, b and outsider (certified, on no roster), coordinator, an engineer."""
    made = Pki(tmp_path_factory.mktemp("pki"))
    ca.init(made.root / "ca", "Consortium")
    for name, role in {"a": Role.SITE, "b": Role.SITE, "outsider": Role.SITE, "coordinator": Role.COORDINATOR,
                       "engineer": Role.ENGINEER}.items():
        made.enrol(name, role)
    return made


def server(pki: Pki, **changes: Any) -> FleetServer:
    settings: dict[str, Any] = {
        "host": HOST, "port": 0, "certificate": pki.cert("coordinator"), "key": pki.key("coordinator"),
        "trusted": [pki.issuing(Role.SITE)], "roster": {name: pki.cert(name).read_bytes() for name in ("a", "b")}}
    return FleetServer(**{**settings, **changes})


def link_to(fleet: FleetServer, pki: Pki, name: str, **changes: Any) -> FleetLink:
    settings: dict[str, Any] = {"tls_cert": pki.cert(name), "tls_key": pki.key(name),
                                "server_ca": pki.issuing(Role.COORDINATOR)}
    return FleetLink(f"https://{HOST}:{fleet.port}", **{**settings, **changes})


@contextmanager
def serving(link: FleetLink, app: Any) -> Iterator[threading.Thread]:
    """The link's loop in a thread; it must end within 2 s of the stop."""
    stop = threading.Event()
    thread = threading.Thread(target=link.run, args=(app, None, stop))
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(5)
        assert not thread.is_alive()


@dataclass
class Federation:
    """An exchange with sites whose apps a test provides."""

    exchange: Exchange
    apps: dict[str, Any] = field(default_factory=dict)


class _Swappable:
    """A ClientApp that a test puts in later: links start before the test knows its handlers."""

    def __init__(self) -> None:
        self.app: Any = build_app({})

    def __call__(self, message: Any, context: Any) -> Any:
        return self.app(message, context)


Setup = Callable[[Mapping[str, Any]], Exchange]


@pytest.fixture(scope="module", params=["embedded", "inprocess"])
def transport(request: pytest.FixtureRequest, pki: Pki) -> Iterator[Federation]:
    slots = {"a": _Swappable(), "b": _Swappable()}
    with ExitStack() as stack:
        if request.param == "inprocess":
            nodes = {"a": 101, "b": 102}
            exchange = Exchange(InProcessGrid({nodes[name]: slot for name, slot in slots.items()}), nodes)
        else:
            fleet = stack.enter_context(server(pki))
            exchange = Exchange(fleet.grid, fleet.nodes)
            for name, slot in slots.items():
                stack.enter_context(serving(link_to(fleet, pki, name), slot))
            assert exchange.wait_online(["a", "b"], 5) == {"a", "b"}
        yield Federation(exchange, dict(slots))


@pytest.fixture
def sites(transport: Federation) -> Callable[..., Exchange]:
    """sites(a=handler or app, b=...): an exchange with these, for the stage `update`."""

    def with_handlers(**given: Handler | Any) -> Exchange:
        for name, slot in transport.apps.items():
            handler = given.get(name)
            slot.app = handler if hasattr(handler, "train") else build_app({"train.update": handler} if handler else {})
        return transport.exchange

    return with_handlers
