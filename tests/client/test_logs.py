"""Logs hold codes and the project's own words; keys, tokens and exceptions' texts are cut out of whatever arrives."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_client import logs

KEY = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIK3\n-----END PRIVATE KEY-----"


@pytest.fixture
def console() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def state(tmp_path: Path, console: io.StringIO) -> Iterator[Path]:
    root = logging.getLogger()
    logs.configure(tmp_path / "state", console)
    yield tmp_path / "state"
    for handler in [h for h in root.handlers if getattr(h, "stream", None) is console]:
        root.removeHandler(handler)
    for handler in list(logs.log.handlers):
        logs.log.removeHandler(handler)
        handler.close()
    logs.log.propagate = True


@pytest.mark.parametrize("text", [
    KEY, KEY[:60], "token=abc123", "token: abc123", '"password": "abc123"', "Authorization: abc123", "bearer abc123",
    "SECRET abc123"])
@pytest.mark.case(31)
def test_secrets_are_cut_out(text: str) -> None:
    out = logs.redact(f"before {text} after")
    assert "before" in out and "abc123" not in out and "MC4C" not in out


def test_what_is_no_secret_stays() -> None:
    text = "contract 9f86d081884c7d65 refused: policy.epsilon"
    assert logs.redact(text) == text


def test_lines_are_json_without_an_exceptions_text(state: Path, console: io.StringIO) -> None:
    try:
        raise ValueError("patient 4711")
    except ValueError:
        logging.getLogger("consilo.test").exception("failed")
    line = json.loads(console.getvalue())
    assert (line["message"], line["exception"], line["level"]) == ("failed", "ValueError", "error")
    assert "4711" not in str(line)


@pytest.mark.case(31)
def test_a_library_that_logs_a_token(state: Path, console: io.StringIO) -> None:
    logging.getLogger("somebody").warning("sending token=%s\nnext line", "abc123")
    err = console.getvalue()
    assert "abc123" not in err and len(err.splitlines()) == 1, err


def test_the_audit_log_says_what_was_asked_and_answered(state: Path, console: io.StringIO) -> None:
    logs.audit("train.update", answer="site.contract_mismatch", asked="ab")
    event = json.loads((state / logs.AUDIT).read_text())
    assert (event["message"], event["answer"], event["asked"]) == ("train.update", "site.contract_mismatch", "ab")
    assert (state / logs.AUDIT).stat().st_mode & 0o077 == 0
    assert console.getvalue() == "", "it is not repeated on the console"


def test_the_audit_log_rotates(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logs.log.handlers[0]
    monkeypatch.setattr(handler, "maxBytes", 500)
    for k in range(100):
        logs.audit("event", k=k)
    files = sorted(state.glob("audit.jsonl*"))
    assert len(files) == 1 + logs.AUDIT_FILES
    assert '"k": "99"' in (state / logs.AUDIT).read_text()
