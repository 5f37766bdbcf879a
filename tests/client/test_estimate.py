"""The preflight measures with the real engine on a synthetic record; it reads no data, spends nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_client import cli, estimate
from privacy import cli_edge
from privacy.compute import Compute
from privacy.contract import Contract
from privacy.errors import Refused
from strategies.classifier import TextClassifier

Make = Callable[..., Contract]


def test_figures_of_the_contract(tiny_model: Path, tiny_contract: Make) -> None:
    contract = tiny_contract(privacy={"rounds": 7, "local_steps": 2, "physical_batch": 24}, site={"n_decl": 3000})
    found = estimate.estimate(contract, "site-a", tiny_model, Compute(cache_mib=1))
    assert (found.engine, found.batch, found.proposed, found.fits) == ("fused", 24, 24, True)
    assert found.records_per_step == 1500
    assert 0 < found.kept < 1
    assert found.records_mib == pytest.approx(1)
    assert found.round_s == pytest.approx(2 * found.step_s)
    assert found.job_s == pytest.approx(found.first_s + 7 * found.round_s)
    assert found.up_bytes == 4 * found.dim
    assert found.down_bytes > found.up_bytes, "A is frozen, but it is sent"
    assert 0 < found.model_mib < found.free_mib
    assert found.step_mib >= 0
    text = found.render()
    assert "24 records at a time fit" in text
    assert f"{found.up_bytes} bytes up" in text


def test_a_sites_own_choices_are_what_is_measured(tiny_model: Path, tiny_contract: Make) -> None:
    found = estimate.estimate(tiny_contract(), "site-b", tiny_model, Compute(engine="opacus", precision="bfloat16",
                                                                              physical_batch=5))
    assert (found.engine, found.precision, found.batch, found.proposed) == ("opacus", "bfloat16", 5, 5)
    assert found.kept == 1


def only(most: int) -> Any:
    honest = TextClassifier.each

    def each(self: TextClassifier, prepared: Any) -> torch.Tensor:
        if len(prepared.labels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, prepared)

    return each


@pytest.mark.parametrize(("most", "proposed"), [(5, 4), (31, 16), (2, 2)])
def test_a_batch_that_fits_is_proposed(tiny_model: Path, tiny_contract: Make, monkeypatch: pytest.MonkeyPatch, most: int,
                                       proposed: int) -> None:
    monkeypatch.setattr(TextClassifier, "each", only(most))
    found = estimate.estimate(tiny_contract(), "site-a", tiny_model, Compute())
    assert (found.fits, found.proposed) == (False, proposed)
    assert f"site.physical_batch={proposed}" in found.render()


def test_a_batch_that_would_not_fit_is_not_tried(tiny_model: Path, tiny_contract: Make,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system would end the process rather than say so."""
    sizes, honest = list[int](), TextClassifier.each

    def each(self: TextClassifier, prepared: Any) -> torch.Tensor:
        sizes.append(len(prepared.labels))
        return honest(self, prepared)

    monkeypatch.setattr(TextClassifier, "each", each)
    monkeypatch.setattr(estimate, "free_bytes", lambda _device: 0.0)
    found = estimate.estimate(tiny_contract(), "site-a", tiny_model, Compute())
    assert not found.fits
    assert max(sizes) == 2, "the check takes two"


def test_the_command_needs_no_keys_data_or_ledger(tiny_model: Path, tiny_contract: Make, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "contract.json").write_bytes(tiny_contract().to_bytes())
    overrides = ["model=local", "model.name=tiny", f"model.path={tiny_model}", "data=files", "data.name=x",
                 "site.name=site-a"]
    assert cli_edge.run(cli.app, ["estimate", "contract.json", *overrides, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fits"]
    assert found["proposed"] == 32
    assert [path.name for path in tmp_path.iterdir()] == ["contract.json"]
    monkeypatch.setattr(TextClassifier, "each", only(9))
    assert cli_edge.run(cli.app, ["estimate", "contract.json", *overrides]) == 1
    assert "site.physical_batch=8" in capsys.readouterr().out


def test_absent_device(tiny_model: Path, tiny_contract: Make) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(Refused) as caught:
            estimate.estimate(tiny_contract(), "site-a", tiny_model, Compute(device="cuda"))
        assert caught.value.code == "device.absent"
