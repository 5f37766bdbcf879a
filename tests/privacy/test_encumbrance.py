"""What jobs hold: nobody draws more than it encumbered, nor what another one holds; older ledgers go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from evidence_fixture import SITES, contract
from ledger_fixture import CONTRACT, LINEAGE, OTHER, RUN, SelfSigner, create, encumber, mechanism, reserve

import privacy.ledger_budget
from fl_client.agent import open_ledger
from fl_client.policy import SitePolicy
from privacy.accountant import Release, epsilon, round_up
from privacy.canonical import canonical, digest, parse
from privacy.errors import ConsiloError
from privacy.ledger import Ledger, check_extract
from privacy.ledger_records import REFUSALS, V1, V2, Charge
from privacy.rdp import RenyiFilter

SIGNER = SelfSigner()
DATA = Path(__file__).with_name("data")
THIRD = "5e" * 16


@pytest.fixture
def path(tmp_path):
    return tmp_path / f"{LINEAGE}.jsonl"


def code_of(call, *arguments, **named) -> str:
    with pytest.raises(ConsiloError) as caught:
        call(*arguments, **named)
    return caught.value.code


def cost(*rounds: Release) -> float:
    return round_up(epsilon(rounds, 1e-5))


def twice(release: Release) -> float:
    """A cap under which the filter admits such a release once as the first job's and once more, and not a third time."""
    low = cost(release)
    while not RenyiFilter(1e-5, low, (release,)).admits([release], release):
        low += 0.01
    return low


# Holding --------------------------------------------------------------------------------------------------------------

@pytest.mark.case(27)
def test_attack_two_jobs_on_one_lineage_under_different_names_budget_for_one(path):
    with create(path, SIGNER, cap=cost(Release(0.5, 20.0, 3))) as ledger:
        encumber(ledger, 3)
        assert code_of(encumber, ledger, 3, run=OTHER) == "budget.exhausted"
        assert code_of(reserve, ledger, 1, run=OTHER, hold=False) == "budget.not_encumbered"
        for n in range(1, 4):
            reserve(ledger, n)
        assert code_of(encumber, ledger, 1, run=OTHER) == "budget.exhausted"


def two_jobs_and_a_third(path):
    with create(path, SIGNER, cap=twice(Release(0.5, 20.0, 6))) as ledger:
        encumber(ledger, 6)
        encumber(ledger, 6, run=OTHER)
        assert ledger.epsilon() == 0.0
        for n in range(1, 7):
            reserve(ledger, n, run=OTHER)
        assert code_of(reserve, ledger, 7, run=OTHER) == "budget.not_encumbered"
        assert code_of(encumber, ledger, 1, run=THIRD) == "budget.exhausted"
        for n in range(1, 7):
            reserve(ledger, n)  # the first job still gets all that it was promised


def test_what_a_job_holds_is_neither_granted_nor_promised_twice(path):
    two_jobs_and_a_third(path)


def test_planted_budget_that_forgets_what_others_hold_is_caught(path, monkeypatch):
    monkeypatch.setattr(privacy.ledger_budget, "product", lambda *parts: [(way,) for way in parts[-1]])
    with pytest.raises(pytest.fail.Exception):
        two_jobs_and_a_third(path)


def test_planted_accounting_that_forgets_groups_is_caught(path, monkeypatch):
    monkeypatch.setattr(Charge, "release", property(lambda r: Release(float(r.q), float(r.sigma), r.planned_steps)))
    with pytest.raises(AssertionError):
        test_groups_are_charged_for_all_that_a_person_owns(path, 2)


def test_a_job_gets_its_own_mechanism_only(path):
    with create(path, SIGNER) as ledger:
        encumber(ledger, 3)
        for change in ({"sigma": 19.0}, {"q": 0.25}, {"clip": 2.0}, {"steps": 2}):
            assert code_of(reserve, ledger, 1, **change) == "budget.not_encumbered"
        assert ledger.head.seq == 1
        assert code_of(reserve, ledger, 1, run=OTHER, hold=False) == "budget.not_encumbered"


