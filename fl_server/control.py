"""The coordinator's control plane: two gRPC listeners over one folder (docs/control-plane.md).

Guarantees: the first listener speaks to holders of a site's, engineer's or auditor's certificate only (TLS 1.3, checked
again on every call), the second serves enrolment to whoever connects; neither waits for the other, and both are bounded
in calls, streams, connections and bytes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fl_server.control_admission import READERS, Admission, OpenAdmission, RoleAdmission, WatchedTrust
from fl_server.control_enrol import EnrolmentService, Relay
from fl_server.control_guard import Guard
from fl_server.control_services import AdaptersService, ContractsService, EvidenceService, RosterService
from fl_server.control_store import ControlStore
from privacy.control import MAX_ENROLMENT_BYTES, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, STREAM_S, UNARY_S
from privacy.control import consilo_control_pb2 as pb
from privacy.control import consilo_control_pb2_grpc as rpc
from privacy.errors import Unreachable
from privacy.files import read_file, read_private
from privacy.identity import load_certificate

SERVICES = ("Roster", "Contracts", "Evidence", "Adapters")
PACKAGE = pb.DESCRIPTOR.package


@dataclass(frozen=True)
class Limits:
    """Of one listener. Times in seconds."""

    calls: int
    request_bytes: int
    connections: int = 256
    unary_s: float = UNARY_S
    stream_s: float = STREAM_S
    handshake_s: float = 10.0
    idle_s: float = 120.0
    grace_s: float = 2.0

    def options(self) -> list[tuple[str, int]]:
        return [("grpc.max_receive_message_length", self.request_bytes), ("grpc.max_send_message_length", MAX_REPLY_BYTES),
                ("grpc.max_metadata_size", 8192), ("grpc.max_concurrent_streams", 8),
                ("grpc.max_allowed_incoming_connections", self.connections), ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", round(1000 * self.handshake_s)),
                ("grpc.max_connection_idle_ms", round(1000 * self.idle_s)),
                ("grpc.keepalive_time_ms", 60_000), ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 20_000), ("grpc.http2.max_ping_strikes", 2)]


CONTROL = Limits(calls=32, request_bytes=MAX_REQUEST_BYTES)
ENROL = Limits(calls=16, request_bytes=2 * MAX_ENROLMENT_BYTES)


class ControlServer:
    """`with ControlServer(...) as control:` listens; `control.port`, `control.enrol_port` say where.

    store: what is served. certificate, key: of the coordinator, PEM. trust: its trust folder, with a revocation list for
    every role that may call. port, enrol_port: 0 picks a free one; enrol_port None leaves enrolment out.
    Raises Refused `key.permissions`, `identity.*`; UsageError `key.missing`, `file.missing`; and, on start, Unreachable
    `control.port`.
    """

    def __init__(self, store: ControlStore, *, certificate: Path, key: Path, trust: Path, host: str = "127.0.0.1",
                 port: int = 0, enrol_port: int | None = None, limits: Limits = CONTROL,
                 enrol_limits: Limits = ENROL) -> None:
        self._host, self.port, self.enrol_port = host, port, enrol_port
        pair = (read_private(key), read_file(certificate))
        load_certificate(pair[1], certificate.name)
        watched = WatchedTrust(trust)
        callers = b"".join(read_file(trust / f"issuing-{role}.pem") for role in READERS)
        self._health = health.HealthServicer()
        self._control = _server(RoleAdmission(watched), limits)
        self._control_tls = grpc.ssl_server_credentials([pair], callers, require_client_auth=True)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._control)
        rpc.add_RosterServicer_to_server(RosterService(store, watched), self._control)
        rpc.add_ContractsServicer_to_server(ContractsService(store), self._control)
        rpc.add_EvidenceServicer_to_server(EvidenceService(store), self._control)
        rpc.add_AdaptersServicer_to_server(AdaptersService(store), self._control)
        names = [f"{PACKAGE}.{name}" for name in SERVICES]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._control)
        self._enrol = None if enrol_port is None else _server(OpenAdmission(), enrol_limits)
        self._enrol_tls = grpc.ssl_server_credentials([pair])
        if self._enrol is not None:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._enrol)
            rpc.add_EnrolmentServicer_to_server(EnrolmentService(Relay(store.root / "enrolments"), watched), self._enrol)
        self._grace_s = limits.grace_s

    def start(self) -> ControlServer:
        """Listen; returns once connections are accepted."""
        self.port = self._listen(self._control, self._control_tls, self.port)
        if self._enrol is not None and self.enrol_port is not None:
            self.enrol_port = self._listen(self._enrol, self._enrol_tls, self.enrol_port)
            self._enrol.start()
        self._control.start()
        for name in ("", *(f"{PACKAGE}.{service}" for service in SERVICES)):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self

    def stop(self) -> None:
        """Say so over the health service, let calls end for the grace time, then cut them."""
        self._health.enter_graceful_shutdown()
        stopped = [server.stop(self._grace_s) for server in (self._control, self._enrol) if server is not None]
        for each in stopped:
            each.wait()

    def _listen(self, server: grpc.Server, tls: grpc.ServerCredentials, port: int) -> int:
        try:
            return server.add_secure_port(f"{self._host}:{port}", tls)
        except RuntimeError as e:
            raise Unreachable("control.port", f"Port {port} of {self._host} can't be used.",
                              "Choose another port, or stop what listens there.") from e

    def __enter__(self) -> ControlServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


def _server(admit: Admission, limits: Limits) -> grpc.Server:
    """As many threads as calls: none waits for another."""
    return grpc.server(ThreadPoolExecutor(limits.calls, thread_name_prefix="control"), options=limits.options(),
                       interceptors=[Guard(admit, unary_s=limits.unary_s, stream_s=limits.stream_s)],
                       maximum_concurrent_rpcs=limits.calls)
