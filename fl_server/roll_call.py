"""What each site states of the whole run: at its start that it accepts the contract, at its end what it was charged.

Guarantees: an answer that was lost is asked for again; a statement is kept only if it is about this run, by this site, and a
closing one together with the ledger that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cryptography.x509 import Certificate

from fl_server.attempt import statement, void
from fl_server.exchange import MALFORMED, UNREACHABLE, Exchange, Note
from fl_server.witnessing import Witnessing
from privacy import stages
from privacy.bundle import BundleWriter
from privacy.canonical import parse
from privacy.contract import Contract, validate
from privacy.errors import CheckFailed, ConsiloError
from privacy.ledger import check_extract
from privacy.predicates import Acceptance, Closing, Refusal

TRIES = 3  # to get a site's answer


class RollCall:
    """keep: takes kind, site and envelope of a statement that was checked."""

    def __init__(self, contract: Contract, exchange: Exchange, bundle: BundleWriter, witnessing: Witnessing, *,
                 certificates: Mapping[str, Certificate], deadline_s: float,
                 keep: Callable[[str, str, bytes], None]) -> None:
        self._contract, self._exchange, self._bundle, self._witnessing = contract, exchange, bundle, witnessing
        self._certificates, self._deadline_s, self._keep = certificates, deadline_s, keep

    def accept(self, lineages: Mapping[str, str]) -> None:
        """Every site states that it accepted this contract, once. lineages: of the sites, where they have done so before a
        crash. Raises RoundVoid with the code of the first that doesn't."""
        for name, lineage in lineages.items():
            self._witnessing.accepted(name, lineage)
        bad = {} if lineages else self._ask("accept", self._take_acceptance)
        if bad:
            raise void(bad[min(bad)], bad)

    def close(self) -> tuple[dict[str, str], dict[str, str]]:
        """Closing statements, refusals and ledgers of the sites that still answer. Returns epsilon by site, as they claim
        it, and codes of the sites that don't answer."""
        epsilon: dict[str, str] = {}

        def take(name: str, body: bytes) -> None:
            closed = validate(stages.Closed, parse(body))
            for envelope in closed.refusals:
                self._take_refusal(name, envelope.encode())
            if self._contract.privacy.trust != "none":
                epsilon[name] = self._take_closing(name, closed)

        silent = self._ask("closing", take)  # which fills epsilon
        return epsilon, silent

    def _take_acceptance(self, name: str, body: bytes) -> None:
        envelope = validate(stages.Acceptance, parse(body)).statement.encode()
        said = statement(Acceptance, envelope, self._certificates[name])
        if (said.site, said.run, said.contract, said.code) != (
                name, self._contract.run, self._contract.digest, self._contract.code):
            raise CheckFailed("round.statement", "An acceptance is about another contract, or other code.", "Ask that site.")
        self._witnessing.accepted(name, said.lineage)
        self._keep("acceptance", name, envelope)

    def _take_refusal(self, name: str, envelope: bytes) -> None:
        said = statement(Refusal, envelope, self._certificates[name])
        if (said.site, said.run, said.contract) != (name, self._contract.run, self._contract.digest):
            raise CheckFailed("round.statement", "A refusal is about something else than this run.", "Ask that site.")
        self._keep("refusal", name, envelope)

    def _take_closing(self, name: str, closed: stages.Closed) -> str:
        """Keep a site's closing statement and ledger if they belong together; returns the epsilon that it claims."""
        certificate, ledger = self._certificates[name], closed.ledger.encode()
        said, head = statement(Closing, closed.statement.encode(), certificate), check_extract(ledger, certificate).head
        if (said.site, said.run, said.contract, said.ledger_seq, said.ledger_head) != (
                name, self._contract.run, self._contract.digest, head.seq, head.hash):
            raise CheckFailed("round.statement", "A closing statement and its ledger don't fit.", "Ask that site.")
        self._bundle.add_ledger(name, ledger)  # first: a statement can't be taken back
        self._keep("closing", name, closed.statement.encode())
        return said.epsilon

    def _ask(self, stage: str, take: Callable[[str, bytes], None]) -> dict[str, str]:
        """Ask every site, and again those whose answer was lost or wasn't good. Returns the codes of the rest."""
        note = Note(stages.dump(stages.Ask(contract=self._contract.digest)))
        bad = dict.fromkeys((site.name for site in self._contract.sites), UNREACHABLE)
        for attempt in range(TRIES):
            todo = [name for name in bad if not attempt or name in self._exchange.online()]
            answers = self._exchange.ask(stage, dict.fromkeys(todo, note), deadline_s=self._deadline_s)
            for name, answer in answers.items():
                try:
                    if answer.note is not None:
                        take(name, answer.note.body)
                        del bad[name]
                    else:
                        bad[name] = answer.code or MALFORMED
                except ConsiloError as e:
                    bad[name] = e.code
            if not bad:
                break
        return bad
