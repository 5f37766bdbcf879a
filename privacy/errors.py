"""The error tree. Every error carries a stable code, its cause and its mend, each on one line.

ConsiloError            70 a bug, unless a subclass says otherwise
 +- CheckFailed          1 something was checked and did not hold
 +- UsageError           2 command line, configuration, input file
 +- Refused              3 policy, budget, contract, identity
 +- Unreachable          4 a peer can't be reached, or timed out
 +- RoundVoid            5 a round ended without a result
 +- Aborted              5 a secure-aggregation session ended; its code depends on neither data nor secrets

Codes are documented in docs/errors.md (a test compares). What may travel to a peer is a closed list: `SiteCode`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum

MAX_WORDS = 4000  # characters of a cause or mend; the longest lists every key of the configuration


class ConsiloError(Exception):
    """Base of all errors that this project raises on purpose. Whatever is named in it, it is printable and bounded."""

    exit_code = 70

    def __init__(self, code: str, cause: str, mend: str) -> None:
        cause, mend = _line(cause), _line(mend)
        super().__init__(f"{code}: {cause} Mend: {mend}")
        self.code, self.cause, self.mend = code, cause, mend

    def as_dict(self) -> dict[str, dict[str, str]]:
        return {"error": {"code": self.code, "cause": self.cause, "mend": self.mend}}


def _line(text: str) -> str:
    text = " ".join(text[:MAX_WORDS].split()) + ("..." if len(text) > MAX_WORDS else "")
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class CheckFailed(ConsiloError):
    exit_code = 1


class UsageError(ConsiloError):
    exit_code = 2


class Refused(ConsiloError):
    exit_code = 3


class Unreachable(ConsiloError):
    exit_code = 4


class RoundVoid(ConsiloError):
    """`sites`: the names that it is about, if any."""

    exit_code = 5
    sites: tuple[str, ...] = ()


class Aborted(ConsiloError):
    exit_code = 5


class SiteCode(StrEnum):
    """The only reasons that a site ever sends. At most 12; none depends on a record."""

    FAILED = "site.failed"
    BAD_MESSAGE = "site.bad_message"
    STALE_ROUND = "site.stale_round"
    CONTRACT = "site.contract_mismatch"
    MODEL = "site.model_mismatch"
    ADAPTER = "site.adapter_invalid"
    BUDGET = "site.budget_exhausted"
    SECAGG = "site.session_aborted"
    HISTORY = "site.history_conflict"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as "Did you mean 'rounds'?", or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known here: {', '.join(names)}."
