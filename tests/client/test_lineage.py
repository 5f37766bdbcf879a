"""A budget belongs to records: other records need the operator, and no record has two budgets."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from fl_client import lineage
from privacy.errors import CheckFailed, ConsiloError, Refused
from privacy.ledger import Ledger

RECORDS = [f"{i % 3}\nphrase number {i}".encode() for i in range(200)]
PEOPLE = [f"p{i // 4}" for i in range(200)]


@pytest.fixture
def key(tmp_path: Path) -> bytes:
    return lineage.site_key(tmp_path / "lineage.key")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "ward").mkdir()
    return tmp_path / "ward" / "ledger.tags"


def refused(call: object, *arguments: object, **named: object) -> Refused:
    with pytest.raises(Refused) as caught:
        call(*arguments, **named)  # type: ignore[operator]
    return caught.value


def new_signer() -> Any:
    private = Ed25519PrivateKey.generate()
    name, start = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site")]), datetime(2026, 1, 1)
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
                   .serial_number(7).not_valid_before(start).not_valid_after(start + timedelta(days=9)).sign(private, None))
    return type("Signer", (), {"certificate": certificate, "sign": lambda self, data: private.sign(data)})()


def new_ledger(path: Path) -> Ledger:
    return Ledger.create(path, new_signer(), lineage="1a" * 16, unit="record", adjacency="add_remove", delta=1e-5, cap=8.0)


def test_the_key_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    path = tmp_path / "lineage.key"
    key = lineage.site_key(path)
    assert len(key) == 32 and lineage.site_key(path) == key and path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    assert refused(lineage.site_key, path).code == "key.permissions"
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(CheckFailed, match=r"lineage\.file"):
        lineage.site_key(path)


def begin(path: Path, found: lineage.Tags, **named: list[Path]) -> None:
    lineage.check(path, found, new=True, **named)


def go_on(path: Path, found: lineage.Tags, **named: list[Path]) -> None:
    lineage.check(path, found, new=False, **named)


def test_the_first_job_registers_its_data_and_the_same_data_go_on(path: Path, key: bytes) -> None:
    begin(path, lineage.tags(key, RECORDS, PEOPLE))
    assert path.stat().st_mode & 0o777 == 0o600
    go_on(path, lineage.tags(key, RECORDS[::-1] + RECORDS[:5], PEOPLE[::-1]))  # order and repetition
    go_on(path, lineage.tags(key, RECORDS[:50], PEOPLE[:50]))  # fewer


@pytest.mark.parametrize(("contents", "people"), [
    ([*RECORDS, b"0\nnew"], PEOPLE), ([b"9" + RECORDS[0], *RECORDS[1:]], PEOPLE), (RECORDS, [*PEOPLE[1:], "someone"])],
    ids=["a record", "an edited record", "a person"])
def test_attack_unregistered_data_on_an_old_budget(path: Path, key: bytes, contents: list[bytes], people: list[str]) -> None:
    begin(path, lineage.tags(key, RECORDS, PEOPLE))
    before = path.read_bytes()
    assert refused(go_on, path, lineage.tags(key, contents, people)).code == "lineage.unregistered"
    assert path.read_bytes() == before


def test_attack_tag_file_removed_from_a_lineage_that_has_spent(path: Path, key: bytes) -> None:
    found = lineage.tags(key, RECORDS)
    begin(path, found)
    path.unlink()
    assert refused(go_on, path, found).code == "lineage.unregistered" and not path.exists()
    with new_ledger(path.with_suffix(".jsonl")) as ledger:
        lineage.register(ledger, path, found, "dr.a")
    go_on(path, found)


def test_the_operator_registers_and_the_ledger_says_only_that(path: Path, key: bytes) -> None:
    more = lineage.tags(key, [*RECORDS, b"0\nnew", b"1\nnewer"])
    begin(path, lineage.tags(key, RECORDS))
    with new_ledger(path.with_suffix(".jsonl")) as ledger:
        lineage.register(ledger, path, more, "dr.a")
        go_on(path, more)
        assert [r.approver for r in ledger.summary().registrations] == ["dr.a"]
        shown = ledger.extract("2b" * 16)
    assert b"202" not in shown and b"register" in shown


def test_planted_registration_without_an_event_is_impossible(path: Path, key: bytes) -> None:
    """The tags are stored after the event: a ledger that can't record it leaves them as they were."""
    begin(path, lineage.tags(key, RECORDS))
    before, ledger = path.read_bytes(), new_ledger(path.with_suffix(".jsonl"))
    ledger.close()
    assert refused(lineage.register, ledger, path, lineage.tags(key, [b"0\nnew"]), "dr.a").code == "ledger.unusable"
    assert path.read_bytes() == before


