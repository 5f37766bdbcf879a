"""Calibration: the smallest sigma of the lattice, and plans that a ledger would accept."""

import pytest

from privacy import calibration
from privacy.accountant import Release, epsilon, round_up
from privacy.calibration import calibrate_sigma, plan
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
    sigma = calibration.calibrate_sigma.__wrapped__(0.5, 20, 1e-5, 8.0)
    assert round_up(epsilon([Release(0.5, sigma, 20)], 1e-5)) > 8.0


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
    ({"delta": 1e-30}, "dp.unreachable")])
def test_case_2_plans_that_cannot_be_are_refused(changes, code):
    with pytest.raises(UsageError) as caught:
        plan(**{"records": 500, "q": 0.5, "steps": 20, "epsilon": 8.0, **changes})
    assert caught.value.code == code
