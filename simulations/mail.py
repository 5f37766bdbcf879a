"""The e-mail data: ham or spam, each mail with its sender as the person, in four skewed silos of one sender each.

From the SpamAssassin public corpus: real mails of 2002, not an institution's. A silo is where a mail arrived: lists of
a community, lists of software projects, and two kinds of mailboxes. What is kept of a mail is its subject and body; the
headers, the list's tag and its footer name the list, which gives the label away. A mail without a sender, without text
or that can't be read is left out.

A sender whose mails arrived in several silos is given, with all of them, to the one where most arrived: parallel
composition over silos holds only if a person is in one silo. All mails of a sender are kept in a silo's file; how many
of them count is the mechanism's to bound (draws, k_max). The public split holds out a fifth of the senders, with at
most 16 mails each, so that no sender decides the accuracy. Everything is decided by hashes of senders and file names.
A sender is written as a hash of the address.
"""

from __future__ import annotations

import csv
import email
import hashlib
import html
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from email.errors import MessageError
from email.header import decode_header, make_header
from email.message import Message
from email.utils import parseaddr
from pathlib import Path

SILOS = ("lists-community", "lists-software", "mailbox-account", "mailbox-other")
COMMUNITY = re.compile(r"fork|linux\.ie|iiu\.|crackmice|irregulars")
LIST_HEADERS = ("List-Id", "X-BeenThere", "Mailing-List", "X-Mailing-List")
PUBLIC_SHARE, PUBLIC_MAILS = 0.2, 16
MAX_CHARACTERS = 1000
_INVISIBLE = re.compile(r"(?is)<(script|style|title)\b.*?</\1\s*>|<!--.*?-->|<[^<>]{0,2000}>")
_TAG = re.compile(r"(?i)^\s*(re:|fwd?:|aw:)*\s*\[[^\]]{1,40}\]\s*")
_LIST_LINK = re.compile(r"(?m)^.*/listinfo/.*$")
_RULE = re.compile(r"(?m)^(-- ?|_{10,}|-{10,}.*)\s*$")
FOOTER_CHARACTERS = 600


@dataclass(frozen=True)
class Mail:
    """text: one line. person: hash of the sender's address. name: of the file it was read from, for its hash."""

    text: str
    label: str
    person: str
    silo: str
    name: str


def prepare(folder: Path) -> dict[str, Path]:
    """Write one CSV (text, label, person) per silo and public.csv, unless they are there. Returns name -> file."""
    files = {name: folder / f"{name}.csv" for name in (*SILOS, "public")}
    if all(f.is_file() for f in files.values()):
        return files
    for name, mails in split(read(folder)).items():
        _write(files[name], mails)
    return files


def read(folder: Path) -> list[Mail]:
    """Every usable mail of the corpus, in the order of the files' names: folder/{easy-ham-1, spam-1, ...}/*.txt."""
    found = (parse(f.read_bytes(), label="spam" if f.parent.name.startswith("spam") else "ham", name=f.name)
             for f in sorted(folder.glob("*/*.txt")))
    return [mail for mail in found if mail]


def parse(data: bytes, *, label: str, name: str) -> Mail | None:
    """None for a mail that can't be read, or has no sender or no text."""
    try:
        message = email.message_from_bytes(data)
        sender = parseaddr(str(message.get("From", "")))[1].strip().lower()
        text = _text(message)
    except (LookupError, ValueError, MessageError):  # an unknown or a lying charset or encoding
        return None
    if not sender or not text:
        return None
    return Mail(text, label, hashlib.sha256(sender.encode(errors="replace")).hexdigest()[:16], _silo(message), name)


def split(mails: Iterable[Mail]) -> dict[str, list[Mail]]:
    """Silo -> its mails, and `public`. Every person is in exactly one of them."""
    of: defaultdict[str, list[Mail]] = defaultdict(list)
    for mail in mails:
        of[mail.person].append(mail)
    out: dict[str, list[Mail]] = {name: [] for name in (*SILOS, "public")}
    for person, own in sorted(of.items()):
        if _unit("public", person) < PUBLIC_SHARE:
            out["public"] += sorted(own, key=lambda m: _unit("mail", m.name))[:PUBLIC_MAILS]
        else:
            arrived = Counter(m.silo for m in own)
            out[max(SILOS, key=lambda silo: arrived[silo])] += own
    return out


def _silo(message: Message) -> str:
    lists = " ".join(str(message.get(h, "")) for h in LIST_HEADERS).strip().lower()
    if lists:
        return SILOS[0] if COMMUNITY.search(lists) else SILOS[1]
    return SILOS[2] if message.get("Delivered-To") else SILOS[3]


def _text(message: Message) -> str:
    """Subject and body as one line of printable characters."""
    subject = str(make_header(decode_header(str(message.get("Subject", "")))))
    kinds: dict[str, Message] = {}
    for part in message.walk():
        kinds.setdefault(part.get_content_type(), part)
    body = ""
    if plain := kinds.get("text/plain"):
        body = _decoded(plain)
    elif marked := kinds.get("text/html"):
        body = html.unescape(_INVISIBLE.sub(" ", _decoded(marked)))
    line = f"{_TAG.sub('', subject)} {_without_footer(body)}"
    return " ".join("".join(c if c.isprintable() else " " for c in line).split())[:MAX_CHARACTERS].strip()


def _decoded(part: Message) -> str:
    content = part.get_payload(decode=True)
    return content.decode(part.get_content_charset("latin-1"), errors="replace") if isinstance(content, bytes) else ""


def _without_footer(body: str) -> str:
    """Without links to a list's page, and without the lines after the last rule, where lists put their name."""
    body = _LIST_LINK.sub("", body)
    rules = list(_RULE.finditer(body))
    return body[:rules[-1].start()] if rules and len(body) - rules[-1].end() < FOOTER_CHARACTERS else body


def _unit(salt: str, key: str) -> float:
    """A fixed number in [0, 1) for a key."""
    return int.from_bytes(hashlib.sha256(f"{salt} {key}".encode()).digest()[:8], "big") / 2**64


def _write(file: Path, mails: Iterable[Mail]) -> None:
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("text", "label", "person"))
        writer.writerows((m.text, m.label, m.person) for m in mails)
