"""What a site answers, and answers again: stored replies, and the code that stands for each local error."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fl_client.app import Handler, Reply, StageRefused, Vector
from fl_client.exit import Outgoing, unwrap
from fl_client.logs import audit
from privacy.canonical import labelled_hash
from privacy.errors import Aborted, ConsiloError, SiteCode

log = logging.getLogger("consilo.round")
CODES = {"budget.exhausted": SiteCode.BUDGET, "budget.not_encumbered": SiteCode.BUDGET,
         "log.split_view": SiteCode.HISTORY, "ledger.rolled_back": SiteCode.HISTORY,
         "adapter.tensor": SiteCode.ADAPTER, "json.invalid": SiteCode.BAD_MESSAGE,
         "rule.basis": SiteCode.BAD_MESSAGE, "rule.vector": SiteCode.BAD_MESSAGE,
         "config.invalid": SiteCode.BAD_MESSAGE, "config.unknown_key": SiteCode.BAD_MESSAGE}


class Replies:
    """A byte-identical repetition of a stage's message gets the stored reply; nothing is computed twice for it.

    on_abort: called when a handler raises Aborted; on_refusal: with the code of every refusal; before it leaves.
    """

    def __init__(self, on_abort: Callable[[], None], on_refusal: Callable[[SiteCode], None]) -> None:
        self._stored: dict[str, tuple[bytes, Reply]] = {}
        self._on_abort, self._on_refusal = on_abort, on_refusal

    def forget(self, prefix: str) -> None:
        """Drop the replies to stages whose name begins so."""
        self._stored = {name: stored for name, stored in self._stored.items() if not name.startswith(prefix)}

    def once(self, name: str, handler: Callable[[bytes, dict[str, Vector]], Outgoing]) -> Handler:
        """The handler with stored replies; what leaves passes `unwrap`, and an error leaves as a code only."""

        def run(body: bytes, arrays: dict[str, Vector]) -> Reply:
            parts = [p for array_name in sorted(arrays) for p in (array_name, arrays[array_name].tobytes())]
            key = labelled_hash("consilo stage", name, body, *parts)
            if name in self._stored and self._stored[name][0] == key:
                return self._stored[name][1]
            try:
                reply = unwrap(handler(body, arrays))
            except StageRefused as e:
                audit(name, answer=e.code.value, asked=key.hex())
                self._on_refusal(e.code)
                raise
            except ConsiloError as e:
                log.error("%s refused here: %s", name, e)
                if isinstance(e, Aborted):
                    self._on_abort()
                code = CODES.get(e.code, SiteCode.SECAGG if isinstance(e, Aborted) else SiteCode.FAILED)
                audit(name, answer=code.value, cause=e.code, asked=key.hex())
                self._on_refusal(code)
                raise StageRefused(code) from e
            audit(name, answer="done", asked=key.hex())
            self._stored[name] = (key, reply)
            return reply

        return run
