"""What the transport's tests share: certificates of a consortium, a listener, links that serve in threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_client.link import FleetLink, build_app
from fl_client.link_tls import coordinator_check
from fl_server.exchange import Exchange
from fl_server.fleet import FleetServer
from privacy import ca, identity
from privacy.identity import Role

HOST = "127.0.0.1"


@dataclass
class Pki:
    """A CA folder and the key folders of everybody it certified."""

    root: Path

    def key(self, name: str) -> Path:
        return self.root / "people" / name / "tls.key"

    def cert(self, name: str) -> Path:
        return self.root / "ca" / "issued" / name / "tls.pem"

    @property
    def trust(self) -> Path:
        return self.root / "ca"

    def issuing(self, role: Role) -> Path:
        return self.root / "ca" / f"issuing-{role}.pem"

    def crl(self, role: Role) -> Path:
        return self.root / "ca" / f"crl-{role}.pem"

    def enrol(self, name: str, role: Role) -> None:
        request = identity.create_request(self.root / "people" / name, name, f"Org {name}")
        ca.issue(self.root / "ca", request, role, hosts=[HOST] if role is Role.COORDINATOR else [])


def server(pki: Pki, **changes: Any) -> FleetServer:
    settings: dict[str, Any] = {
        "host": HOST, "port": 0, "certificate": pki.cert("coordinator"), "key": pki.key("coordinator"),
        "trusted": [pki.issuing(Role.SITE)], "roster": {name: pki.cert(name).read_bytes() for name in ("a", "b")}}
    return FleetServer(**{**settings, **changes})


def link_to(fleet: FleetServer, pki: Pki, name: str, **changes: Any) -> FleetLink:
    settings: dict[str, Any] = {"tls_cert": pki.cert(name), "tls_key": pki.key(name),
                                "server_ca": pki.issuing(Role.COORDINATOR), "check": coordinator_check(pki.trust)}
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


class Swappable:
    """A ClientApp that a test puts in later: links start before the test knows its handlers."""

    def __init__(self) -> None:
        self.app: Any = build_app({})

    def __call__(self, message: Any, context: Any) -> Any:
        return self.app(message, context)
