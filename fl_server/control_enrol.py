"""The relay of enrolment: requests wait here for the CA's operator, answers for the site. Neither is understood here.

Guarantees: at most `MAX_WAITING` requests of at most `MAX_ENROLMENT_BYTES` lie here, none for longer than `KEPT`; what
waits under a number is never replaced; who knows no number learns nothing. A number is a secret of 128 bits as long as
its request waits, so that nobody can take its place.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fl_server.control_admission import WatchedTrust
from fl_server.control_services import trust_pems
from privacy.control import MAX_ENROLMENT_BYTES
from privacy.control import consilo_control_pb2 as pb
from privacy.control import consilo_control_pb2_grpc as rpc
from privacy.control.reasons import reason
from privacy.files import FileLayer, read_file

MAX_WAITING = 200
KEPT = timedelta(days=30)
_ID = re.compile(r"[0-9a-f]{32}")


class Relay:
    """`folder`: `enrolments/` of the store, with <id>/request.json and <id>/answer.json."""

    def __init__(self, folder: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._folder, self._clock, self._lock, self._layer = folder, clock, threading.Lock(), FileLayer()
        folder.mkdir(parents=True, exist_ok=True)

    def submit(self, number: str, document: bytes) -> None:
        """The same document again is no error. Raises UsageError `control.malformed`, `control.too_large`; Refused
        `enrol.taken`; Unreachable `enrol.full`."""
        if not _ID.fullmatch(number):
            raise reason("control.malformed")
        if not 0 < len(document) <= MAX_ENROLMENT_BYTES:
            raise reason("control.too_large")
        path = self._folder / number / "request.json"
        with self._lock:
            self._forget()
            if path.exists():
                if read_file(path) != document:
                    raise reason("enrol.taken")
                return
            if len(list(self._folder.iterdir())) >= MAX_WAITING:
                raise reason("enrol.full")
            path.parent.mkdir(exist_ok=True)
            self._layer.write_atomic(path, document)

    def poll(self, number: str) -> bytes:
        """The CA's answer, or b"". Raises UsageError `enrol.unknown`."""
        folder = self._folder / number
        if not _ID.fullmatch(number) or not (folder / "request.json").is_file():
            raise reason("enrol.unknown")
        answer = folder / "answer.json"
        return read_file(answer) if answer.is_file() else b""

    def _forget(self) -> None:
        limit = (self._clock() - KEPT).timestamp()
        for folder in self._folder.iterdir():
            if _ID.fullmatch(folder.name) and folder.stat().st_mtime < limit:
                shutil.rmtree(folder)


class EnrolmentService(rpc.EnrolmentServicer):
    def __init__(self, relay: Relay, trust: WatchedTrust) -> None:
        self._relay, self._trust = relay, trust

    def Authorities(self, request: pb.AuthoritiesRequest, context: Any) -> pb.AuthoritiesReply:
        return pb.AuthoritiesReply(root=read_file(self._trust.folder / "root.pem"),
                                   issuing=trust_pems(self._trust, "issuing"), crls=trust_pems(self._trust, "crl"))

    def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitReply:
        self._relay.submit(request.id, request.document)
        return pb.SubmitReply()

    def Poll(self, request: pb.PollRequest, context: Any) -> pb.PollReply:
        return pb.PollReply(certificates=self._relay.poll(request.id))
