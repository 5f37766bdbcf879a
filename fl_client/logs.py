"""The agent's logs: JSON lines, plain ones on a terminal, and an audit log that rotates. Nothing secret in any.

What is logged is the project's own words and codes. As a second wall, keys, tokens and the texts of exceptions are cut
out of whatever arrives here, from libraries too.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

AUDIT = "audit.jsonl"
AUDIT_BYTES, AUDIT_FILES = 2**20, 8
_SECRETS = re.compile(r"-----BEGIN[^-]*PRIVATE KEY-----.*?(?:-----END[^-]*-----|\Z)"
                      r"|(?i:\b(?:token|password|secret|authorization|bearer)\b[\"']?\s*[=: ]\s*)\S+", re.S)
_OWN = ("message", "asctime", "taskName")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | set(_OWN)
log = logging.getLogger("consilo.audit")


def redact(text: str) -> str:
    """Text on one line, without private keys and without what follows a word such as token or password."""
    return " ".join(_SECRETS.sub("[redacted]", text).split())


class _Lines(logging.Formatter):
    """Of an exception only its type; of the record its message and its extra fields."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": time, "level": record.levelname.lower(), "logger": record.name,
                  "message": redact(record.getMessage())}
        if record.exc_info and record.exc_info[0]:
            fields["exception"] = record.exc_info[0].__name__
        fields |= {name: redact(str(value)) for name, value in vars(record).items() if name not in _STANDARD}
        return json.dumps(fields, ensure_ascii=False) if self._as_json else " ".join(fields.values())


def configure(state: Path, stream: TextIO | None = None) -> None:
    """Log to a stream (stderr if None; plain on a terminal, else JSON); what was asked and answered also goes to
    `state`/audit.jsonl."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    console = logging.StreamHandler(stream or sys.stderr)
    console.setFormatter(_Lines(as_json=not console.stream.isatty()))
    logging.getLogger().addHandler(console)
    logging.getLogger("consilo").setLevel(logging.INFO)
    events = RotatingFileHandler(state / AUDIT, maxBytes=AUDIT_BYTES, backupCount=AUDIT_FILES, encoding="utf-8")
    events.setFormatter(_Lines(as_json=True))
    (state / AUDIT).chmod(0o600)
    log.addHandler(events)
    log.propagate = False


def audit(event: str, **fields: str | int) -> None:
    """One event of the audit log: what was asked of this site, and what it answered."""
    log.info(event, extra=fields)
