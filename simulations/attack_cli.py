"""`fl-simulate demo-attack`: the command around `simulations.attack` and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from privacy import cli_edge


def demo_attack_command(
        overrides: Annotated[list[str] | None, typer.Argument(help="hydra overrides, e.g. privacy.epsilon=3")] = None,
        text: Annotated[str | None, typer.Option("--text", help="The victim's sentence, about ten words; it is written to "
                                                 "the output. Default: a made-up one.")] = None,
        seeds: Annotated[int, typer.Option(min=1, max=20, help="Adapters to attack, from seed on.")] = 3,
        out: Annotated[Path, typer.Option("--out", help="Output folder.")] = Path("outputs/attack"),
        as_json: Annotated[bool, typer.Option("--json", help="The last line of stdout is one JSON object.")] = False,
) -> None:
    """Read a sentence out of a site's update, without and with differential privacy: attack.html and attack.json."""
    import warnings

    from privacy.files import FileLayer
    from simulations.attack import TEXT, attack
    from simulations.attack_page import page

    warnings.simplefilter("ignore")
    document = attack(TEXT if text is None else text, overrides or [], seeds=range(seeds),
                      say=lambda line: typer.echo(line, err=True))
    out.mkdir(parents=True, exist_ok=True)
    FileLayer().write_atomic(out / "attack.json", (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    FileLayer().write_atomic(out / "attack.html", page(document).encode())
    found: dict[str, Any] = {name: document["scenarios"][name]["rate"] for name in ("plain", "noise")}
    cli_edge.emit({"without_dp": found["plain"], "with_dp": found["noise"], "page": str(out / "attack.html")}, as_json,
                  f"tokens read without DP {found['plain']:.0%}, with DP {found['noise']:.0%} (this attack, this text); "
                  f"{out}/attack.html")