def test_retries_go_to_any_phase_but_only_once(path):
    first, second = mechanism(), mechanism(q=0.25)
    with create(path, SIGNER) as ledger:
        body = ledger.encumber(RUN, [[(first, 4), (second, 2)], [(first, 2), (second, 4)]], contract=CONTRACT, approver="a")
        assert body.rounds == 6
        assert float(body.epsilon) == max(cost(Release(0.5, 20.0, n), Release(0.25, 20.0, 6 - n)) for n in (2, 4))
        for n in range(1, 4):
            reserve(ledger, n)
        for n in range(4, 7):
            reserve(ledger, n, q=0.25)
        assert code_of(reserve, ledger, 7, q=0.25) == code_of(reserve, ledger, 7) == "budget.not_encumbered"


def test_equal_phases_are_one_class(path):
    with create(path, SIGNER) as ledger:
        m = mechanism()
        body = ledger.encumber(RUN, [[(m, 2), (mechanism(q=0.25), 1), (m, 3)]], contract=CONTRACT, approver="a")
        assert ([c.q for c in body.classes], body.plans) == (["0.5", "0.25"], ((5, 1),))


def test_closing_frees_what_was_not_reserved_and_nothing_else(path):
    with create(path, SIGNER, cap=twice(Release(0.5, 20.0, 3))) as ledger:
        encumber(ledger, 6)
        for n in range(1, 4):
            reserve(ledger, n)
        spent = ledger.epsilon()
        assert code_of(encumber, ledger, 3, run=OTHER) == "budget.exhausted"
        ledger.close_run(RUN)
        assert ledger.epsilon() == spent == cost(Release(0.5, 20.0, 3))
        assert code_of(encumber, ledger, 9, run=OTHER) == "budget.exhausted"
        encumber(ledger, 3, run=OTHER)
        assert ledger.summary().closes[0].freed == 3
    with Ledger.open(path, SIGNER) as again:
        assert again.summary().closes[0].freed == 3


def test_a_restarted_job_goes_on_with_what_it_holds(path):
    with create(path, SIGNER, cap=cost(Release(0.5, 20.0, 3))) as ledger:
        encumber(ledger, 3)
        reserve(ledger, 1)
    with Ledger.open(path, SIGNER) as ledger:
        before = ledger.head
        encumber(ledger, 3)
        assert ledger.head == before
        for other in ({"rounds": 4}, {"sigma": 30.0}):
            assert code_of(encumber, ledger, **other) == "budget.not_encumbered"
        assert code_of(lambda: ledger.encumber(RUN, [[(mechanism(), 3)]], contract="9f" * 32,
                                               approver="dr.a")) == "budget.not_encumbered"
        assert code_of(encumber, ledger, 3, cap=0.1) == "budget.exhausted"  # the site lowered its policy meanwhile
        reserve(ledger, 2)
        reserve(ledger, 3)


def test_a_lower_cap_of_the_policy_holds_too(path):
    with create(path, SIGNER) as ledger:
        assert code_of(encumber, ledger, 3, cap=cost(Release(0.5, 20.0, 3)) - 1e-4) == "budget.exhausted"
        encumber(ledger, 3, cap=cost(Release(0.5, 20.0, 3)))


@pytest.mark.parametrize("k", [2, 8])
def test_groups_are_charged_for_all_that_a_person_owns(path, k):
    person = {"unit": "person", "sampled": "record", "group": k, "q": 0.25}
    with Ledger.create(path, SIGNER, lineage=LINEAGE, unit="person", adjacency="add_remove", delta=1e-5, cap=50.0) as ledger:
        encumber(ledger, 2, **person)
        reserve(ledger, 1, **person)
        assert ledger.epsilon() == cost(Release(0.25, 20.0, 1, k)) > cost(Release(0.25, 20.0, 1))
        assert code_of(reserve, ledger, 2, **person | {"group": 1}) == "budget.not_encumbered"
    with Ledger.open(path, SIGNER) as ledger:
        r = ledger.summary().reserves[0]
        assert (r.sampled, r.group, r.draws, r.release) == ("record", k, 1, Release(0.25, 20.0, 1, k))


# At approval ----------------------------------------------------------------------------------------------------------

def jobs(*names: str, **changes):
    """Contracts that differ by run and purpose alone."""
    made = contract({name: SelfSigner() for name in SITES}, **changes)
    return [made.model_copy(update={"run": digest(n)[:32], "purpose": n}) for n in names]


