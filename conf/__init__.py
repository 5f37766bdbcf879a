"""Configuration: YAML groups composed by hydra at the command line's edge and parsed at once into `Settings`.

No other module sees hydra or OmegaConf. Nothing in a configuration is ever executed or looked up: interpolations and
`_target_` keys are refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from conf.familiar import hint
from conf.settings import Settings
from privacy.contract import validate
from privacy.errors import UsageError, nearest

OPEN_KEYS = ("data.sites=", "data.sites.")


def load_settings(overrides: Sequence[str] = ()) -> Settings:
    """Compose conf/config.yaml with hydra overrides (`privacy.rounds=5`, `privacy=none`).

    Raises UsageError `config.override` (not understood), `config.unknown_key`, `config.invalid`,
    `config.interpolation`, `config.missing` (a `???` that only the user can give).
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    try:
        with initialize_config_module("conf", version_base="1.3"):
            value = OmegaConf.to_container(compose("config", [_open(o) for o in overrides]), resolve=False)
    except (HydraException, ValueError, OSError, TypeError, AttributeError, KeyError) as e:  # all of hydra's
        raise _override(e, overrides) from e
    _refuse_code(value)
    return validate(Settings, value)


def _open(override: str) -> str:
    """Hydra wants ++ in front of keys that no chosen file holds: names of sites, and settings left at their default."""
    key = override.partition("=")[0]
    new = override.startswith(OPEN_KEYS) or ("." in key and key in _known_keys())
    return f"++{override}" if new else override


def _refuse_code(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if str(key).startswith("_"):
                raise UsageError("config.unknown_key", f"Key {str(key)!r} would name code to run.", "Remove it.")
            _refuse_code(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_code(item)
    elif value == "???":
        raise UsageError("config.missing", "A value that only you can give is missing.",
                         "Look for ??? in the chosen files of conf/, and set those keys.")
    elif isinstance(value, str) and "${" in value:
        raise UsageError("config.interpolation", "A value holds an interpolation, which is never resolved.",
                         "Write the value itself.")


def _override(error: Exception, overrides: Sequence[str]) -> UsageError:
    """Name the override that hydra didn't take, with the key that was meant, or the nearest."""
    for override in overrides:
        key, _, chosen = override.lstrip("+~").partition("=")
        group = Path(__file__).parent / key
        if key and os.path.isdir(group) and not os.path.isfile(group / f"{chosen}.yaml"):  # noqa: PTH112, PTH113 - any name
            return UsageError("config.override", f"There is no {key}={chosen}.",
                              nearest(chosen, [f.stem for f in group.glob("*.yaml")]))
        known = _known_keys()
        if key and key not in known and key.split(".")[-1] in str(error):
            return UsageError("config.override", f"The override {key!r} is not understood.",
                              hint(key.split(".")[-1]) or nearest(key, known))
    return UsageError("config.override", "The overrides are not understood.", "Write them as group=name or key=value.")


@cache
def _known_keys() -> list[str]:
    def walk(model: Any, prefix: str) -> list[str]:
        out = []
        for name, field in model.model_fields.items():
            inner = field.annotation
            out += walk(inner, f"{prefix}{name}.") if hasattr(inner, "model_fields") else [f"{prefix}{name}"]
        return out

    return [*Settings.model_fields, *walk(Settings, "")]
