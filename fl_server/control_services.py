"""The services for certified callers: thin, over `ControlStore`. Who called is `caller()`; the guard has let them in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from fl_server.control_admission import WatchedTrust, caller
from fl_server.control_store import ControlStore
from privacy.control import consilo_control_pb2 as pb
from privacy.control import consilo_control_pb2_grpc as rpc
from privacy.files import read_file


def trust_pems(trust: WatchedTrust, kind: Literal["issuing", "crl"]) -> list[bytes]:
    """The files of one kind in the trust folder."""
    trust.current()
    return [read_file(path) for path in sorted(trust.folder.glob(f"{kind}-*.pem"))]


class RosterService(rpc.RosterServicer):
    def __init__(self, store: ControlStore, trust: WatchedTrust) -> None:
        self._store, self._trust = store, trust

    def Get(self, request: pb.RosterRequest, context: Any) -> pb.RosterReply:
        return pb.RosterReply(roster=self._store.roster(), crls=trust_pems(self._trust, "crl"))


class ContractsService(rpc.ContractsServicer):
    def __init__(self, store: ControlStore) -> None:
        self._store = store

    def List(self, request: pb.ContractsRequest, context: Any) -> pb.ContractsReply:
        return pb.ContractsReply(digests=self._store.contracts(caller()))

    def Get(self, request: pb.ContractRequest, context: Any) -> pb.ContractReply:
        contract, signature = self._store.contract(request.digest, caller())
        return pb.ContractReply(contract=contract, signature=signature)

    def Approve(self, request: pb.ApproveRequest, context: Any) -> pb.ApproveReply:
        self._store.approve(request.digest, caller(), request.envelope)
        return pb.ApproveReply()


class EvidenceService(rpc.EvidenceServicer):
    def __init__(self, store: ControlStore) -> None:
        self._store = store

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.Chunk]:
        return _chunks(self._store, "evidence", request)


class AdaptersService(rpc.AdaptersServicer):
    def __init__(self, store: ControlStore) -> None:
        self._store = store

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.Chunk]:
        return _chunks(self._store, "adapter", request)


def _chunks(store: ControlStore, kind: Literal["evidence", "adapter"], request: pb.FetchRequest) -> Iterator[pb.Chunk]:
    for name, data, last, sha256 in store.parts(kind, request.run, caller(), request.after):
        yield pb.Chunk(name=name, data=data, last=last, sha256=sha256)
