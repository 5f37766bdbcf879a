"""`fl-simulate bench`: measurements on this machine, each beside its baseline. Heavy modules are imported by the command
that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from privacy import cli_edge
from simulations.bench import rounded

app = typer.Typer(no_args_is_help=True, help="Measurements on this machine, each beside its baseline.")
Json = Annotated[bool, typer.Option("--json", help="The last line of stdout is one JSON object.")]


@app.command("secagg")
def secagg_command(
        sites: Annotated[int, typer.Option(min=3, max=100, help="Size of the cohort.")] = 16,
        dim: Annotated[int, typer.Option(min=1, max=2**26, help="Values in an update.")] = 1_000_000,
        drop: Annotated[int, typer.Option(min=0, help="Sites that vanish once they are asked for masked vectors.")] = 2,
        ring: Annotated[int, typer.Option(help="32 or 16: bits of a word.")] = 32,
        repeats: Annotated[int, typer.Option(min=1, help="Interleaved repetitions; medians are reported.")] = 5,
        threads: Annotated[int, typer.Option(min=1, help="Threads of the mask generator where it is measured alone.")] = 1,
        seed: Annotated[int, typer.Option(help="Of the updates.")] = 1,
        as_json: Json = False) -> None:
    """Secure aggregation: client, server, bytes and error, beside plain Flower, SecAgg+ and TenSEAL.

    Exits with 1 if a sum is not exact.
    """
    from simulations.bench_secagg import most_drops, render, run

    if ring not in (16, 32):
        raise typer.BadParameter("--ring is 16 or 32.")
    if drop > most_drops(sites):
        raise typer.BadParameter(f"--drop is at most {most_drops(sites)} for {sites} sites; more voids the round.")
    found = run(sites=sites, dim=dim, drop=drop, ring=ring, repeats=repeats, threads=threads, seed=seed)
    cli_edge.emit(rounded(found), as_json, render(found))
    if not found["exact"]:
        raise typer.Exit(1)


@app.command("round")
def round_command(
        sites: Annotated[int, typer.Option(min=3, max=32, help="Size of the cohort, a process each.")] = 4,
        dim: Annotated[int, typer.Option(min=1, max=2**26, help="Values in an update.")] = 1_000_000,
        rounds: Annotated[int, typer.Option(min=1, help="Rounds with masks, without, and of stock Flower, each.")] = 5,
        as_json: Json = False) -> None:
    """A whole round without training: real processes over mutual TLS on loopback, beside masks off and stock Flower.

    Exits with 1 if a mean is wrong.
    """
    from simulations.bench_round import render, run

    found = run(sites=sites, dim=dim, rounds=rounds)
    cli_edge.emit(rounded(found), as_json, render(found))
    if not found["exact"]:
        raise typer.Exit(1)


@app.command("dp-step")
def dp_step_command(
        model: Annotated[str, typer.Option(help="minilm, llama-like or smollm2: sizes; weights are random.")] = "minilm",
        batch: Annotated[int | None, typer.Option(min=1, help="Records in a step; the model's own by default.")] = None,
        length: Annotated[int | None, typer.Option(min=2, max=512, help="Tokens of a record; as above.")] = None,
        rank: Annotated[int, typer.Option(min=1, max=256, help="LoRA's r.")] = 8,
        repeats: Annotated[int, typer.Option(min=1, help="Interleaved repetitions; medians are reported.")] = 15,
        threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
        seed: Annotated[int, typer.Option(help="Of weights and records.")] = 1,
        as_json: Json = False) -> None:
    """A private LoRA step by the fused engine, beside a plain step, Opacus' hooks and its ghost clipping.

    Exits with 1 if a record's norm is off.
    """
    from simulations.bench_dp_models import SHAPES
    from simulations.bench_dp_step import render, run

    if model not in SHAPES:
        raise typer.BadParameter(f"--model is {', '.join(SHAPES)}.")
    found = run(model=model, batch=batch or SHAPES[model].batch, length=length or SHAPES[model].length, rank=rank,
                repeats=repeats, threads=threads, seed=seed)
    cli_edge.emit(rounded(found), as_json, render(found))
    if not found["exact"]:
        raise typer.Exit(1)


@app.command("rules")
def rules_command(
        overrides: Annotated[list[str] | None, typer.Argument(help="hydra overrides, as for `run`.")] = None,
        rules: Annotated[list[str] | None, typer.Option("--rule", help="A name, perhaps with overrides of its own after it: "
                                                        "'krum rule.byzantine=0'. All by default.")] = None,
        seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ..; means are reported.")] = 3,
        keep: Annotated[Path | None, typer.Option(help="JSON lines of runs that are done, which aren't repeated.")] = None,
        threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
        as_json: Json = False) -> None:
    """Aggregation rules side by side on a text classification task, with the configuration's privacy."""
    import warnings

    from simulations.bench_rules import render, run
    from strategies.rules import RULES

    warnings.simplefilter("ignore")
    found = run(overrides or [], rules=rules or list(RULES), seeds=range(seeds), keep=keep, threads=threads,
                say=lambda line: typer.echo(line, err=True))
    cli_edge.emit(rounded(found), as_json, render(found))


@app.command("scale")
def scale_command(
        sites: Annotated[int, typer.Option(min=3, max=10_000, help="More than 64 are summed in groups.")] = 64,
        dim: Annotated[int, typer.Option(min=1, max=2**26, help="Values in an update.")] = 1_000_000,
        network: Annotated[bool, typer.Option("--network", help="Mutual TLS on loopback in place of a pipe.")] = False,
        as_json: Json = False) -> None:
    """The coordinator's memory and CPU with so many simulated sites, beside the same with 8.

    Exits with 1 if a mean is wrong.
    """
    from simulations.bench_scale import render, run

    found = run(sites=sites, dim=dim, network=network)
    cli_edge.emit(rounded(found), as_json, render(found))
    if not found["exact"]:
        raise typer.Exit(1)


