"""Configuration: overrides, hints for typos, and nothing in it that is ever executed or looked up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import conf
from conf import load_settings
from conf.familiar import FAMILIAR
from privacy.errors import UsageError

SECRET = "canary-93bf"
FOLDER = Path(conf.__file__).parent
GROUPS = sorted(p.name for p in FOLDER.iterdir() if p.is_dir() and list(p.glob("*.yaml")))
# what `???` asks of the user
MODEL, DATA = ["model.name=m", "model.path=/m"], ["data.name=d"]
GIVEN = {"model": {"local": MODEL, "local_llm": MODEL}, "data": {"files": DATA, "instructions": DATA}}


def refusal(*overrides: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_settings(overrides)
    return caught.value


def test_defaults() -> None:
    settings = load_settings()
    assert settings.privacy.trust == "local"
    assert settings.privacy.epsilon == 8.0
    assert settings.secure_aggregation.enabled
    assert settings == load_settings([])


@pytest.mark.parametrize(("group", "option"), [(g, f.stem) for g in GROUPS for f in sorted((FOLDER / g).glob("*.yaml"))])
def test_every_file_of_every_group_composes(group: str, option: str) -> None:
    load_settings([f"{group}={option}", *GIVEN.get(group, {}).get(option, [])])


def test_overrides_reach_their_fields() -> None:
    settings = load_settings(["privacy.rounds=5", "privacy.q=0.25", "lora.layers=[-1,-2]", "lora.targets=[query]",
                              "purpose=to test", "data.labels=null", "secure_aggregation=plain", "rule=fedit"])
    assert (settings.privacy.rounds, settings.privacy.q) == (5, 0.25)
    assert (settings.lora.layers, settings.lora.targets) == ((-1, -2), ("query",))
    assert (settings.purpose, settings.data.labels) == ("to test", None)
    assert not settings.secure_aggregation.enabled
    assert settings.rule.name == "fedit"


@pytest.mark.parametrize("name", sorted(FAMILIAR))
def test_a_name_of_another_trainer_leads_to_ours(name: str) -> None:
    key = FAMILIAR[name][0]
    assert key in conf._known_keys()
    for typed in (name, f"{key.split('.')[0]}.{name}"):
        assert f"Here it is {key}" in refusal(f"{typed}=1").mend


def test_the_table_of_names_is_that_of_the_code() -> None:
    text = (FOLDER.parent / "docs" / "language-models.md").read_text()
    assert all(f"| {name} | `{key}` | {note} |" in text for name, (key, note) in FAMILIAR.items())


def test_names_of_other_trainers_are_theirs() -> None:
    import inspect

    from opacus import PrivacyEngine
    from peft import LoraConfig
    from transformers import TrainingArguments

    theirs = {name for what in (TrainingArguments, LoraConfig, PrivacyEngine.make_private,
                                PrivacyEngine.make_private_with_epsilon) for name in inspect.signature(what).parameters}
    assert FAMILIAR.keys() - theirs == {  # of TRL, of Opacus' memory manager and of its accountants
        "max_seq_length", "dataset_text_field", "chat_template_path", "max_physical_batch_size", "sample_rate"}


def test_group_and_experiment_overrides() -> None:
    assert load_settings(["privacy=none"]).privacy.epsilon is None
    assert load_settings(["experiment=quick"]).privacy.rounds == 2
    assert load_settings(["experiment=non_private"]).privacy.trust == "none"
    assert load_settings(["experiment=quick", "privacy.rounds=3"]).privacy.rounds == 3


def test_sites_are_named_on_the_command_line() -> None:
    one = load_settings(["data=files", "data.name=d", "data.sites={a:{file:a.csv},b:{n_decl:50}}"])
    assert one.data.sites["a"].file == "a.csv"
    assert one.data.sites["b"].n_decl == 50
    assert load_settings(["data=files", "data.name=d", "data.sites.c.file=c.csv"]).data.sites["c"].file == "c.csv"


def test_composition_does_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conf/ beside the user's data is not read."""
    before = load_settings()
    (tmp_path / "conf" / "privacy").mkdir(parents=True)
    (tmp_path / "conf" / "config.yaml").write_text("purpose: shadow\n")
    (tmp_path / "conf" / "privacy" / "epsilon8.yaml").write_text("trust: none\n")
    monkeypatch.chdir(tmp_path)
    assert load_settings() == before


# Typos


@pytest.mark.parametrize(("override", "nearest"), [
    ("privacy.round=5", "privacy.rounds"), ("privcy.rounds=5", "privacy.rounds"), ("lora.layer=[-1]", "lora.layers"),
    ("secure_aggregation.treshold=3", "secure_aggregation.threshold")])
@pytest.mark.case(1)
def test_unknown_key_suggests_the_nearest(override: str, nearest: str) -> None:
    error = refusal(override)
    assert error.code in ("config.override", "config.unknown_key")
    assert f"Did you mean '{nearest}'" in error.mend
    assert override.split("=")[0] in error.cause


