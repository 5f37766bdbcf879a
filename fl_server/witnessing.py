"""After each attempt: what was stated goes into the log, the log's head is signed, and the sites cosign it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate

from fl_server.exchange import Answer, Exchange, Note
from fl_server.log import TransparencyLog
from privacy import stages
from privacy.bundle import BundleWriter
from privacy.canonical import parse
from privacy.contract import Contract, validate
from privacy.errors import ConsiloError
from privacy.identity import Signer, fingerprint
from privacy.transparency import Entry, Head, least_witnesses, open_witness

Stated = tuple[str, str, bytes]  # kind, who, envelope
TRIES = 3  # to get a site's signature
NAME_LEDGER = ("round-site", "closing")


class Witnessing:
    """Of one run. signer: the coordinator's. certificates: of the sites. deadline_s: for the sites' answers."""

    def __init__(self, log: TransparencyLog, bundle: BundleWriter, exchange: Exchange, contract: Contract, *, signer: Signer,
                 certificates: Mapping[str, Certificate], deadline_s: float) -> None:
        self._log, self._bundle, self._exchange, self._contract = log, bundle, exchange, contract
        self._pem = signer.certificate.public_bytes(Encoding.PEM).decode()
        self._certificates = {name: {fingerprint(c): c} for name, c in certificates.items()}
        self._deadline_s, self._least = deadline_s, least_witnesses(len(contract.sites))
        first = next((i for i, entry in enumerate(log.entries) if entry.run == contract.run), len(log.entries))
        self._before = log.frontier(first)  # a run that was begun before accounts for all that it stated
        self._sizes = dict.fromkeys(certificates, 0)  # of the heads that the sites have seen
        self._known = log.ledger_heads()
        self._lineages: dict[str, str] = {}
        self._unseen: dict[str, str] = {}  # a site's own word about its ledger, which it hasn't been shown yet

    def accepted(self, site: str, lineage: str) -> None:
        """The lineage that a site will charge: it is shown the newest head of it that it named."""
        self._lineages[site] = lineage
        self._unseen[site] = self._known.get(f"{site} {lineage}", "")

    def publish(self, stated: Sequence[Stated], *, without: Collection[str] = ()) -> list[str]:
        """Log envelopes and gather signatures on the new head, of all sites but `without`. Returns those that cosigned."""
        if not stated:
            return []  # the last head has its signatures; who has vanished since can't take them back
        entries = [Entry(self._contract.run, hashlib.sha256(envelope).hexdigest()) for _, _, envelope in stated]
        head, checkpoint = self._log.extend(entries)
        included: dict[str, list[stages.Included]] = {}
        ledgers = {}
        for (kind, who, envelope), entry in zip(stated, entries, strict=True):
            index = self._log.index(entry)
            path = tuple(part.hex() for part in self._log.tree.inclusion(index, head.size))
            included.setdefault(who, []).append(stages.Included(sha256=entry.sha256, index=index, path=path))
            if kind in NAME_LEDGER and self._lineages.get(who):
                ledgers[f"{who} {self._lineages[who]}"] = envelope.decode()
        if ledgers:
            self._log.keep_ledger_heads(ledgers)
        cosigned: dict[str, bytes] = {}
        todo = sorted((self._exchange.online() & self._sizes.keys()) - set(without))
        for attempt in range(TRIES):  # again one that has seen another head than is known; with too few, whoever is silent
            again = self._ask(head, checkpoint, todo, included, cosigned)
            if (short := len(cosigned) < self._least):
                again = sorted(self._exchange.online().intersection(todo) - cosigned.keys())
            if not again or (attempt and not short):
                break
            todo = again
        self._bundle.add_checkpoint(head.size, checkpoint, cosigned)
        self._bundle.set_log(self._before, self._log.entries[self._before.size:head.size])
        return sorted(cosigned)

    def _ask(self, head: Head, checkpoint: bytes, sites: Sequence[str], included: Mapping[str, list[stages.Included]],
             cosigned: dict[str, bytes]) -> list[str]:
        """Fill `cosigned`; returns the sites to ask again."""
        notes, again = {}, list[str]()
        for site in sites:
            old = min(self._sizes[site], head.size)
            proof = tuple(part.hex() for part in self._log.tree.consistency(old, head.size))
            notes[site] = Note(stages.dump(stages.Checkpoint(
                contract=self._contract.digest, certificate=self._pem, checkpoint=checkpoint.decode(), old=old, proof=proof,
                included=tuple(included.get(site, [])[-16:]), ledger=self._unseen.get(site, ""))))

        def take(site: str, answer: Answer) -> bool:
            """Whether it cosigned. Else it may next time; evidence that too few sign doesn't verify."""
            try:
                got = validate(stages.Cosigned, parse(answer.note.body)) if answer.note else None
                if got is None:
                    return False
                self._unseen.pop(site, None)
                self._sizes[site] = got.size
                if not got.statement:
                    again.append(site)
                    return False
                said = open_witness(got.statement.encode(), self._certificates[site])
            except ConsiloError:
                return False
            if (said.site, said.log, said.size, said.root) == (site, head.log, head.size, head.root):
                cosigned[site] = got.statement.encode()
            return site in cosigned

        self._exchange.ask("witness", notes, deadline_s=self._deadline_s, on_answer=take,
                           quorum=self._least - len(cosigned))
        return again