def test_attack_the_same_job_under_another_name_at_approval(tmp_path):
    one, two = jobs("one", "two", rounds=3, retries=1)
    plan = [Release(m.q, m.sigma, m.steps * n) for m, n in one.plans("clinic-a")[0]]
    policy = SitePolicy(approver="dr.a", max_epsilon=cost(*plan))
    with open_ledger(one, "clinic-a", policy, SIGNER, tmp_path) as ledger:
        held = ledger.summary().encumbrances
        ledger.reserve(one.mechanism("clinic-a"), run=one.run, contract=one.digest, round=1, attempt=0, code="0",
                       approver="dr.a")
    assert code_of(open_ledger, two, "clinic-a", policy, SIGNER, tmp_path) == "budget.exhausted"
    with open_ledger(one, "clinic-a", policy, SIGNER, tmp_path) as ledger:  # a restart; and the lease was given back
        assert ledger.summary().encumbrances == held
        assert [(r.code, r.run, r.what) for r in ledger.summary().refusals] == [("budget.exhausted", two.run, "job")]
        ledger.close_run(one.run)
    with open_ledger(one, "clinic-a", policy, SIGNER, tmp_path) as ledger:  # only to be asked for its evidence
        assert ledger.summary().encumbrances == held
    assert code_of(open_ledger, two, "clinic-a", policy, SIGNER, tmp_path) == "budget.exhausted"  # one round is spent


# The filter -----------------------------------------------------------------------------------------------------------

def test_the_first_job_is_enforced_by_pld_and_a_second_one_by_the_filter_too(path):
    with create(path, SIGNER, cap=twice(Release(0.5, 20.0, 2))) as ledger:
        assert encumber(ledger, 2).enforced == "pld"
        reserve(ledger, 1)
        assert encumber(ledger, 2, run=OTHER).enforced == "pld+filter"
        for n in (1, 2):
            reserve(ledger, n, run=OTHER)
        reserve(ledger, 2)
        assert [r.enforced for r in ledger.summary().reserves] == ["pld", *3 * ["pld+filter"]]


def second_job_within_pld_alone(path, monkeypatch=None):
    """A cap that the PLD of both jobs meets exactly: the filter, which is looser, must refuse the second one."""
    with create(path, SIGNER, cap=cost(Release(0.5, 20.0, 4))) as ledger:
        encumber(ledger, 2)
        reserve(ledger, 1)
        assert code_of(encumber, ledger, 2, run=OTHER) == "budget.exhausted"


def test_a_second_job_that_only_pld_admits_is_refused(path):
    second_job_within_pld_alone(path)


def test_planted_filter_that_is_not_asked_is_caught(path, monkeypatch):
    monkeypatch.setattr(privacy.ledger_budget.RenyiFilter, "admits", lambda *_: True)
    with pytest.raises(pytest.fail.Exception):
        second_job_within_pld_alone(path)


def test_the_filter_never_changes_its_order(path, monkeypatch):
    made = []
    monkeypatch.setattr(privacy.ledger_budget, "RenyiFilter",
                        lambda *terms: made.append(terms) or RenyiFilter(*terms))
    with create(path, SIGNER) as ledger:
        encumber(ledger, 2)
        reserve(ledger, 1)
        encumber(ledger, 2, run=OTHER, sigma=9.0)
        reserve(ledger, 1, run=OTHER, sigma=9.0)
        ledger.close_run(RUN)
        encumber(ledger, 1, run=THIRD, q=0.25)
    assert len(made) == 3 and set(made) == {(1e-5, 8.0, (Release(0.5, 20.0, 2),))}


# Refusals and registrations -------------------------------------------------------------------------------------------

def test_refusals_are_recorded_once_and_shown_to_their_run(path):
    with create(path, SIGNER) as ledger:
        reserve(ledger, 1)
        for _ in range(3):
            ledger.refuse("policy.epsilon", OTHER, CONTRACT, "job")
        ledger.refuse("site.adapter_invalid", RUN, CONTRACT, "round")
        spent, extract = ledger.epsilon(), ledger.extract(RUN)
        ledger.close_run(RUN)
        assert code_of(ledger.refuse, "budget.exhausted", RUN, CONTRACT, "round") == "ledger.run_closed"
    with Ledger.open(path, SIGNER) as ledger:
        assert [(r.code, r.run, r.what) for r in ledger.summary().refusals] == [
            ("policy.epsilon", OTHER, "job"), ("site.adapter_invalid", RUN, "round")]
        assert ledger.epsilon() == spent
    shown = check_extract(extract, SIGNER.certificate)
    assert [r.code for r in shown.refusals] == ["site.adapter_invalid"] and shown.commitments == 1


