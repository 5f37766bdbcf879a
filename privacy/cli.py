"""`fl-privacy`: what a budget costs, what was spent, and whether a run's evidence holds. Works in a base install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privacy.cli_edge import emit, run
from privacy.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from privacy.accountant import Release
    from privacy.ledger_chain import LedgerSummary

NEAR = 1e-3  # accountants of different versions may differ by that

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Budgets, ledgers and evidence.")
ledger_app = typer.Typer(add_completion=False, no_args_is_help=True, help="Read a site's ledger; nothing is changed.")
app.add_typer(ledger_app, name="ledger")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
LedgerFile = Annotated[Path, typer.Argument(metavar="PATH", help="A ledger, or an extract of one.",
                                            show_default=False)]
Certificate = Annotated[Path | None, typer.Option("--certificate", metavar="PEM",
                                                  help="The site's Ed25519 certificate: signatures are checked.")]


@app.command("account")
def account_command(q: Annotated[float, typer.Option("--q", help="Sampling probability, in (0, 1].")],
                    sigma: Annotated[float, typer.Option("--sigma", help="Noise multiplier, relative to the clip.")],
                    steps: Annotated[int, typer.Option("--steps", help="Noisy steps.", min=1)],
                    delta: Annotated[float, typer.Option("--delta", help="Delta of the guarantee.")],
                    group: Annotated[int, typer.Option("--group", min=1, help=(
                        "Sampled items that a privacy unit owns at most."))] = 1,
                    as_json: Json = False) -> None:
    """Epsilon of a Poisson-subsampled Gaussian under add/remove adjacency, rounded up.

    With the extras installed dp-accounting answers (for a group it takes a minute) and Opacus (PRV) and RDP cross-check
    where they can, which for a group they can't; otherwise the project's own.
    """
    from privacy import accountant, crosscheck
    from privacy.calibration import finite

    if not sigma > 0:
        raise UsageError("dp.parameter", f"sigma = {sigma} is not > 0.", "Set sigma > 0.")
    releases = [accountant.Release(q, sigma, steps, group)]
    total, name, cross = finite(accountant.epsilon(releases, delta)), accountant.NAME, None
    if crosscheck.available():
        total, name = crosscheck.pld(releases, delta), crosscheck.pld_name()
        cross = {"prv": _other(crosscheck.prv, releases, delta), "rdp": _other(crosscheck.rdp, releases, delta)}
    result = {"epsilon": accountant.round_up(total), "accountant": name, "cross_check": cross}
    rows: list[dict[str, object]] = [{"accountant": name, "epsilon": result["epsilon"], "delta": delta}]
    rows += [{"accountant": f"cross-check: {key}", "epsilon": value, "delta": delta}
             for key, value in (cross or {}).items()]
    emit(result, as_json, _table(rows))


@app.command("plan")
def plan_command(
        records: Annotated[int, typer.Option("--records", help="Declared units (records) of the site.", min=1)],
        rounds: Annotated[int, typer.Option("--rounds", help="Rounds, retries included.", min=1)],
        batch: Annotated[float | None, typer.Option("--batch", help="Expected batch: q = batch / records.")] = None,
        q: Annotated[float | None, typer.Option("--q", help="Sampling probability, instead of --batch.")] = None,
        local_steps: Annotated[int, typer.Option("--local-steps", help="Noisy steps a round.", min=1)] = 1,
        epsilon: Annotated[float | None, typer.Option("--epsilon", help="Budget: sigma is calibrated to it.")] = None,
        sigma: Annotated[float | None, typer.Option("--sigma", help="Noise multiplier: epsilon is told.")] = None,
        delta: Annotated[float | None, typer.Option(
            "--delta", help="Delta; default min(1e-5, 1 / (10 records)).")] = None,
        unit: Annotated[str, typer.Option("--unit", help="Who is protected: record, or person.")] = "record",
        k_max: Annotated[int | None, typer.Option("--k-max", help=(
            "With --unit person: records are sampled, at most so many of a person's. Without it persons are sampled "
            "whole, and --records counts persons."))] = None,
        as_json: Json = False) -> None:
    """What a budget buys, before any of it is spent.

    noise_to_signal is the standard deviation of the noise in one step's mean, along any one direction, as a fraction of
    the clip norm: sigma / (q * records). d parameters carry sqrt(d) times as much in all; T steps average it down by
    sqrt(T). epsilon_at has the same noise's epsilon at other deltas.
    """
    from privacy.calibration import plan

    if (batch is None) == (q is None):
        raise UsageError("cli.usage", "A plan needs --batch or --q, and not both.", "Give one of the two.")
    p = plan(records=records, q=q if q is not None else (batch or 0.0) / records, steps=rounds * local_steps,
             delta=delta, epsilon=epsilon, sigma=sigma, unit=unit, k_max=k_max)
    row = {key: value for key, value in p.as_dict().items() if key != "epsilon_at"}
    others = _table([{"delta": at, "epsilon": value} for at, value in p.epsilon_at.items()])
    emit(p.as_dict(), as_json, f"{_table([row])}\n{others}")


@ledger_app.command("show")
def show_command(path: LedgerFile, certificate: Certificate = None, as_json: Json = False) -> None:
    """Verify a ledger and print what was spent."""
    summary, torn = _load(path, certificate)
    committed = {c.reserve: c.executed_steps for c in summary.commits}
    rows: list[dict[str, object]] = [
        {"seq": r.seq, "run": r.run, "round": r.round, "attempt": r.attempt, "q": float(r.q), "sigma": float(r.sigma),
         "planned_steps": r.planned_steps, "executed_steps": committed.get(r.seq), "epsilon": float(r.epsilon)}
        for r in summary.reserves]
    jobs = [{"seq": e.seq, "run": e.run, "approver": e.approver} for e in summary.encumbrances]
    refusals: list[dict[str, object]] = [{"seq": r.seq, "run": r.run, "code": r.code, "what": r.what}
                                         for r in summary.refusals]
    result = _facts(summary, certificate, torn) | {"reserves": rows, "jobs": jobs, "refusals": refusals}
    refused = f"\n{_table(refusals)}" if refusals else ""
    emit(result, as_json, f"{_table(rows)}{refused}\n"
                          f"lineage {summary.lineage}: epsilon {summary.epsilon} of {summary.cap:g} at delta "
                          f"{summary.delta:g}, head {summary.head.seq} {summary.head.hash}")


@ledger_app.command("check")
def check_command(path: LedgerFile, certificate: Certificate = None, as_json: Json = False) -> None:
    """Verify the chain (and, with --certificate, the signatures) and recompute epsilon. Exit 1 when it doesn't hold.

    Whether the file is the newest one only the head tells: compare it with the one that others witnessed.
    """
    from privacy.accountant import epsilon, round_up

    summary, torn = _load(path, certificate)
    recomputed = None
    if not summary.commitments:  # other runs' parameters are hidden in an extract
        recomputed = round_up(epsilon((r.release for r in summary.reserves), summary.delta))
        if recomputed > float(summary.epsilon) + NEAR:
            raise CheckFailed("ledger.epsilon", f"The ledger states epsilon {summary.epsilon}, its own records make "
                              f"{recomputed}.", "Keep the file as evidence and ask the site what happened.")
    result = _facts(summary, certificate, torn) | {"ok": True, "recomputed": recomputed}
    emit(result, as_json, f"OK: {summary.head.seq + 1} records, epsilon {summary.epsilon} of {summary.cap:g}, "
                          f"head {summary.head.hash}" + ("" if certificate else "; signatures NOT checked"))


@app.command("verify")
def verify_command(bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a run's evidence.",
                                                          show_default=False)],
                   ca: Annotated[str | None, typer.Option("--ca", metavar="SHA256", help=(
                       "Fingerprint of the consortium's root, from outside the bundle."))] = None,
                   as_json: Json = False) -> None:
    """Verify a run's evidence offline: exit 0 for PASS only."""
    from privacy.verify import verify_bundle

    verdict = verify_bundle(bundle, ca)
    result = verdict.as_dict()
    steps = [f"{'ok  ' if step['ok'] else 'FAIL'} {step['name']}: {step['detail']}" for step in result["steps"]]
    emit(result, as_json, "\n".join([*steps, str(result["verdict"])]))
    if result["verdict"] != "PASS":
        raise typer.Exit(1)


