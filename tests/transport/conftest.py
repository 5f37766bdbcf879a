"""A consortium's certificates, and both transports behind one fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from transport_kit import Federation, Pki, Swappable, link_to, server, serving

from fl_client.link import Handler, build_app
from fl_server.exchange import Exchange
from privacy import ca
from privacy.identity import Role
from simulations.inprocess import InProcessGrid


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Sites a, b and outsider (certified, on no roster), coordinator, an engineer."""
    made = Pki(tmp_path_factory.mktemp("pki"))
    ca.init(made.root / "ca", "Consortium")
    for name, role in {"a": Role.SITE, "b": Role.SITE, "outsider": Role.SITE, "coordinator": Role.COORDINATOR,
                       "engineer": Role.ENGINEER}.items():
        made.enrol(name, role)
    return made


@pytest.fixture(scope="module", params=["embedded", "inprocess"])
def transport(request: pytest.FixtureRequest, pki: Pki) -> Iterator[Federation]:
    slots = {"a": Swappable(), "b": Swappable()}
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
