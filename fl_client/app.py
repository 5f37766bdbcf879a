"""What runs at a site when a message comes: handlers of plain bytes and vectors, as a Flower `ClientApp`.

Guarantees: a handler sees only notes of exactly the agreed form (see `fl_server.exchange`); of what it raises, only a
`SiteCode` leaves the site, never a text. Uses Flower's public API only; both transports dispatch through here.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from privacy.errors import SiteCode, UsageError

log = logging.getLogger("consilo.app")

Vector = NDArray[np.float32] | NDArray[np.uint32] | NDArray[np.uint16]
Reply = tuple[bytes, Mapping[str, Vector]]
Handler = Callable[[bytes, dict[str, Vector]], Reply]

MAX_BODY_BYTES = 4 * 2**20
MAX_VECTOR_BYTES = 512 * 2**20  # all vectors of one note
MAX_VECTORS = 16
STYPE = "consilo.le"
DTYPES = {"float32": "<f4", "uint32": "<u4", "uint16": "<u2"}


class StageRefused(Exception):
    """Raised by a handler: the site won't do this stage. `code` is all that the coordinator learns."""

    def __init__(self, code: SiteCode) -> None:
        super().__init__(code.value)
        self.code = code


def build_app(handlers: Mapping[str, Handler]) -> Any:
    """A `ClientApp` of handlers by message type (`train.update`, `query.closing`).

    A handler gets a note (body: bytes, arrays: writable vectors (n,) of float32, uint32 or uint16) and returns one. What
    it raises becomes an error reply: `StageRefused` its code, anything else `site.failed`; a note that isn't of the
    agreed form gets `site.bad_message`.
    """
    app = ClientApp()
    for name, handler in handlers.items():
        kind, _, stage = name.partition(".")
        {"train": app.train, "query": app.query}[kind](stage)(_on_message(handler))
    return app


def dispatch(app: Any, message: Any, context: Any) -> Any:
    """The app's reply; an error reply, without the text, if it raises."""
    try:
        return app(message, context)
    except Exception as e:  # noqa: BLE001 - nothing of it may leave the site
        where = traceback.extract_tb(e.__traceback__)[-1]
        log.error("%s failed: %s at %s:%s", message.metadata.message_type, type(e).__name__, where.name, where.lineno)
        return refusal(message, SiteCode.FAILED)


def refusal(message: Any, code: SiteCode) -> Any:
    return Message(Error(1, code.value), reply_to=message)


def reply(message: Any, body: bytes, arrays: Mapping[str, Vector]) -> Any:
    """A note as the reply to a message. Raises UsageError `app.note` (over a limit, or another dtype or shape)."""
    size = sum(vector.nbytes for vector in arrays.values())
    if (len(body) > MAX_BODY_BYTES or len(arrays) > MAX_VECTORS or size > MAX_VECTOR_BYTES
            or any(vector.ndim != 1 or vector.dtype.name not in DTYPES for vector in arrays.values())):
        raise UsageError("app.note", f"A reply of {len(body)} + {size} bytes can't be sent.",
                         "Keep the limits, and send float32, uint32 or uint16 vectors.")
    records = RecordDict({"c": ConfigRecord({"body": body})})
    if arrays:
        records["arrays"] = ArrayRecord({
            name: Array(vector.dtype.name, vector.shape, STYPE,
                        vector.astype(DTYPES[vector.dtype.name], copy=False).tobytes())
            for name, vector in arrays.items()})
    return Message(records, reply_to=message)


def to_note(message: Any) -> tuple[bytes, dict[str, Vector]]:
    """Body and vectors of a message from outside. Raises StageRefused `site.bad_message` if it isn't exactly a note."""
    content = RecordDict() if message.has_error() else message.content
    config, record = content.get("c"), content.get("arrays", ArrayRecord())
    if (not isinstance(config, ConfigRecord) or set(config) != {"body"} or not isinstance(config["body"], bytes)
            or len(config["body"]) > MAX_BODY_BYTES or set(content) - {"c", "arrays"}
            or not isinstance(record, ArrayRecord) or len(record) > MAX_VECTORS
            or sum(len(array.data) for array in record.values()) > MAX_VECTOR_BYTES):
        raise StageRefused(SiteCode.BAD_MESSAGE)
    arrays: dict[str, Vector] = {}
    for name, array in record.items():
        wire = DTYPES.get(array.dtype)
        if (array.stype != STYPE or wire is None or len(array.shape) != 1
                or len(array.data) != array.shape[0] * np.dtype(wire).itemsize):
            raise StageRefused(SiteCode.BAD_MESSAGE)
        arrays[name] = np.frombuffer(array.data, wire).astype(array.dtype)
    return config["body"], arrays


def _on_message(handler: Handler) -> Callable[[Any, Any], Any]:
    def run(message: Any, context: Any) -> Any:
        try:
            return reply(message, *handler(*to_note(message)))
        except StageRefused as e:
            return refusal(message, e.code)

    return run
