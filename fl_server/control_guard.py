"""What stands before every method of the control plane.

Guarantees: nothing of a request is read before its caller is admitted (every method is taken as a stream of bytes, which
is parsed only then); no call outlives its limit, however slowly its peer reads or writes; one peer holds at most
`PER_PEER` calls; a caller learns a code of `privacy.control.reasons` and nothing else.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from fl_server.control_admission import Admission
from privacy.control import STREAM_S, UNARY_S
from privacy.control.reasons import REASONS, reason
from privacy.errors import ConsiloError

log = logging.getLogger("consilo.control")
PER_PEER = 4


class Guard(grpc.ServerInterceptor):
    """See the module's docstring. unary_s, stream_s: limits of a whole call, in seconds."""

    def __init__(self, admit: Admission, *, unary_s: float = UNARY_S, stream_s: float = STREAM_S) -> None:
        self._admit, self._limits, self._calls, self._lock = admit, (unary_s, stream_s), Counter[str](), threading.Lock()

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        return handler and grpc.stream_stream_rpc_method_handler(partial(self._serve, details.method, handler))

    def _serve(self, method: str, handler: Any, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        limit = threading.Timer(self._limits[handler.response_streaming], context.cancel)
        limit.daemon = True
        limit.start()
        context.add_callback(limit.cancel)
        try:
            self._count(self._admit(method, context), context)
            yield from _answer(handler, requests, context)
            return
        except grpc.RpcError:
            raise  # the peer is gone
        except ConsiloError as e:
            code = e.code if e.code in REASONS else "internal.bug"
        except Exception as e:  # noqa: BLE001 - the edge of the process: what it says must not travel
            log.error("control: %s failed with %s", method, type(e).__name__)
            code = "internal.bug"
        context.abort(grpc.StatusCode[REASONS[code].status], code)

    def _count(self, key: str, context: Any) -> None:
        """One more call of this peer, until it ends. Raises Unreachable `control.busy`."""
        with self._lock:
            if self._calls[key] >= PER_PEER:
                raise reason("control.busy")
            self._calls[key] += 1
        if not context.add_callback(partial(self._uncount, key)):
            self._uncount(key)

    def _uncount(self, key: str) -> None:
        with self._lock:
            self._calls[key] -= 1
            if not self._calls[key]:
                del self._calls[key]


def _answer(handler: Any, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
    """Parse, call, serialise. Raises UsageError `control.malformed`."""
    parsed = (_parse(handler, data) for data in requests)
    argument = parsed if handler.request_streaming else next(parsed, None)
    if argument is None:
        raise reason("control.malformed")
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    answer = next(kind for kind in kinds if kind is not None)(argument, context)
    for each in answer if handler.response_streaming else (answer,):
        yield handler.response_serializer(each)


def _parse(handler: Any, data: bytes) -> Any:
    try:
        return handler.request_deserializer(data)
    except DecodeError as e:
        raise reason("control.malformed") from e