@pytest.mark.parametrize(("code", "what"), [
    ("patient 17 has no text", "job"), ("data.floor", "job"), ("lineage.unregistered", "job"),
    ("policy.epsilon", "patient 17")])
def test_attack_record_content_in_a_refusal(path, code, what):
    with create(path, SIGNER) as ledger:
        assert code_of(ledger.refuse, code, RUN, CONTRACT, what) == "config.invalid"
        assert ledger.head.seq == 0


def test_every_refusal_of_policy_can_be_recorded():
    import ast

    import fl_client.policy

    calls = [n for n in ast.walk(ast.parse(Path(fl_client.policy.__file__).read_text())) if isinstance(n, ast.Call)]
    codes = {f"policy.{n.args[0].value}" for n in calls if getattr(n.func, "id", "") == "_refuse"}
    assert codes and codes <= set(REFUSALS)


def test_a_registration_says_that_and_nothing_more(path):
    with create(path, SIGNER) as ledger:
        ledger.register("dr.a")
        reserve(ledger, 1)
        shown = check_extract(ledger.extract(RUN), SIGNER.certificate)
    assert [(r.kind, r.approver) for r in shown.registrations] == [("register", "dr.a")]
    assert set(shown.registrations[0].model_dump()) == {"schema_", "seq", "prev", "kind", "approver"}


# Schemas --------------------------------------------------------------------------------------------------------------

OLD = SelfSigner(bytes(range(32)))  # signed data/ledger-v1.jsonl, which the version before encumbrances wrote


@pytest.fixture
def old(tmp_path):
    return Path(shutil.copy(DATA / "ledger-v1.jsonl", tmp_path / f"{LINEAGE}.jsonl"))


def test_a_ledger_of_schema_1_verifies_and_keeps_what_it_spent(old):
    from privacy.identity import load_certificate

    certificate = load_certificate((DATA / "ledger-v1.pem").read_bytes())
    summary = check_extract(old.read_bytes(), certificate)
    assert {r.schema_ for r in summary.reserves} == {V1} and len(summary.reserves) == 4
    assert {(r.sampled, r.group, r.draws) for r in summary.reserves} == {("record", 1, 1)}
    with Ledger.open(old, OLD) as ledger:
        assert str(ledger.epsilon()) == summary.epsilon == "0.1463"
        assert check_extract(ledger.extract(RUN), certificate).commitments == 2
    assert old.read_bytes() == (DATA / "ledger-v1.jsonl").read_bytes()


def test_a_ledger_of_schema_1_goes_on_under_schema_2(old):
    with Ledger.open(old, OLD) as ledger:
        assert code_of(reserve, ledger, 3, hold=False) == "budget.not_encumbered"
        assert code_of(encumber, ledger, 2) == "budget.not_encumbered"  # three rounds are reserved already
        assert encumber(ledger, 5).enforced == "pld+filter"
        reserve(ledger, 3)
        reserve(ledger, 4)
        assert code_of(reserve, ledger, 5) == "budget.not_encumbered"
        ledger.close_run(RUN)
    with Ledger.open(old, OLD) as ledger:
        bodies = ledger.summary()
        assert [r.schema_ for r in bodies.reserves] == 4 * [V1] + 2 * [V2]
        assert ledger.epsilon() == cost(Release(0.5, 20.0, 5), Release(0.25, 20.0, 1))
        assert bodies.closes[-1].freed == 0


@pytest.mark.parametrize("schema", ["consilo.ledger/3", "", None, 2])
def test_a_schema_of_the_future_is_refused_by_code(path, schema):
    create(path, SIGNER).close()
    record = parse(path.read_bytes().strip())
    body = {**record["body"], "schema": schema, "field_of_the_future": 1}
    path.write_bytes(canonical({**record, "body": body, "hash": digest(body)}) + b"\n")
    before = path.read_bytes()
    assert code_of(Ledger.open, path, SIGNER) == "ledger.schema"
    assert code_of(check_extract, before, None) == "ledger.schema"
    assert path.read_bytes() == before
