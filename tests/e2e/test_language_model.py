"""A causal language model end to end: four sites, with DP, over the product's own road in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from conf import load_settings
from fl_client import supervisor
from fl_client.sandbox import ENFORCED, WALLS, Sandbox
from fl_client.supervisor import TrainerProcess
from fl_client.training import LocalTrainer
from privacy.errors import ConsiloError, Refused
from privacy.report import write_report
from privacy.verify import verify_bundle
from simulations.demo import embedded
from simulations.local import Outcome, federate
from simulations.smollm2 import convert
from strategies.adapter import initial
from strategies.model import build

SITES = ("site-a", "site-b", "site-c", "site-d")


@pytest.fixture
def overrides(tmp_path: Path, tiny_llm: Path, tiny_instructions: dict[str, Path]) -> Any:
    def make(*more: str) -> list[str]:
        sites = ",".join(f"{name}:{{file:{tiny_instructions[name]}}}" for name in SITES)
        return ["model=local_llm", "model.name=tiny", f"model.path={tiny_llm}", "model.max_length=32",
                "model.chat.max_answer=8", "model.chat.separator=':'", "lora=llama_qv", "lora.layers=[-2,-1]",
                "data=instructions", "data.name=tiny", f"data.sites={{{sites}}}",
                f"data.evaluation.file={tiny_instructions['public']}", "privacy.rounds=2", "privacy.retries=0",
                "privacy.physical_batch=32", "server.evaluate_every=1", f"server.out={tmp_path / 'out'}",
                f"server.log={tmp_path / 'log'}", *more]

    return make


def run(overrides: list[str]) -> Outcome:
    return federate(load_settings(overrides))


def test_four_sites_with_dp_and_their_evidence(overrides: Any, tmp_path: Path, tiny_llm: Path) -> None:
    outcome = run(overrides("privacy.rounds=2"))
    metrics = ("prefix_match", "exact_match", "answer_nll")
    assert outcome.contract.metrics == tuple(outcome.result.after.values) == metrics
    assert (outcome.contract.data.fields, outcome.contract.data.labels) == (("prompt", "answer"), ())
    assert outcome.contract.model.chat_template is not None
    assert all(0 < float(e) <= 8.0 for e in outcome.result.epsilon.values())
    assert outcome.result.after.units == 90
    out = tmp_path / "out"
    assert verify_bundle(out / "evidence", outcome.root).verdict == "PASS"
    write_report(out / "evidence", tmp_path, ca=outcome.root)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["evaluations"]) == 3 * len(metrics)
    assert {e["metric_name"] for e in report["evaluations"]} == set(metrics)
    assert [r["metric_name"] for r in report["release"]] == ["prefix_match"]
    adapter = out / "adapter"
    assert not (adapter / "head.safetensors").exists()
    assert not (adapter / "labels.txt").exists()
    card = (adapter / "README.md").read_text()
    assert "apply_chat_template" in card
    made = build(tiny_llm, outcome.contract)
    made.load(load_file(adapter / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llm), adapter).eval()
    ids = torch.tensor([made.chat.prompt("a cough")])  # type: ignore[attr-defined]
    with torch.no_grad(), made.whole():
        torch.testing.assert_close(loaded(input_ids=ids).logits, made.peft(input_ids=ids).logits)


def test_it_learns_without_noise(overrides: Any) -> None:
    more = ["privacy=none", "privacy.rounds=12", "privacy.q=1.0", "rule.server_lr=2.0", "server.evaluate_every=12"]
    outcome = run(overrides(*more))
    before, after = outcome.result.before.values, outcome.result.after.values
    assert after["answer_nll"] < before["answer_nll"] - 0.5


def test_a_changed_chat_template_is_refused(overrides: Any, tmp_path: Path, tiny_llm: Path,
                                            tiny_instructions: dict[str, Path]) -> None:
    """The site's folder has another one than the contract pins, and nothing else changed."""
    import shutil

    contract = run(overrides("privacy=none", "privacy.rounds=1")).contract
    folder = Path(shutil.copytree(tiny_llm, tmp_path / "model"))

    def trainer() -> LocalTrainer:
        return LocalTrainer(contract, "site-a", model=folder, data=tiny_instructions["site-a"], text="prompt",
                            label="completion")

    trainer().probe()
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "Assistant"))
    with pytest.raises(Refused) as caught:
        trainer()
    assert caught.value.code == "model.digest"


def test_training_inside_all_walls(overrides: Any, tiny_llm: Path, tiny_instructions: dict[str, Path]) -> None:
    """The template's interpreter, too, needs nothing that the sandbox takes away."""
    if set(supervisor.walls().values()) != {ENFORCED}:
        pytest.skip("not all walls hold here")
    contract = run(overrides("privacy.rounds=1", "privacy.q=1.0")).contract
    request = {"contract": contract.to_bytes().decode(), "site": "site-a", "model": str(tiny_llm), "text": "prompt",
               "data": str(tiny_instructions["site-a"]), "label": "completion", "threads": 1, "person": "", "lineage": "",
               "compute": {}}
    trainer = TrainerProcess(request, limit_s=200.0, sandbox=Sandbox(required=WALLS))
    try:
        change = trainer.train(initial(trainer.spec, 0), 1)
    finally:
        trainer.close()
    assert change.shape == (trainer.spec.dim,) and np.isfinite(change).all() and change.any()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_four_sites_in_real_processes(overrides: Any, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run([sys.executable, "-P", "-m", "simulations.cli", "demo", *overrides(), "--out", str(out)],
                          capture_output=True, text=True, timeout=800, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert verify_bundle(out / "evidence", (out / "ca.sha256").read_text().strip()).verdict == "PASS"
    assert "answer_nll" in (out / "metrics.json").read_text()
    assert not (out / "adapter" / "head.safetensors").exists()


@pytest.mark.parametrize(("override", "code"), [
    ("model.packing=true", "model.packing"), ("model.chat=null", "config.invalid"),
    ("data.labels=[a,b]", "contract.labels")])
def test_what_does_not_fit_is_refused_before_anything_runs(overrides: Any, tmp_path: Path, override: str,
                                                           code: str) -> None:
    with pytest.raises(ConsiloError) as caught:
        run(overrides(override))
    assert caught.value.code == code
    assert not (tmp_path / "out" / "journal.jsonl").exists()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_smollm2_learns_privately(tmp_path: Path) -> None:
    """Four rounds of the experiment: twelve minutes of a core."""
    settings = load_settings(["experiment=hospital_llm", "privacy.rounds=4", "privacy.retries=0", "server.evaluate_every=4",
                              f"server.out={tmp_path / 'out'}", f"server.log={tmp_path / 'log'}"])
    embedded(settings)
    outcome = federate(settings)
    before, after = outcome.result.before.values, outcome.result.after.values
    assert outcome.result.after.units == 400
    assert after["answer_nll"] < before["answer_nll"] - 0.3
    assert all(float(e) <= 8.0 for e in outcome.result.epsilon.values())
    assert verify_bundle(tmp_path / "out" / "evidence", outcome.root).verdict == "PASS"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_package_makes_the_same_folder_each_time(tmp_path: Path) -> None:
    """So the digests of the weights and the tokenizer agree at all sites that convert it themselves."""
    import shutil

    package = Path(".cache/consilo/smollm2")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(next(package.glob("*.gguf")), tmp_path / name)
        convert(tmp_path / name)
    files = sorted(f.name for f in (tmp_path / "one").iterdir())
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