@app.command("report")
def report_command(bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a run's evidence.",
                                                          show_default=False)],
                   out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the report goes.")],
                   ca: Annotated[str | None, typer.Option("--ca", metavar="SHA256",
                                                          help="Fingerprint of the consortium's root.")] = None,
                   audit: Annotated[Path | None, typer.Option("--audit", metavar="JSON", help=(
                       "What fl-simulate audit wrote; shown as no part of the signed evidence."))] = None,
                   attack: Annotated[Path | None, typer.Option("--attack", metavar="JSON", help=(
                       "What fl-simulate demo-attack wrote; shown likewise."))] = None,
                   as_json: Json = False) -> None:
    """Write the report of a run: one HTML file, and JSON beside it. A bundle that fails gives a page that says so."""
    from privacy.report import write_report

    extras = {name: path for name, path in (("audit", audit), ("attack", attack)) if path is not None}
    page = write_report(bundle, out, ca=ca, **extras)
    emit({"report": str(page)}, as_json, f"Report: {page}")


def _other(check: Callable[[list[Release], float], float], releases: list[Release], delta: float) -> float | None:
    """A cross-check rounded up, or None where that accountant gives up."""
    from privacy.accountant import round_up
    from privacy.calibration import finite

    try:
        return round_up(finite(check(releases, delta)))
    except (CheckFailed, UsageError):
        return None


def _load(path: Path, certificate: Path | None) -> tuple[LedgerSummary, bool]:
    """The verified ledger, and whether an unfinished line follows it (a running job's, or a crash's)."""
    from privacy.files import read_file
    from privacy.identity import load_certificate
    from privacy.ledger_chain import check_extract, split_lines

    data = read_file(path)
    _, end = split_lines(data)
    signer = None if certificate is None else load_certificate(read_file(certificate), certificate.name)
    return check_extract(data[:end], signer), end < len(data)


def _facts(summary: LedgerSummary, certificate: Path | None, torn: bool) -> dict[str, object]:
    return {"lineage": summary.lineage, "unit": summary.unit, "adjacency": summary.adjacency, "delta": summary.delta,
            "cap": summary.cap, "epsilon": float(summary.epsilon), "records": summary.head.seq + 1,
            "head": {"seq": summary.head.seq, "hash": summary.head.hash}, "commitments": summary.commitments,
            "signatures_checked": certificate is not None, "torn_line": torn}


def _table(rows: list[dict[str, object]]) -> str:
    """Rows as text, for people; hashes and ids are cut to 12 characters."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*(rows[0] if rows else ()))
    for row in rows:
        table.add_row(*("-" if value is None else _short(str(value)) for value in row.values()))
    console = Console()
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip("\n")


def _short(text: str) -> str:
    return text[:12] if len(text) in (32, 64) else text


def main() -> int:
    """The command line; returns the exit code."""
    return run(app)


if __name__ == "__main__":
    sys.exit(main())