@app.command("strategies")
def strategies_command(
        silos: Annotated[int, typer.Option(min=1, max=64)] = 8,
        classes: Annotated[int, typer.Option(min=1, max=8, help="Classes that a silo holds under label skew, of 8.")] = 2,
        rank: Annotated[int, typer.Option(min=1, max=128, help="LoRA's r.")] = 4,
        epsilon: Annotated[float | None, typer.Option(help="For the whole run, at each silo; without it no DP.")] = None,
        seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ..; means are reported.")] = 3,
        rules: Annotated[list[str] | None, typer.Option("--rule", help="One or more; all by default.")] = None,
        sweep: Annotated[bool, typer.Option("--sweep", help="Also against skew, rank and epsilon.")] = False,
        keep: Annotated[Path | None, typer.Option(help="JSON lines of runs that are done, which aren't repeated.")] = None,
        threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
        as_json: Json = False) -> None:
    """Every aggregation rule on skewed and on alike silos: a frozen layer with LoRA on sentence vectors, 8 classes."""
    from simulations.bench_strategies import render, run
    from simulations.bench_strategies_task import Task
    from strategies.rules import RULES, rule

    task = Task(silos=silos, classes=classes, rank=rank, epsilon=epsilon)
    if not task.covered:
        raise typer.BadParameter("--silos times --classes is at least 8, so that every class is at some silo.")
    chosen = [rule(name, secure=False).name for name in rules or RULES]
    found = run(task, rules=chosen, seeds=range(seeds), sweep=sweep, keep=keep, threads=threads,
                say=lambda line: typer.echo(line, err=True))
    cli_edge.emit(rounded(found), as_json, render(found))


@app.command("strategies-figure")
def strategies_figure_command(
        result: Annotated[Path, typer.Argument(help="The JSON object that `bench strategies --sweep --json` printed.")],
        out: Annotated[Path, typer.Argument(help="SVG file to write.")]) -> None:
    """Draw the rules against skew, rank and epsilon. The same result gives the same bytes."""
    from privacy.canonical import parse
    from privacy.files import FileLayer, read_file
    from simulations.bench_strategies_plot import figure

    FileLayer().write_atomic(out, figure(parse(read_file(result))).encode())


@app.command("growth")
def growth_command(
        quick: Annotated[bool, typer.Option("--quick", help="Sizes that only show that it works.")] = False,
        as_json: Json = False) -> None:
    """The coordinator's memory, CPU and files against sites, parameters and rounds.

    Exits with 1 if a mean is wrong or the run stops early.
    """
    from simulations.bench_growth import QUICK, Sizes, render, run

    found = run(QUICK if quick else Sizes())
    cli_edge.emit(rounded(found), as_json, render(found))
    if not found["exact"]:
        raise typer.Exit(1)


@app.command("growth-figure")
def growth_figure_command(
        result: Annotated[Path, typer.Argument(help="The JSON object that `bench growth --json` printed.")],
        out: Annotated[Path, typer.Argument(help="SVG file to write.")]) -> None:
    """Draw the curves of growth. The same result gives the same bytes."""
    from privacy.canonical import parse
    from privacy.files import FileLayer, read_file
    from simulations.bench_growth_plot import figure

    FileLayer().write_atomic(out, figure(parse(read_file(result))).encode())


@app.command("nvflare")
def nvflare_command(
        sites: Annotated[int, typer.Option(min=2, max=64, help="A process each.")] = 8,
        dim: Annotated[int, typer.Option(min=1, max=2**26, help="Values in an update.")] = 1_000_000,
        rounds: Annotated[int, typer.Option(min=1, help="The first isn't counted where there are more.")] = 3,
        python: Annotated[str | None, typer.Option(envvar="NVFLARE_PYTHON", help="Of an environment that has NVFlare; "
                                                   "default: this one.")] = None,
        as_json: Json = False) -> None:
    """The baseline of `scale --network`: FedAvg in NVFlare's own simulator, where it is installed.

    Exits with 1 if a mean is wrong.
    """
    from simulations.bench_nvflare import render, run

    found = run(sites=sites, dim=dim, rounds=rounds, python=python)
    cli_edge.emit(rounded(found), as_json, render(found))
    if found["exact"] is False:
        raise typer.Exit(1)


@app.command("all")
def all_command(
        out: Annotated[Path, typer.Option(help="Folder of results.json and index.html.")] = Path("outputs/bench"),
        quick: Annotated[bool, typer.Option("--quick", help="Sizes that only show that it works.")] = False,
        only: Annotated[list[str] | None, typer.Option("--only", help="Names of parts; all by default.")] = None,
        nvflare: Annotated[str | None, typer.Option(envvar="NVFLARE_PYTHON", help="As `bench nvflare --python`.")] = None,
        as_json: Json = False) -> None:
    """Every bench into one results file and one page. Takes up to half an hour.

    Exits with 1 if a result is wrong or a bench fails, never because it is slow.
    """
    from simulations.bench_all import PARTS, failed, run

    if unknown := sorted(set(only or ()) - {part.name for part in PARTS}):
        raise typer.BadParameter(f"--only {unknown[0]!r} is none of {', '.join(part.name for part in PARTS)}.")
    done = run(out, quick=quick, only=only or (), nvflare=nvflare, say=lambda line: typer.echo(line, err=True))
    bad = failed(done)
    cli_edge.emit({"page": str(out / "index.html"), "results": str(out / "results.json"), "failed": bad}, as_json,
                  f"{out / 'index.html'}" + (f"; not right: {', '.join(bad)}" if bad else ""))
    if bad:
        raise typer.Exit(1)
