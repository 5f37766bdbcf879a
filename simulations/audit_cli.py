"""`fl-simulate audit`: run it, write <out>/audit.json, exit 1 on a violation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from privacy import cli_edge

Json = Annotated[bool, typer.Option("--json", help="The last line of stdout is one JSON object.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="hydra overrides, e.g. privacy.epsilon=3 privacy.q=1.0")]


def audit_command(
        overrides: Overrides = None,
        tiny: Annotated[bool, typer.Option("--tiny", help="A small random model in place of the configured one.")] = False,
        site: Annotated[str | None, typer.Option("--site", help="Whose records; the first site if not given.")] = None,
        canaries: Annotated[int, typer.Option(min=1, help="At most as many as the head has weights.")] = 200,
        rounds: Annotated[int | None, typer.Option(min=1, help="Noisy steps; those of all rounds if not given.")] = None,
        live: Annotated[bool, typer.Option("--live", help="The site's own records contribute, and hide canaries.")] = False,
        seed: Annotated[int, typer.Option(min=0, help="Of the coins that include canaries.")] = 0,
        confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="1 - alpha.")] = 0.99,
        out: Annotated[Path, typer.Option("--out", help="Output folder.")] = Path("outputs/audit"),
        as_json: Json = False) -> None:
    """What gradient canaries find in one run of the trainer: a lower bound of epsilon, not an assurance."""
    import tempfile
    import warnings

    from conf import load_settings
    from privacy.canonical import canonical
    from privacy.errors import CheckFailed
    from privacy.files import FileLayer
    from simulations.audit import audit, configured
    from simulations.audit_tiny import tiny as made_tiny
    from simulations.demo import embedded

    warnings.simplefilter("ignore")
    settings = load_settings(overrides or [])
    with tempfile.TemporaryDirectory(prefix="consilo-") as folder:
        if tiny:
            settings = made_tiny(settings, Path(folder))
        embedded(settings)
        contract, name, place = configured(settings, site)
        steps = rounds or settings.privacy.rounds * settings.privacy.local_steps
        finding = audit(contract, name, place, canaries=canaries, rounds=steps, seed=seed,
                        alpha=1 - confidence, live=live)
    found = finding.as_dict() | {"seed": seed, "model": settings.model.name, "data": settings.data.name, "site": name,
                                 "unit": settings.privacy.unit, "live": live}
    out.mkdir(parents=True, exist_ok=True)
    FileLayer().write_atomic(out / "audit.json", canonical(found) + b"\n")
    bound, tests = found["lower_bound"], found["tests"]
    cli_edge.emit(found, as_json, f"{found['verdict']}: epsilon claimed {found['claimed']['epsilon']}, found at least "
                                  f"{bound['f_dp']} (f_dp), {bound['one_run']} (one_run) at {found['confidence']}; p-values "
                                  f"{tests['noise']} (noise), {tests['sensitivity']} (sensitivity), {tests['f_dp']} (f_dp). "
                                  f"{found['statement']} {out}/audit.json")
    if finding.violation and as_json:
        raise typer.Exit(CheckFailed.exit_code)
    if finding.violation:
        raise CheckFailed("audit.violation", "The trainer leaks more than its mechanism allows.",
                          "Train nothing with this installation; compare it with a release, and report it.")
