"""The audit through the real trainer: planted bugs are found, honest runs pass. Random words come from fixed seeds here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from numpy.typing import NDArray

import privacy.dpsgd as dpsgd
import privacy.noise as noise
import simulations.audit as audit_module
from conf import load_settings
from privacy import cli_edge
from privacy.contract import Contract
from privacy.dpsgd import ClippedGradients
from privacy.errors import CheckFailed, UsageError
from simulations import audit_cli
from simulations.audit import CanaryTrainer, Place, audit, configured
from simulations.audit_tiny import LABELS, WIDTH, tiny

ALPHA = 0.01
Plant = Callable[[pytest.MonkeyPatch], None]
honest_noise, honest_clipped = noise.lattice_noise, ClippedGradients.clipped


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Contract, str, Place]:
    settings = load_settings(["privacy.sigma=1.583", "privacy.rounds=20"])  # epsilon = 8 for 20 rounds and a retry
    return configured(tiny(settings, tmp_path_factory.mktemp("tiny")), None)


def nothing(patch: pytest.MonkeyPatch) -> None:
    pass


def quarter_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dpsgd, "lattice_noise", lambda dim, *, sigma, clip: honest_noise(dim, sigma=sigma / 4, clip=clip))


def fourfold_clip(patch: pytest.MonkeyPatch) -> None:
    def clipped(self: ClippedGradients, draw: Any, clip: float, *how: Any) -> Iterator[NDArray[np.int64]]:
        return (4 * part for part in honest_clipped(self, draw, 4 * clip, *how))  # in the lattice of the claimed clip

    patch.setattr(ClippedGradients, "clipped", clipped)


def every_record_always(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("privacy.population.poisson_sample", lambda units, q: np.arange(units))


def once(setting: tuple[Contract, str, Place], plant: Plant, seed: int, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        words = np.random.Generator(np.random.PCG64(seed))
        patch.setattr(noise, "random_words", lambda n: words.integers(0, 2**64, n, dtype=np.uint64))
        plant(patch)
        return audit(*setting, **{"canaries": 128, "rounds": 8, "seed": seed, "alpha": ALPHA} | options)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("plant", [nothing, quarter_noise, fourfold_clip, every_record_always])
def test_planted_bug_is_a_violation(setting: tuple[Contract, str, Place], plant: Plant, seed: int, live: bool) -> None:
    assert once(setting, plant, seed, live=live).violation is (plant is not nothing)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("live", [False, True])
def test_rates_of_a_hundred_seeds(setting: tuple[Contract, str, Place], live: bool) -> None:
    """Detection >= 95 %, false alarms <= 5 % at alpha = 1 %."""
    found = {plant.__name__: sum(once(setting, plant, seed, live=live).violation for seed in range(100))
             for plant in (nothing, quarter_noise, fourfold_clip)}
    assert found["nothing"] <= 5
    assert min(found["quarter_noise"], found["fourfold_clip"]) >= 95


PERSON = "privacy.unit=person"
UNITS = {"record": ([], 1.0), "person": ([PERSON, "privacy.sampled=person", "privacy.draws=2"], 1.0),
         "records of a person": ([PERSON, "privacy.k_max=2"], 2.0), "local steps": (["privacy.local_steps=2"], 1.0)}


def of_unit(unit: str, folder: Path) -> tuple[Contract, str, Place]:
    settings = tiny(load_settings(["privacy.sigma=3.0", *UNITS[unit][0]]), folder)
    file = Path(str(settings.data.sites["site"].file))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"who": i // 2}) + "\n" for i, row in enumerate(rows)))
    return configured(settings.model_copy(update={"data": settings.data.model_copy(update={"person": "who"})}), None)


@pytest.mark.parametrize("unit", UNITS)
def test_canaries_go_through_the_mechanism_as_records_do(tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise and sampling an included canary adds the clip norm, for each record that its unit may own; other
    records, where they contribute, cancel whether it is there or not."""
    seen: list[Any] = []
    monkeypatch.setattr(audit_module, "judge", lambda scores, included, *_, **__: seen.append((scores, included)))

    def exact(patch: pytest.MonkeyPatch) -> None:
        every_record_always(patch)
        patch.setattr(dpsgd, "lattice_noise", lambda dim, **_: np.zeros(dim, np.int64))

    setting = of_unit(unit, tmp_path)
    for live in (False, True):
        once(setting, exact, 0, canaries=256, rounds=24, live=live)
    (alone, included), (among, same) = seen
    assert alone.shape == (24, 256)
    assert np.array_equal(included, same)
    np.testing.assert_allclose(alone, np.broadcast_to(included * UNITS[unit][1], (24, 256)), atol=1e-5)
    assert among[:, included].mean() == pytest.approx(UNITS[unit][1], abs=0.1)
    assert among[:, ~included].mean() == pytest.approx(0.0, abs=0.1)
    assert among[:, ~included].std() > 0.1


@pytest.mark.parametrize("unit", ["person", "records of a person", "local steps"])
def test_other_units_are_judged_by_their_own_sensitivity(tmp_path: Path, unit: str) -> None:
    found = of_unit(unit, tmp_path)
    assert once(found, nothing, 0, canaries=64).violation is False
    assert once(found, fourfold_clip, 0, canaries=200).violation is True


def test_canaries_that_reach_nothing_are_found(setting: tuple[Contract, str, Place],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a hook of theirs is passed by: their records would contribute nothing, and every audit be consistent."""
    monkeypatch.setattr(CanaryTrainer, "_before", lambda self, head, args: (torch.zeros_like(args[0]),))
    with pytest.raises(CheckFailed) as caught:
        once(setting, nothing, 0)
    assert caught.value.code == "audit.inert"


@pytest.mark.parametrize("canaries", [31, WIDTH * len(LABELS) + 1])
def test_too_few_or_too_many_canaries(setting: tuple[Contract, str, Place], canaries: int) -> None:
    with pytest.raises(UsageError) as caught:
        once(setting, nothing, 0, canaries=canaries)
    assert caught.value.code == "dp.parameter"


def test_contract_without_privacy_claims_nothing(tmp_path: Path) -> None:
    found = configured(tiny(load_settings(["privacy=none"]), tmp_path), None)
    with pytest.raises(UsageError) as caught:
        once(found, nothing, 0)
    assert caught.value.code == "dp.unbounded"


# The command


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command("audit")(audit_cli.audit_command)
    app.command("other")(lambda: None)
    return app


@pytest.mark.parametrize("plant", [nothing, quarter_noise])
def test_command_writes_what_it_says_and_exits_by_the_verdict(command: typer.Typer, tmp_path: Path, plant: Plant,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    words = np.random.Generator(np.random.PCG64(0))
    monkeypatch.setattr(noise, "random_words", lambda n: words.integers(0, 2**64, n, dtype=np.uint64))
    plant(monkeypatch)
    options = ["audit", "--tiny", "--rounds", "4", "--seed", "3", "--out", str(tmp_path), "privacy.sigma=1.583"]
    assert cli_edge.run(command, [*options, "--json"]) == (plant is not nothing)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "audit.json").read_text())
    assert document["verdict"] == ("consistent" if plant is nothing else "violation")
    assert (document["canaries"], document["seed"], document["claimed"]["steps"]) == (200, 3, 4)
    if plant is not nothing:
        assert cli_edge.run(command, options) == 1
        output = capsys.readouterr()
        assert "not an assurance" in output.out
        assert output.err.startswith("audit.violation: ")


def test_help_is_there_before_torch() -> None:
    code = ("import sys, typer; from simulations.audit_cli import audit_command; app = typer.Typer(); "
            "app.command()(audit_command); app(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
