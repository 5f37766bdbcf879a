"""The site as a witness of the coordinator's log: it keeps the last head that it saw, and signs only what continues it.

Guarantees: the new head is durable before the signature on it leaves; two heads that contradict each other are kept,
both signed, as proof against the coordinator, and from then on this site takes part in no round; nor does it with a
ledger that lacks a record which it once named in a signed statement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_client.app import StageRefused
from privacy.canonical import canonical, parse
from privacy.contract import validate
from privacy.errors import CheckFailed, ConsiloError, Refused, SiteCode
from privacy.files import FileLayer, read_file
from privacy.identity import Signer
from privacy.ledger import Ledger
from privacy.ledger_records import Head as LedgerHead
from privacy.predicates import KINDS, Run, Strict
from privacy.secagg.peers import CheckCertificate
from privacy.stages import Checkpoint, Cosigned
from privacy.statements import open_envelope
from privacy.transparency import EMPTY, Entry, Head, check_consistency, check_inclusion, open_checkpoint, sign_witness

CONFLICT, HEAD = "witness-conflict.json", "witness.json"


class _Seen(Strict):
    """The last head of one log: what was signed, by whom, and in which run this site saw it."""

    run: Run
    head: Head
    checkpoint: str
    certificate: str


class Witness:
    """state: the site's folder. check_coordinator: PEM of an Ed25519 certificate -> the peer, or Refused.

    Raises CheckFailed `witness.state` (the site's own file can't be read).
    """

    def __init__(self, state: Path, site: str, signer: Signer, check_coordinator: CheckCertificate,
                 files: FileLayer | None = None) -> None:
        self._state, self._site, self._signer, self._check = state, site, signer, check_coordinator
        self._files = files or FileLayer()
        self._seen: dict[str, _Seen] = {}
        self._conflicting = (state / CONFLICT).exists()
        if (state / HEAD).exists():
            try:
                self._seen = {log: validate(_Seen, seen) for log, seen in parse(read_file(state / HEAD)).items()}
            except (ConsiloError, AttributeError) as e:
                raise CheckFailed("witness.state", f"{HEAD} isn't what this site wrote.",
                                  "Bring back a copy of it; without it a changed history would go unnoticed.") from e

    def require_trust(self) -> None:
        """Raises StageRefused once the coordinator was seen to contradict itself, or this site's ledger to fall back."""
        if self._conflicting:
            raise StageRefused(SiteCode.HISTORY)

    def cosign(self, asked: Checkpoint, run: str, ledger: Ledger | None) -> Cosigned:
        """Sign the checkpoint if it continues what this site saw; say the size of its own head if it can't be told.

        Raises Refused `log.split_view`, `ledger.rolled_back`, `identity.*`; CheckFailed `statement.*`, `log.*`.
        """
        self.require_trust()
        peer = self._check(asked.certificate.encode())
        head = open_checkpoint(asked.checkpoint.encode(), {peer.fingerprint: peer.certificate})
        if head.log != peer.name:
            raise CheckFailed("log.form", "A checkpoint is of another log than its signer's.", "Tell the coordinator.")
        if any(seen.run == run and log != head.log for log, seen in self._seen.items()):
            raise CheckFailed("log.form", "This run was in another coordinator's log before.", "Tell the consortium.")
        shown = _Seen(run=run, head=head, checkpoint=asked.checkpoint, certificate=asked.certificate)
        if asked.ledger and ledger is not None:
            self._check_ledger(asked, ledger)
        seen = self._seen.get(head.log)
        last = seen.head if seen else Head(log=head.log, size=0, root=EMPTY.hex())
        if head.size < last.size or (asked.old != last.size and head.size > last.size):
            return Cosigned(size=last.size, statement="")
        proof = [bytes.fromhex(part) for part in asked.proof] if head.size > last.size else []
        if not check_consistency(last.size, bytes.fromhex(last.root), head.size, bytes.fromhex(head.root), proof):
            self._conflict({"seen": seen and seen.model_dump(), "shown": shown.model_dump(), "proof": list(asked.proof)})
            raise Refused("log.split_view", "The coordinator's log doesn't continue the one that this site saw before.",
                          f"Take {CONFLICT} to the other sites and the consortium: both heads are signed.")
        for each in asked.included:
            leaf, path = Entry(run, each.sha256).leaf, [bytes.fromhex(part) for part in each.path]
            if not check_inclusion(leaf, each.index, head.size, path, bytes.fromhex(head.root)):
                raise CheckFailed("log.inclusion", "A proof that a statement is in the log doesn't hold.",
                                  "Tell the coordinator's operator.")
        now = {**self._seen, head.log: shown}
        self._files.write_atomic(self._state / HEAD, canonical({log: seen.model_dump() for log, seen in now.items()}))
        self._seen = now
        return Cosigned(size=head.size, statement=sign_witness(self._signer, self._site, head).decode())

    def _check_ledger(self, asked: Checkpoint, ledger: Ledger) -> None:
        """This site's own word about its ledger, kept by others, against the ledger that is here now."""
        try:
            said = open_envelope(asked.ledger.encode(), {self._signer.fingerprint: self._signer.certificate})
        except CheckFailed:
            return  # not in this site's present name
        named = said.predicate_type in (KINDS["round-site"].predicate_type, KINDS["closing"].predicate_type)
        if not named or said.predicate.get("lineage") != ledger.lineage:
            return  # of another lineage of this site
        try:
            ledger.check_head(LedgerHead(said.predicate["ledger_seq"], said.predicate["ledger_head"]))
        except CheckFailed as e:
            self._conflict({"ledger": asked.ledger})
            raise Refused(e.code, e.cause, e.mend) from e

    def _conflict(self, found: dict[str, Any]) -> None:
        self._conflicting = True  # whether or not the disk takes it
        self._files.write_atomic(self._state / CONFLICT, canonical(found))
