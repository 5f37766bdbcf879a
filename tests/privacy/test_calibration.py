"""Calibration: the smallest sigma of the lattice, and plans that a ledger would accept."""

import pytest

from privacy import calibration
from privacy.accountant import Release, epsilon, round_up
from privacy.calibration import calibrate_schedule, calibrate_sigma, label, plan
from privacy.errors import UsageError
from privacy.mechanism import default_delta


@pytest.mark.parametrize(("q", "steps", "delta", "target"), [
    (0.5, 21, 1e-5, 8.0), (0.5, 20, 1e-5, 1.0), (0.01, 1000, 1e-5, 3.0), (1.0, 1, 1e-6, 0.5), (0.001, 3000, 1e-6, 1.0)])
def test_smallest_sigma_of_the_lattice(q, steps, delta, target):
    sigma = calibrate_sigma(q, steps, delta, target)
    assert sigma * 1000 == pytest.approx(round(sigma * 1000), abs=1e-9)
    assert round_up(epsilon([Release(q, sigma, steps)], delta)) <= target
    assert round_up(epsilon([Release(q, sigma - 0.001, steps)], delta)) > target


def test_the_demo_needs_about_what_was_measured():
    assert 1.550 <= calibrate_sigma(0.5, 20, 1e-5, 8.0) <= 1.556


def test_retries_cost_noise():
    assert calibrate_sigma(0.5, 21, 1e-5, 8.0) > calibrate_sigma(0.5, 20, 1e-5, 8.0)


def test_planted_rounding_down_is_caught(monkeypatch):
    """A search that stops one lattice point early overspends."""
    honest = calibration._smallest
    monkeypatch.setattr(calibration, "_smallest", lambda fits, start: honest(fits, start=start) - 1)
    sigma = calibration._calibrated.__wrapped__((((0.5, 1.0, 20, 1),),), 1e-5, 8.0)
    assert round_up(epsilon([Release(0.5, sigma, 20)], 1e-5)) > 8.0


def check_schedule(sigma, plans, delta, target):
    def costs(sigma):
        return [round_up(epsilon([Release(q, sigma * noise, steps, group) for q, noise, steps, group in plan], delta))
                for plan in plans]

    assert max(costs(sigma)) <= target < max(costs(sigma - 0.001))


RETRIED = [[(0.5, 1.0, 11, 1), (0.1, 0.5, 5, 1)], [(0.5, 1.0, 10, 1), (0.1, 0.5, 6, 1)]]  # a retry in either phase


def test_schedule_keeps_the_cap_however_the_retries_are_spent():
    sigma = calibrate_schedule(RETRIED, 1e-5, 6.0)
    check_schedule(sigma, RETRIED, 1e-5, 6.0)
    assert sigma == calibrate_schedule(RETRIED[::-1], 1e-5, 6.0)
    assert sigma == max(calibrate_schedule([plan], 1e-5, 6.0) for plan in RETRIED)


def test_schedule_of_one_phase_and_of_groups():
    assert calibrate_schedule([[(0.5, 1.0, 21, 1)]], 1e-5, 8.0) == calibrate_sigma(0.5, 21, 1e-5, 8.0)
    assert calibrate_schedule([[(0.5, 1.0, 10, 1), (0.5, 1.0, 11, 1)]], 1e-5, 8.0) == calibrate_sigma(0.5, 21, 1e-5, 8.0)
    grouped = [[(0.05, 1.0, 40, 4), (0.02, 2.0, 40, 4)]]
    check_schedule(calibrate_schedule(grouped, 1e-5, 4.0), grouped, 1e-5, 4.0)


def test_planted_forgotten_retry_is_caught(monkeypatch):
    """One way of spending the retries is calibrated instead of all: the cheap one overspends."""
    honest = calibration._calibrated
    monkeypatch.setattr(calibration, "_calibrated", lambda plans, delta, target: honest(plans[:1], delta, target))
    cheap = min(RETRIED, key=lambda plan: calibrate_schedule([plan], 1e-5, 6.0))
    with pytest.raises(AssertionError):
        check_schedule(calibrate_schedule([cheap, *RETRIED], 1e-5, 6.0), RETRIED, 1e-5, 6.0)


@pytest.mark.parametrize("plans", [[], [[]], [[(0.5, 0.0, 5, 1)]], [[(0.5, float("inf"), 5, 1)]],
                                   [[(1.5, 1.0, 5, 1)]], [[(0.5, 1.0, 5, 0)]]])
def test_schedules_that_cannot_be_are_refused(plans):
    with pytest.raises(UsageError, match=r"dp\.parameter"):
        calibrate_schedule(plans, 1e-5, 8.0)


def test_plan_for_persons_and_at_other_deltas():
    record, person = (plan(records=1000, q=0.05, steps=20, epsilon=4.0, unit=unit, k_max=k_max)
                      for unit, k_max in (("record", None), ("person", 4)))
    assert person.sigma > 1.5 * record.sigma and person.epsilon <= 4.0
    assert plan(records=1000, q=0.05, steps=20, epsilon=4.0, unit="person").sigma == record.sigma  # persons, whole
    assert list(person.epsilon_at) == ["1e-4", "1e-5", "1e-6", "1e-7"]
    assert person.epsilon_at["1e-5"] == person.epsilon and sorted(person.epsilon_at.values()) == list(
        person.epsilon_at.values())
    chosen = plan(records=1000, q=0.05, steps=20, sigma=3.0, delta=2.5e-6)
    assert chosen.epsilon_at["2.5e-6"] == chosen.epsilon
    assert [label(d) for d in (1e-5, 0.5, 1.25e-10, 1e-100)] == ["1e-5", "5e-1", "1.25e-10", "1e-100"]


def test_smallest_finds_every_threshold_from_every_start():
    for threshold in (1, 2, 3, 7, 30, 100):
        for start in (1, 2, 5, 50, 200):
            assert calibration._smallest(lambda k, t=threshold: k >= t, start=start) == threshold


def test_plan_both_ways():
    forward = plan(records=500, q=0.5, steps=21, epsilon=8.0)
    back = plan(records=500, q=0.5, steps=21, sigma=forward.sigma)
    assert forward == back
    assert forward.delta == default_delta(500) and forward.epsilon <= 8.0
    assert forward.noise_to_signal == forward.sigma / 250


@pytest.mark.parametrize(("changes", "code"), [
    ({"epsilon": 0.0}, "dp.parameter"), ({"epsilon": -1.0}, "dp.parameter"),
    ({"epsilon": float("nan")}, "dp.parameter"),
    ({"epsilon": None, "sigma": 0.0}, "dp.parameter"), ({"delta": 0.002}, "dp.parameter"), ({"q": 1.5}, "dp.parameter"),
    ({"records": 0}, "dp.parameter"), ({"steps": 0}, "dp.parameter"), ({"sigma": 1.0}, "cli.usage"),
    ({"epsilon": None}, "cli.usage"), ({"epsilon": None, "sigma": 0.01}, "dp.unbounded"),
    ({"k_max": 4}, "dp.parameter"), ({"k_max": 0, "unit": "person"}, "dp.parameter"),
    ({"unit": "household"}, "dp.unsupported"), ({"delta": 1e-30}, "dp.unreachable")])
def test_case_2_plans_that_cannot_be_are_refused(changes, code):
    with pytest.raises(UsageError) as caught:
        plan(**{"records": 500, "q": 0.5, "steps": 20, "epsilon": 8.0, **changes})
    assert caught.value.code == code
