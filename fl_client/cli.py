"""`fl-client`: the site operator's tool."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from privacy import cli_edge

app = typer.Typer(no_args_is_help=True, add_completion=False, help="One site of a federation.")
Json = Annotated[bool, typer.Option("--json", help="The last line of stdout is one JSON object.")]


@app.callback()
def group() -> None:
    """One site of a federation."""


@app.command("csr")
def csr_command(folder: Annotated[Path, typer.Argument(help="New folder for the keys, which never leave it.")],
                name: Annotated[str, typer.Option("--name", help="Name of the site, such as hospital-a.")],
                organisation: Annotated[str, typer.Option("--organisation", help="Its organisation.")],
                as_json: Json = False) -> None:
    """Make this site's keys and a request for certificates, to be carried to the consortium's CA."""
    from privacy.identity import create_request

    create_request(folder, name, organisation)
    cli_edge.emit({"request": str(folder / "request.json")}, as_json, f"Send {folder / 'request.json'} to the CA.")


Url = Annotated[str, typer.Option("--url", help="The coordinator's enrolment port: https://host:port.")]
Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait for the CA's operator; it can be repeated.")]
Proxy = Annotated[str | None, typer.Option("--proxy", help="http://host:port; default: HTTPS_PROXY.")]


@app.command("enroll")
def enroll_command(token_file: Annotated[Path, typer.Option(
                       "--token-file", help="What the CA handed over (mode 0600), or - for stdin.")],
                   ca: Annotated[str, typer.Option("--ca-fingerprint", help="SHA-256 of the root, from the CA.")],
                   url: Url,
                   name: Annotated[str, typer.Option("--name", help="Name of the site, such as hospital-a.")],
                   organisation: Annotated[str, typer.Option("--organisation", help="Its organisation.")],
                   folder: Annotated[Path, typer.Option("--folder", help="For keys, which never leave it, and "
                                                        "certificates.")] = Path("keys"),
                   wait: Wait = 600.0, proxy: Proxy = None, as_json: Json = False) -> None:
    """Make this site's keys, ask the CA for certificates through the coordinator, and install them."""
    from fl_client.enrol import enroll
    from privacy.enrol import MAX_TOKEN_BYTES, Token
    from privacy.trust_files import parse_fingerprint

    token = Token.parse(sys.stdin.buffer.readline(MAX_TOKEN_BYTES)) if str(token_file) == "-" else Token.read(token_file)
    enroll(url, token, parse_fingerprint(ca), folder, name, organisation, wait_s=wait, proxy=proxy)
    cli_edge.emit({"folder": str(folder), "name": name}, as_json, f"Certificates of {name} are in {folder}.")


@app.command("renew")
def renew_command(url: Url,
                  folder: Annotated[Path, typer.Option("--folder", help="Keys and certificates.")] = Path("keys"),
                  wait: Wait = 600.0, proxy: Proxy = None, as_json: Json = False) -> None:
    """Replace the certificates and the TLS key, between runs: a contract names the certificate that it was made with."""
    from fl_client.enrol import renew

    renew(url, folder, wait_s=wait, proxy=proxy)
    cli_edge.emit({"folder": str(folder)}, as_json, f"New certificates are in {folder}.")


@app.command("register")
def register_command(
        overrides: Annotated[list[str] | None, typer.Argument(help="hydra overrides, as for run")] = None,
        as_json: Json = False) -> None:
    """Add this site's present data to its lineage: they share what is left of the lineage's budget."""
    from conf import load_settings
    from fl_client.agent import register_data

    register_data(load_settings(overrides or []))
    cli_edge.emit({"registered": True}, as_json, "Registered, and recorded in the ledger.")


@app.command("approve")
def approve_command(
        overrides: Annotated[list[str] | None, typer.Argument(help="hydra overrides, as for run")] = None,
        approver: Annotated[str, typer.Option("--approver", help="Who agrees; default: the policy's.")] = "",
        yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,
        as_json: Json = False) -> None:
    """Show what a contract means for this site, in plain words, and record that it is agreed to. Nothing is spent."""
    from conf import load_settings
    from fl_client.agent import LEDGER, Papers
    from fl_client.approval import approve, describe, hand_in, summary
    from privacy.files import read_file

    site = load_settings(overrides or []).site
    papers = Papers.load(site)
    text = describe(papers.contract, site.name, papers.policy, engineer=papers.engineer.name,
                    ledger=summary(Path(site.state) / LEDGER, papers.signer))
    typer.echo(text, err=as_json)
    if not yes and not typer.confirm(f"Approve it for {site.name}?", err=True):
        cli_edge.emit({"approved": False}, as_json, "Not approved; nothing was recorded.")
        raise typer.Exit(3)
    path = approve(papers.contract, site.name, papers.policy, papers.signer, Path(site.state),
                   approver=approver or papers.policy.approver, signature=read_file(Path(site.signature)))
    code = hand_in(site, papers.contract, path) if site.control_url else None
    cli_edge.emit({"approved": True, "contract": papers.contract.digest, "sent": bool(site.control_url) and code is None,
                   "code": code}, as_json, "Approved, and recorded." + (
                       f" The coordinator doesn't know yet ({code}): approve again when it can be reached." if code else ""))