@pytest.mark.parametrize(("override", "nearest"), [("+privacy.epsilom=5", "epsilon"), ("++lora.rr=1", "r"),
                                                   ("+purpos=x", "purpose")])
@pytest.mark.case(1)
def test_new_key_is_refused_with_the_nearest(override: str, nearest: str) -> None:
    error = refusal(override)
    assert error.code == "config.unknown_key"
    assert nearest in error.mend


@pytest.mark.parametrize(("override", "nearest"), [("privacy=epsilon9", "epsilon8"), ("model=minilmm", "minilm"),
                                                   ("experiment=quik", "quick")])
@pytest.mark.case(1)
def test_unknown_group_option_suggests_the_nearest(override: str, nearest: str) -> None:
    error = refusal(override)
    assert error.code == "config.override"
    assert f"'{nearest}'" in error.mend


def test_unknown_group_suggests_the_nearest() -> None:
    error = refusal("privcy=none")
    assert error.code == "config.override"
    assert "'privacy'" in error.mend


@pytest.mark.parametrize("override", ["=", "privacy.rounds", "privacy.rounds=[", "privacy.rounds==", "{", "", " ",
                                      "~nothing", "privacy.rounds=1 2=3", "a b=c", "@=x", "privacy@=none"])
def test_override_that_is_none(override: str) -> None:
    assert refusal(override).code.startswith("config.")


@pytest.mark.parametrize("override", [
    "privacy.rounds=many", "privacy.rounds=0", "privacy.clip=nan", "privacy.clip=inf", "privacy.clip=0", "privacy.q=1.1",
    "privacy.epsilon=-1", "privacy.delta=1", "privacy.sigma=0", "privacy=5", "lora.r=0", "lora.targets=[]", "seed=-1",
    "~privacy", "server.port=70000", "data.sites={'../a':{}}", "model.pooling=max", "privacy.rounds=1.5"])
@pytest.mark.case(2)
def test_value_that_cannot_be_right_is_refused_before_anything_is_loaded(override: str) -> None:
    assert refusal(override).code in ("config.invalid", "config.override")


# Nothing is executed or looked up


@pytest.mark.parametrize("override", [
    "model.name=${oc.env:CONSILO_SECRET}", "purpose='${oc.env:CONSILO_SECRET}'", "purpose='x ${oc.env:CONSILO_SECRET} y'",
    "lora.targets=['${oc.env:CONSILO_SECRET}']", "data.sites={a:{file:'${oc.env:CONSILO_SECRET}'}}",
    "+data.sites.a.file=${oc.env:CONSILO_SECRET}", "model.path=${model.name}", "privacy=${oc.env:CONSILO_SECRET}",
    "model=${oc.env:CONSILO_SECRET}", "privacy.rounds=${oc.env:CONSILO_SECRET}", "purpose=${oc.decode:'1'}",
    "data.labels=['${oc.env:CONSILO_SECRET}',b]", "+${oc.env:CONSILO_SECRET}=1", "purpose='${oc.create:{}}'",
    "privacy.epsilon='${oc.env:CONSILO_SECRET}'"])
@pytest.mark.case(11)
def test_interpolation_is_refused_and_never_resolved(override: str, monkeypatch: pytest.MonkeyPatch,
                                                     capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CONSILO_SECRET", SECRET)
    error = refusal(override)
    assert error.code.startswith("config.")
    shown = f"{error} {error.__cause__ if error.code == 'config.invalid' else ''}" + "".join(capfd.readouterr())
    assert SECRET not in shown


@pytest.mark.parametrize("override", [
    "+model._target_=os.system", "+_target_=os.system", "++privacy._target_=conf.load_settings", "+model._partial_=true",
    "+data.sites.a._target_=os.mkdir", "data.sites={a:{_target_:os.mkdir}}", "+rule._args_=[x]",
    "+lora._convert_=all", "+site._recursive_=true"])
@pytest.mark.case(11)
def test_target_is_refused_and_never_called(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("system", "mkdir"):
        monkeypatch.setattr(os, name, lambda *a, **k: pytest.fail("called"))
    error = refusal(override)
    assert error.code == "config.unknown_key"
    assert "code to run" in error.cause


@pytest.mark.parametrize("overrides", [["model=local"], ["model=local", "model.name=x"], ["data=files"], ["purpose=???"],
                                       ["model=local", "model.path=/x"], ["data.sites={a:{file:'???'}}"]])
def test_missing_value_is_refused(overrides: list[str]) -> None:
    error = refusal(*overrides)
    assert error.code == "config.missing"
    assert "???" in error.mend


def test_refusal_leaves_hydra_usable() -> None:
    for bad in ("privacy.round=5", "model=${x}", "privacy=epsilon9"):
        refusal(bad)
    assert load_settings() == load_settings()
