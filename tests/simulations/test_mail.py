"""The e-mail data: one silo a sender, nothing of the headers, one line a record; hostile mails are skipped or tamed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from simulations.mail import MAX_CHARACTERS, PUBLIC_MAILS, SILOS, Mail, parse, prepare, read, split
from strategies.records import load_records

ILUG = b"List-Id: Irish Linux Users' Group <ilug.linux.ie>\nX-BeenThere: ilug@linux.ie\n"


def mail(body: bytes = b"Dear all,\nthe meeting is at nine.", *, headers: bytes = b"", subject: bytes = b"Meeting",
         sender: bytes = b"Ann <Ann@Example.org>", label: str = "ham", name: str = "1.txt") -> Mail | None:
    return parse(b"From: " + sender + b"\nSubject: " + subject + b"\n" + headers + b"\n" + body, label=label, name=name)


def text(body: bytes, *, headers: bytes = b"", subject: bytes = b"Meeting") -> str:
    found = mail(body, headers=headers, subject=subject)
    assert found is not None
    return found.text


def test_subject_and_body_are_one_line() -> None:
    assert text(b"Dear all,\nthe meeting is at nine.") == "Meeting Dear all, the meeting is at nine."


def test_headers_and_the_lists_own_words_are_gone() -> None:
    found = text(b"See you there.\n-- \nIrish Linux Users' Group: ilug@linux.ie\nhttp://www.linux.ie/mailman/listinfo/ilug\n",
                 headers=ILUG, subject=b"Re: [ILUG] Meeting")
    assert found == "Meeting See you there."
    assert text(b"Yes.\n\nhttp://xent.com/mailman/listinfo/fork\n") == "Meeting Yes."


def test_a_rule_within_the_text_cuts_nothing_off() -> None:
    assert text(b"-----------\nOffer\n" + b"word " * 200).startswith("Meeting ----------- Offer word")


def test_html_is_stripped() -> None:
    headers = b"Content-Type: text/html; charset=utf-8\n"
    body = b"<style>p {color: red}</style><!-- x --><p onclick='a'>Buy &amp; win</p><script>steal()</script>"
    assert text(body, headers=headers) == "Meeting Buy & win"


def test_plain_part_goes_before_html_and_encodings_are_undone() -> None:
    headers = b'MIME-Version: 1.0\nContent-Type: multipart/alternative; boundary="b"\n'
    body = (b"--b\nContent-Type: text/html\n\n<b>marked</b>\n--b\nContent-Type: text/plain; charset=utf-8\n"
            b"Content-Transfer-Encoding: base64\n\nZ3LDvMOfZQ==\n--b--\n")
    assert text(body, headers=headers, subject=b"=?utf-8?b?w6Q=?=") == "ä grüße"


def test_person_is_the_address_however_written() -> None:
    a, b = mail(), mail(sender=b'"Annie" <ANN@example.ORG>')
    other = mail(sender=b"bob@example.org")
    assert a and b and other and a.person == b.person != other.person
    assert "@" not in a.person


@pytest.mark.parametrize(("headers", "silo"), [
    (ILUG, "lists-community"), (b"List-Id: <razor-users.example.sourceforge.net>\n", "lists-software"),
    (b"Delivered-To: yyyy@localhost\n", "mailbox-account"), (b"", "mailbox-other")])
def test_silo_is_where_it_arrived(headers: bytes, silo: str) -> None:
    found = mail(headers=headers)
    assert found and found.silo == silo


@pytest.mark.parametrize("options", [
    {"sender": b""}, {"sender": b"<>"}, {"body": b"", "subject": b""},
    {"headers": b"Content-Type: text/plain; charset=x-unheard-of\n"}, {"subject": b"=?x-unheard-of?q?a?="},
    {"subject": b"=?utf-8?b?A?="}])
def test_a_mail_without_sender_or_text_or_with_a_lying_charset_is_left_out(options: dict[str, bytes]) -> None:
    assert mail(**options) is None  # type: ignore[arg-type]


@given(st.binary(max_size=300), st.binary(max_size=80))
@example(b"", b"Content-Type: text/plain; charset=rot13\n")
@example(b"a\x00b", b"Content-Type: text/plain; charset=unicode_escape\n")
@example(rb"\ud800", b"Content-Type: text/plain; charset=unicode_escape\n")
@example(b"\xff" * 9, b"Content-Type: text/html; charset=punycode\nContent-Transfer-Encoding: base64\n")
def test_any_bytes_give_one_printable_line_or_nothing(body: bytes, headers: bytes) -> None:
    found = mail(body, headers=headers)
    if found:
        assert found.text.isprintable() and 0 < len(found.text) <= MAX_CHARACTERS
        assert found.text.encode() and found.text == " ".join(found.text.split())


def corpus() -> list[Mail]:
    """60 senders of 1 to 40 mails, every third of which arrive anywhere."""
    return [Mail(f"text {i} {k}", "spam" if i % 2 else "ham", f"p{i}", SILOS[(i + (k % 3 == 0) * k) % 4], f"{i}-{k}")
            for i in range(60) for k in range(1 + 13 * (i % 4))]


def test_a_person_is_in_one_place_and_loses_no_mail() -> None:
    mails = corpus()
    places = split(mails)
    of = {name: {m.person for m in found} for name, found in places.items()}
    assert sum(map(len, of.values())) == len(set().union(*of.values())) == 60
    assert all(of.values())
    total = Counter(m.person for m in mails)
    for silo in SILOS:
        for person, count in Counter(m.person for m in places[silo]).items():
            assert count == total[person]
            own = Counter(m.silo for m in mails if m.person == person)
            assert own[silo] == max(own.values())


def test_public_split_caps_a_person_and_is_independent_of_order() -> None:
    places = split(corpus())
    assert max(Counter(m.person for m in places["public"]).values()) == PUBLIC_MAILS
    again = split(reversed(corpus()))
    assert {k: sorted(m.name for m in v) for k, v in places.items()} == {
        k: sorted(m.name for m in v) for k, v in again.items()}


def test_files_are_read_back_whole_by_the_sites_reader(tmp_path: Path) -> None:
    for i in range(40):
        folder = tmp_path / ("spam-1" if i % 2 else "easy-ham-1")
        folder.mkdir(exist_ok=True)
        (folder / f"{i:03}.txt").write_bytes(b'From: p%d@x.org\nSubject: "a, b"\n%s\nhe said "no",\r\nand\x0bleft' % (
            i // 2, ILUG if i % 4 < 2 else b""))
    files = prepare(tmp_path)
    loaded = {name: load_records(file, ("ham", "spam"), person="person") for name, file in files.items()
              if len(file.read_text().splitlines()) > 1}
    assert sum(len(r) for r in loaded.values()) == len(read(tmp_path)) == 40
    assert all(r.valid.all() for r in loaded.values())
    assert {t for r in loaded.values() for t in r.texts} == {'"a, b" he said "no", and left'}
    before = {f: f.read_bytes() for f in files.values()}
    for f in files.values():
        f.unlink()
    prepare(tmp_path)
    assert before == {f: f.read_bytes() for f in files.values()}