evidence = typer.Typer(no_args_is_help=True, help="What this site can show its own auditor.")
app.add_typer(evidence, name="evidence")


@evidence.command("export")
def export_command(overrides: Annotated[list[str] | None, typer.Argument(help="hydra overrides, as for run")] = None,
                   out: Annotated[Path, typer.Option("--out", help="New folder.")] = Path("evidence"),
                   as_json: Json = False) -> None:
    """Write this site's own evidence: the whole ledger, contracts, approvals, what it signed; all jobs of the lineage."""
    from conf import load_settings
    from fl_client.evidence import export

    export(load_settings(overrides or []).site, out)
    cli_edge.emit({"bundle": str(out)}, as_json, f"{out}: check it with fl-privacy verify {out} --ca SHA256")


@app.command("withdraw")
def withdraw_command(overrides: Annotated[list[str] | None, typer.Argument(help="hydra overrides, as for run")] = None,
                     approver: Annotated[str, typer.Option("--approver", help="Who withdraws; default: the policy's.")] = "",
                     yes: Annotated[bool, typer.Option("--yes", help="Withdraw without asking.")] = False,
                     out: Annotated[Path, typer.Option("--out", help="For the signed statement.")] = Path("withdrawal.json"),
                     as_json: Json = False) -> None:
    """Leave a contract (stop the agent first). What was released stays released, what was spent stays spent."""
    from conf import load_settings
    from fl_client.evidence import withdraw
    from privacy.files import FileLayer

    site = load_settings(overrides or []).site
    if not yes and not typer.confirm(f"Withdraw {site.name} from the contract in {site.contract}?", err=True):
        cli_edge.emit({"withdrawn": False}, as_json, "Not withdrawn; nothing was recorded.")
        raise typer.Exit(3)
    FileLayer().write_atomic(out, withdraw(site, approver))
    cli_edge.emit({"withdrawn": True, "statement": str(out)}, as_json,
                  f"Withdrawn, and recorded. Send {out} to the coordinator's operator.")


@app.command("doctor")
def doctor_command(overrides: Annotated[list[str] | None, typer.Argument(help="hydra overrides, as for run")] = None,
                   as_json: Json = False) -> None:
    """Check all that this site needs to run: keys, clock, route, disk, device, sandbox, contract, model, data, budget."""
    from conf import load_settings
    from fl_client.doctor import Doctor

    found = list(Doctor(load_settings(overrides or [])).examine())
    cli_edge.emit({"ok": all(f.ok for f in found), "checks": [asdict(f) for f in found]}, as_json, "\n".join(
        f"{'ok  ' if f.ok else 'FAIL'} {f.name:<13} {f.detail}" + (f"\n     {f.code}. Mend: {f.mend}" if f.code else "")
        for f in found))
    if not all(f.ok for f in found):
        raise typer.Exit(1)


@app.command("estimate")
def estimate_command(contract: Annotated[Path, typer.Argument(help="The contract; it need not be approved yet.")],
                     overrides: Annotated[list[str] | None, typer.Argument(
                         help="hydra overrides, e.g. site.name=hospital-a site.physical_batch=32")] = None,
                     as_json: Json = False) -> None:
    """Measure memory, time and traffic of a contract's training on this machine, on synthetic records. Nothing is spent."""
    from conf import load_settings
    from fl_client.estimate import estimate
    from privacy.contract import load_contract
    from privacy.files import read_file

    settings = load_settings(overrides or [])
    site = settings.site
    if site.threads:
        import torch

        torch.set_num_threads(site.threads)
    found = estimate(load_contract(read_file(contract)), site.name, Path(settings.model.path), site.compute)
    cli_edge.emit(found.as_dict(), as_json, found.render())
    if not found.fits:
        raise typer.Exit(1)


@app.command("run")
def run_command(
        overrides: Annotated[list[str] | None, typer.Argument(help="hydra overrides, e.g. site.data=mine.csv")] = None,
        as_json: Json = False) -> None:
    """Accept the contract against this site's policy, then serve the coordinator until stopped."""
    from conf import load_settings
    from fl_client.agent import Agent
    from fl_client.logs import audit, configure
    from privacy import guard

    guard.check()
    settings, stop = load_settings(overrides or []), threading.Event()
    configure(Path(settings.site.state))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    agent = Agent(settings)
    audit("start", contract=agent.contract.digest)
    agent.run(stop)
    audit("stop")
    cli_edge.emit({"stopped": True}, as_json, "stopped")


def main() -> int:
    """Entry point of `fl-client`."""
    return cli_edge.run(app)


if __name__ == "__main__":
    raise SystemExit(main())
