"""Every rule through the product's round: what comes out is what strategies.federate makes of the same updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from conf import load_settings
from fl_client.sending import Sending
from fl_server.journal import status
from fl_server.round import RoundDriver
from privacy.errors import RoundVoid
from privacy.secagg import transcript as tr
from privacy.verify import verify_bundle
from simulations.local import Outcome, federate
from strategies import federate as plain
from strategies.adapter import initial
from strategies.base import CORE, RESIDUAL, A, B
from strategies.merge import effective
from strategies.rules import RULES

Make = Callable[..., list[str]]
LINEAR = ("ffa", "fedit", "rolora", "exact", "fedsb", "hetero")
AMPLIFIED = {"hetero": 4.0, "exact": 60.0}  # how far a rule carries an error of one coordinate: a share of 1/3; two sketches
LOWER = ("rule.ranks=[{site:site-b,r:1}]",)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[tr.Offer, Any, Any]]]:
    """(offer, round, the site's adapter after training) of all that sites encoded, in order."""
    seen: list[tuple[tr.Offer, Any, Any]] = []
    encode = Sending.encode

    def spy(self: Sending, offer: tr.Offer, round_: Any, new: Any, shared: Any) -> Any:
        seen.append((offer, round_, new))
        return encode(self, offer, round_, new, shared)

    with monkeypatch.context() as m:
        m.setattr(Sending, "encode", spy)
        yield seen


def kept(folder: Path, round_no: int, what: str) -> dict[str, Any]:
    """Of a round's end: `adapter/` or `optimizer/`."""
    if round_no == 0:
        return {}
    file = load_file(folder / "rounds" / f"{round_no:04d}" / "state.safetensors")
    return {n.removeprefix(what): v for n, v in file.items() if n.startswith(what)}


def check(outcome: Outcome, folder: Path, sent: list[tuple[tr.Offer, Any, Any]], rounds: int) -> None:
    """Each round's adapter is the one that the rule makes, in plain numbers, of what the sites in the sum had trained."""
    contract, by = outcome.contract, RULES[outcome.contract.rule.name]
    for no in range(1, rounds + 1):
        mine = [(o, r, new) for o, r, new in sent if (o.round, o.pass_no) == (no, 1)]
        said = next(x for x in status(folder / "journal.jsonl")["rounds"] if x["round"] == no and x["outcome"] == "done")
        places = [i for i, site in enumerate(contract.sites) if site.name in said["sites"]]
        round_ = mine[0][1]
        terms, setup = contract.rule, round_.setup
        weights, state = [contract.sites[i].weight for i in places], kept(folder, no - 1, "optimizer/")
        want = plain.federate(by, setup, no, round_.old, [mine[i][2] for i in places], weights, terms=terms, state=state)
        got = kept(folder, no, "adapter/")
        bound = max(max(o.encoding.error_bound(weights)) for o, _, _ in mine)
        limit = AMPLIFIED.get(by.name, 1.0) * bound * terms.server_lr
        moved, there, here = effective(want.adapter), effective(got), effective(round_.old)
        for name, value in moved.items():
            error = np.abs(value - there[name]).max()
            assert error <= limit + 2e-6 * max(1.0, np.abs(value).max()), (name, no, error, limit)
            assert np.abs(value - here[name]).max() > 20 * limit or not by.trains(name, no), "nothing moved"
    assert verify_bundle(folder / "evidence", outcome.root).verdict == "PASS"


@pytest.mark.parametrize("name", LINEAR)
def test_rule_under_masks_and_noise_gives_the_plain_result(
        name: str, overrides: Make, tmp_path: Path, sent: list[Any]) -> None:
    more = LOWER if RULES[name].ranked else ()
    outcome = federate(load_settings(overrides(
        f"rule={name}", "lora.r=2", "privacy.rounds=3", "data.evaluation.name=public", "rule.server_lr=0.5", *more)))
    check(outcome, tmp_path / "out", sent, 3)
    passes = {o.pass_no for o, _, _ in sent}
    assert passes == ({1, 2} if name == "exact" else {1})
    state = kept(tmp_path / "out", 3, "adapter/")
    start = initial(sent[0][1].setup.spec, 0)
    still = {n for n, v in state.items() if np.array_equal(v, start[n])}
    assert still == {n for n in state if {"ffa": n.endswith(A), "fedsb": n.endswith((A, B))}.get(name, False)}
    assert any(n.endswith(CORE) for n in state) == (name == "fedsb")
    assert any(n.endswith(RESIDUAL) for n in state) == (name == "exact")
    if more:
        assert {new["base_model.model.encoder.layer.1.attention.self.query" + A].shape[0] for _, _, new in sent} == {1, 2}


@pytest.mark.parametrize("name", ["flora", "flexlora", "median", "trimmed_mean", "krum"])
def test_rule_that_sees_single_updates_in_plain_mode(name: str, overrides: Make, tmp_path: Path, sent: list[Any],
                                                     tiny_data: dict[str, Path]) -> None:
    sites = ",".join(f"s{i}:{{file:{tiny_data[f'site-{x}']}}}" for i, x in enumerate("abcab"))
    outcome = federate(load_settings(overrides(
        f"rule={name}", "secure_aggregation=plain", "privacy.rounds=2", f"data.sites={{{sites}}}", "rule.server_lr=1.0",
        "rule.optimizer=fedavg")))
    check(outcome, tmp_path / "out", sent, 2)


def test_a_site_lost_in_the_first_sum_is_in_neither(overrides: Make, tmp_path: Path, sent: list[Any],
                                                     tiny_data: dict[str, Path]) -> None:
    sites = ",".join(f"s{i}:{{file:{tiny_data[f'site-{x}']}}}" for i, x in enumerate("abcab"))

    def drop(node: int, message: Any, k: int) -> str | None:
        return "reply" if node == 2 and message.metadata.message_type == "train.masked" else None

    outcome = federate(load_settings(overrides("rule=exact", "lora.r=2", "privacy.rounds=1", f"data.sites={{{sites}}}",
                                               "rule.optimizer=fedavg")), drop=drop)
    check(outcome, tmp_path / "out", sent, 1)
    assert [m.name for m in sent[-1][0].cohort] == ["s0", "s2", "s3", "s4"] and sent[-1][0].survivors == 4


@pytest.mark.parametrize("stage", ["again", "shares", "masked"])
@pytest.mark.case(19)
def test_attack_a_site_between_the_sums_of_one_attempt(stage: str, overrides: Make, tmp_path: Path) -> None:
    """In the first sum and not in the second: the difference would be its own update. Void, charged, tried again."""
    lost = [0]

    def drop(node: int, message: Any, k: int) -> str | None:
        kind = message.metadata.message_type
        lost[0] += kind == f"train.{stage}" and node == 2
        return "reply" if kind == f"train.{stage}" and node == 2 and lost[0] == (1 if stage == "again" else 2) else None

    outcome = federate(load_settings(overrides("rule=exact", "lora.r=2", "privacy.rounds=1")), drop=drop)
    void, done = status(tmp_path / "out" / "journal.jsonl")["rounds"]
    assert (void["outcome"], void["reason"]) == ("void", "secagg.too_few")
    assert void["lost"] == [f"site-b {stage} site.unreachable"]
    assert (done["outcome"], done["attempt"], outcome.result.void) == ("done", 1, 1)
    assert verify_bundle(tmp_path / "out" / "evidence", outcome.root).verdict == "PASS"


def test_attack_another_basis_for_one_site(overrides: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A basis of zeros for all but one site would make the second sum that site's own: its keys must not fit the others'."""
    def notes(self: RoundDriver, offer: tr.Offer, stage: str, given: Any, sites: Any, *, last: bool) -> Any:
        if stage == "again":
            real = self._exchange.ask

            def ask(stage: str, notes: Any, **how: Any) -> Any:
                if stage == "again":
                    from fl_server.exchange import Note
                    from privacy.secagg.messages import dump
                    from strategies.adapter import adapter_digest
                    from strategies.base import unflatten

                    zero = np.zeros_like(given["shared"])
                    shared = adapter_digest(unflatten(zero, self._rule.shares(self.setup)))
                    lie = Note(dump(offer.model_copy(update={"shared": shared})), {"shared": zero})
                    notes = {name: note if name == "site-a" else lie for name, note in notes.items()}
                return real(stage, notes, **how)

            self._exchange.ask = ask  # type: ignore[method-assign]
        return honest(self, offer, stage, given, sites, last=last)

    honest = RoundDriver._sum
    monkeypatch.setattr(RoundDriver, "_sum", notes)
    with pytest.raises(RoundVoid):
        federate(load_settings(overrides("rule=exact", "lora.r=2", "privacy.rounds=1", "privacy.retries=0")))