@pytest.mark.parametrize(("contents", "people"), [(RECORDS[199:], []), ([b"0\nnew"], ["p3"])], ids=["a record", "a person"])
def test_attack_one_record_under_two_budgets(tmp_path: Path, path: Path, key: bytes, contents: list[bytes],
                                             people: list[str]) -> None:
    begin(path, lineage.tags(key, RECORDS, PEOPLE))
    other = tmp_path / "clinic" / "ledger.tags"
    other.parent.mkdir()
    error = refused(begin, other, lineage.tags(key, contents, people), others=[path])
    assert error.code == "lineage.overlap" and "ward" in error.cause
    assert not other.exists(), "a refused lineage is not begun"
    begin(other, lineage.tags(key, [b"0\nnew"], ["someone"]), others=[path])
    assert not lineage.overlap(path, other)
    with new_ledger(other.with_suffix(".jsonl")) as ledger:
        lineage.register(ledger, other, lineage.tags(key, contents, people), "dr.a")
    assert lineage.overlap(path, other) and lineage.overlap(other, path)


def test_tags_say_nothing_without_the_key(path: Path, key: bytes) -> None:
    begin(path, lineage.tags(key, RECORDS, PEOPLE))
    assert not np.intersect1d(lineage.tags(b"\0" * 32, RECORDS, PEOPLE), np.frombuffer(path.read_bytes(), np.uint64)).size
    assert len(np.intersect1d(lineage.tags(key, [b"p1"]), lineage.tags(key, [], ["p1"]))) == 0, "records are no persons"


def test_a_damaged_or_open_file_is_refused(path: Path, key: bytes) -> None:
    begin(path, lineage.tags(key, RECORDS))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckFailed, match=r"lineage\.file"):
        go_on(path, lineage.tags(key, RECORDS))
    path.chmod(0o640)
    with pytest.raises(ConsiloError, match=r"key\.permissions"):
        go_on(path, lineage.tags(key, RECORDS))


def test_a_hundred_thousand_records_take_less_than_a_second(path: Path, key: bytes) -> None:
    many = [b"1\n" + b"words of a record " * 5 + str(i).encode() for i in range(100_000)]
    start = time.process_time()
    begin(path, lineage.tags(key, many))
    assert time.process_time() - start < 1.0


def test_the_agent_refuses_unregistered_data_until_the_operator_registers_them(
        tmp_path: Path, tiny_contract: Callable[..., Any], tiny_data: dict[str, Path]) -> None:
    """Through the agent's own road: real records of a file, a lineage that has spent, one more record."""
    from conf.settings import SiteSettings
    from fl_client.agent import TAGS, find_tags, open_ledger
    from fl_client.policy import SitePolicy

    data = tmp_path / "data.csv"
    data.write_bytes(tiny_data["site-a"].read_bytes())
    contract, site = tiny_contract(), SiteSettings(name="site-a", data=str(data), state=str(tmp_path))
    policy, signer = SitePolicy(approver="test"), new_signer()

    def open_again(run: str) -> Any:
        return open_ledger(contract.model_copy(update={"run": run}), "site-a", policy, signer, tmp_path,
                           found=find_tags(contract, site))

    ledger = open_again("a" * 32)
    ledger.reserve(contract.mechanism("site-a"), run="a" * 32, contract=contract.digest, round=1, attempt=0, code="0",
                   approver="test")
    ledger.close()
    open_again("a" * 32).close()
    data.write_text(data.read_text() + "one more record,heart\n")
    with pytest.raises(Refused, match=r"lineage\.unregistered"):
        open_again("a" * 32)
    with Ledger.open(tmp_path / "ledger.jsonl", signer) as ledger:
        lineage.register(ledger, tmp_path / TAGS, find_tags(contract, site), "test")
    open_again("a" * 32).close()
