"""A run: rounds and retries over one exchange, the server optimiser, the journal, the adapter of each round, evidence.

Guarantees: every event is in the journal before the next begins; an attempt is applied once or not at all; when the
contract's retries are used up the run ends; the evidence is sealed at the end, whatever the outcome.
"""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.x509 import Certificate

from fl_server.attempt import Deadlines, Done, void
from fl_server.evaluation import PublicSplit, Score
from fl_server.exchange import Exchange
from fl_server.journal import RunJournal, read_events
from fl_server.log import TransparencyLog
from fl_server.model_card import write_card
from fl_server.recovery import Position, recover, save_state
from fl_server.roll_call import RollCall
from fl_server.round import RoundDriver
from fl_server.witnessing import Stated, Witnessing
from privacy.bundle import BundleWriter
from privacy.canonical import decimal
from privacy.contract import Contract
from privacy.errors import ConsiloError, RoundVoid
from privacy.identity import Signer
from privacy.predicates import KINDS
from privacy.secagg.peers import CheckCertificate
from privacy.statements import make
from strategies.adapter import Tensors, adapter_digest, initial
from strategies.base import Round
from strategies.lora_model import LoraModel
from strategies.optimizers import stepped
from strategies.rules import rule

INTERRUPTED = "run.interrupted"  # reason of an attempt that was under way when the coordinator was killed
KEPT_ROUNDS = 3  # adapters of older rounds are deleted; their digests stay in the journal
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Result:
    """What a finished run hands on. seconds: wall time by phase."""

    before: Score
    after: Score
    rounds: int
    void: int
    epsilon: Mapping[str, str]
    seconds: Mapping[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """accuracy_before, accuracy_after, and so on for every metric, the headline first."""
        return {f"{name}_{when}": score.values[name] for name in self.after.values
                for when, score in (("before", self.before), ("after", self.after))}


class Run:
    """`folder` receives journal.jsonl, rounds/NNNN/ (PEFT folders), adapter/, evidence/. signed: the engineer's name and
    envelope on the contract."""

    def __init__(self, contract: Contract, model: LoraModel, base_name: str, split: PublicSplit,
                 exchange: Exchange, *, name: str, signer: Signer, bundle: BundleWriter, log: TransparencyLog,
                 signed: tuple[str, bytes], folder: Path, deadlines: Deadlines, check_certificate: CheckCertificate,
                 certificates: Mapping[str, Certificate], evaluate_every: int, progress: Progress) -> None:
        self.contract, self._model, self._base_name, self._split = contract, model, base_name, split
        self._signer, self._bundle, self._folder = signer, bundle, folder
        self._progress, self._evaluate_every, self._name = progress, evaluate_every, name
        self._rule = rule(contract.rule.name, secure=contract.secagg.enabled)
        self._spec = model.spec(self._rule.trains)
        self._driver = RoundDriver(contract, self._spec, exchange, deadlines=deadlines,
                                   check_certificate=check_certificate, certificates=certificates)
        self._witnessing = Witnessing(log, bundle, exchange, contract, signer=signer, certificates=certificates,
                                      deadline_s=deadlines.stage_s)
        self._sites = RollCall(contract, exchange, bundle, self._witnessing, certificates=certificates,
                               deadline_s=deadlines.stage_s, keep=self._keep)
        self._stated: list[Stated] = bundle.statements()  # not in the log yet, as far as is known
        if not self._stated:
            self._keep("contract", *signed)
        self._journal = RunJournal(folder / "journal.jsonl")
        self._seconds: dict[str, float] = {}

    def run(self) -> Result:
        """All rounds, or those that are left after a crash. Raises RoundVoid when the retries are used up; evidence is
        written and sealed all the same. Where the disk fails (OSError) nothing is sealed, and `fl-server resume` goes on.
        Also raises as `recover`."""
        at, last = self._begin(), self.contract.privacy.rounds
        before = after = self._score(0, initial(self._spec, self.contract.lora.seed), at)
        try:
            self._sites.accept(at.lineages)
            self._publish()
            self._progress({"event": "start", "metrics": before.values, "done": at.done})
            if at.done:
                after = at.scores[max(at.scores)]
            for round_no in range(at.done + 1, last + 1):
                done = self._attempts(round_no, at)
                change, state = stepped(self.contract.rule, done.change, at.state)
                new = self._spec.check(self._rule.apply(Round(self._driver.setup, round_no, at.adapter), change))
                self._save(round_no, at, done, new, state)
                at.adapter, at.state, at.done, at.attempt = new, state, round_no, 0
                measured = round_no == last or round_no % self._evaluate_every == 0
                after = self._score(round_no, at.adapter, at) if measured else after
                self._publish()
                self._progress({"event": "round", "round": round_no, "rounds": last, "metrics": after.values,
                                "measured": measured})
        except OSError:
            self._journal.close()
            raise
        except BaseException as e:
            self._finish(at, before, after, _code(e))
            raise
        epsilon = self._finish(at, before, after, "done")
        return Result(before, after, at.done, at.voids, epsilon, dict(self._seconds))

    def _finish(self, at: Position, before: Score, after: Score, outcome: str) -> dict[str, str]:
        """Release, closing, seal; returns epsilon by site, as the sites claim it."""
        try:
            if at.done:
                self._release(at.adapter, at.done, before, after)
            epsilon, silent = self._sites.close()
            for name, reason in silent.items():
                self._progress({"event": "silent", "site": name, "reason": reason})
            self._publish(without=silent)
            self._bundle.seal(self._signer)
            self._journal.write("end", outcome=outcome)
        finally:
            self._journal.close()
        return epsilon

    def _begin(self) -> Position:
        """Where the run stands, with the journal brought up to it."""
        events = read_events(self._folder / "journal.jsonl")
        at = recover(self.contract, self._spec, self._folder, events, self._bundle)
        if not events:
            self._journal.write("run", run=self.contract.run, contract=self.contract.digest,
                                rounds=self.contract.privacy.rounds, adapter=adapter_digest(at.adapter))
        known = {(e["round"], e["attempt"]) for e in events if e["event"] in ("done", "void")}
        for said in at.stated:
            if (said["round"], said["attempt"]) not in known:  # stated, and then the coordinator was killed
                self._journal.write(said["outcome"], round=said["round"], attempt=said["attempt"], reason=said["reason"],
                                    adapter=said["adapter_out"], folder=f"{said['round']:04d}", sites=said["sites"],
                                    lost=[f"{x['site']} {x['stage']} {x['code']}" for x in said["dropped"]])
        if at.torn:
            self._void(at.done + 1, at, INTERRUPTED)
        return at

    def _attempts(self, round_no: int, at: Position) -> Done:
        """Attempts of one round until one is done. Raises the last RoundVoid when no retry is left."""
        while at.voids <= self.contract.privacy.retries:
            self._journal.write("round", round=round_no, attempt=at.attempt)
            try:
                return self._timed("rounds", lambda: self._driver.attempt(round_no, at.attempt, at.adapter))  # type: ignore[no-any-return]
            except RoundVoid as e:
                self._void(round_no, at, e.code)
                self._progress({"event": "void", "round": round_no, "reason": e.code, "sites": list(e.sites)})
                if at.voids > self.contract.privacy.retries:
                    raise
                self._publish()
            except BaseException as e:  # what the sites charged for it must be accounted for
                self._void(round_no, at, _code(e))
                raise
        raise void(INTERRUPTED, {})

    def _void(self, round_no: int, at: Position, reason: str) -> None:
        """The attempt that was under way is over, and the next one has another number."""
        attempt = at.attempt - 1 if at.torn else at.attempt
        self._state_round(round_no, attempt, adapter_digest(at.adapter), outcome="void", reason=reason)
        self._journal.write("void", round=round_no, attempt=attempt, reason=reason, lost=self._lost())
        at.voids, at.attempt, at.torn = at.voids + 1, attempt + 1, False

    def _lost(self) -> list[str]:
        return [f"{x.site} {x.stage} {x.code}" for x in self._driver.lost]

    def _save(self, round_no: int, at: Position, done: Done, adapter: Tensors, state: Tensors) -> None:
        """What the next round starts from is on disk first, then the statement: from there on the round counts."""
        folder, new = self._folder / "rounds" / f"{round_no:04d}", adapter_digest(adapter)
        self._timed("saving", lambda: self._model.save(folder, adapter, self._base_name))
        save_state(folder, adapter, state)
        self._state_round(round_no, done.attempt, adapter_digest(at.adapter), new, done)
        self._journal.write("done", round=round_no, attempt=done.attempt, adapter=new, folder=folder.name,
                            sites=list(done.sites), lost=self._lost())
        shutil.rmtree(self._folder / "rounds" / f"{round_no - KEPT_ROUNDS:04d}", ignore_errors=True)

    def _state_round(self, round_no: int, attempt: int, old: str, new: str = "", done: Done | None = None, *,
                     outcome: str = "done", reason: str = "") -> None:
        """The attempt with what its sites signed: those of a void one, or outside the sum, were charged all the same."""
        for name, envelope in sorted(self._driver.statements):
            self._keep("round-site", name, envelope)
        self._state("round", ("adapter", new or old), {
            "round": round_no, "attempt": attempt, "outcome": outcome, "reason": reason, "adapter_in": old,
            "adapter_out": new, "sites": list(done.sites) if done else [],
            "sums": [{"view": one.view, "transcript": one.transcript,
                      "votes": [{"site": name, "signature": base64.b64encode(vote).decode()}
                                for name, vote in one.votes.items()]} for one in (done.sums if done else ())],
            "dropped": [asdict(lost) for lost in self._driver.lost]})

    def _release(self, adapter: Tensors, rounds: int, before: Score, after: Score) -> None:
        folder = self._folder / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        self._model.save(folder, adapter, self._base_name)
        write_card(folder, self.contract, self._base_name, rounds, before, after, self._split.name)
        name = self.contract.metrics[0]
        self._state("release", ("adapter", adapter_digest(adapter)), {
            "adapter": adapter_digest(adapter), "rounds": rounds, "metric_name": name,
            "metric_before": decimal(before.values[name]), "metric_after": decimal(after.values[name]),
            "split": self._split.name, "units": after.units})

    def _state(self, kind: str, subject: tuple[str, str], predicate: dict[str, Any]) -> None:
        common = {"run": self.contract.run, "contract": self.contract.digest}
        self._keep(kind, self._name, make(self._signer, KINDS[kind].predicate_type, [subject], common | predicate))

    def _score(self, round_no: int, adapter: Tensors, at: Position) -> Score:
        """Of the public split, and said so, once."""
        if round_no in at.scores:
            return at.scores[round_no]
        score: Score = self._timed("evaluation", lambda: self._split.score(adapter))
        for name in self.contract.metrics:
            self._state("evaluation", ("adapter", adapter_digest(adapter)), {
                "round": round_no, "adapter": adapter_digest(adapter), "metric_name": name,
                "metric": decimal(score.values[name]), "split": self._split.name, "units": score.units})
        at.scores[round_no] = score
        return score

    def _keep(self, kind: str, who: str, envelope: bytes) -> None:
        self._bundle.add_statement(kind, who, envelope)
        self._stated.append((kind, who, envelope))

    def _publish(self, *, without: Collection[str] = ()) -> None:
        """Log what was stated, and have the sites sign the log's head, but those that showed no ledger at the end."""
        self._timed("witnessing", lambda: self._witnessing.publish(self._stated, without=without))
        self._stated = []

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return work()
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start


def _code(e: BaseException) -> str:
    return e.code if isinstance(e, ConsiloError) else "internal.bug"
