"""`fl-simulate chaos`: play a seed's histories; exit 1 on a violation, with the command that replays it."""

from __future__ import annotations

from typing import Annotated

import typer

from privacy import cli_edge

Json = Annotated[bool, typer.Option("--json", help="The last line of stdout is one JSON object.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="hydra overrides, e.g. secure_aggregation=plain")]


def chaos_command(
        overrides: Overrides = None,
        seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything that goes wrong.")] = 0,
        rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds to be done; void ones come on top.")] = 50,
        history: Annotated[int, typer.Option("--history", min=0, help="The first one to play.")] = 0,
        only: Annotated[str | None, typer.Option("--only", help="Labels of the faults that may strike, or none.")] = None,
        shrink: Annotated[bool, typer.Option("--shrink/--no-shrink", help="Leave out faults that a violation doesn't "
                                             "take.")] = True,
        as_json: Json = False) -> None:
    """Faults drawn from a seed, over the code of real rounds; what must hold is checked after every step."""
    import warnings

    from privacy.errors import CheckFailed
    from simulations.chaos import chaos

    warnings.simplefilter("ignore")
    say = typer.echo if not as_json else lambda text: None
    found = chaos(seed, rounds, overrides or [], first=history, only=None if only is None else set(only.split(",")),
                  shrink=shrink, say=say)
    cli_edge.emit(found.as_dict(), as_json, f"seed {seed}: {found.rounds} rounds done, {found.void} attempts void, "
                                            f"{found.faults.total()} faults, {len(found.violations)} violations")
    if found.replay is None:
        return
    typer.echo("\n".join(["", *(f"{v.rule} ({v.where}): {v.what}" for v in found.violations),
                          f"Replay: {found.replay['command']}"]), err=True)
    if as_json:
        raise typer.Exit(CheckFailed.exit_code)
    raise CheckFailed("chaos.violation", f"Rule {found.violations[0].rule} was violated under seed {seed}.",
                      f"Replay it: {found.replay['command']}")
