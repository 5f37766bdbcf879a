"""`fl-server`: make a contract, run a federation, look at a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from privacy import cli_edge

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The coordinator of a federation.")
contract_app = typer.Typer(no_args_is_help=True, help="What the sites of a run agree to.")
app.add_typer(contract_app, name="contract")
Json = Annotated[bool, typer.Option("--json", help="The last line of stdout is one JSON object.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="hydra overrides, e.g. privacy=none server.port=9443")]


@contract_app.command("create")
def create_command(out: Annotated[Path, typer.Option("--out", help="Where to write contract.json.")],
                   overrides: Overrides = None, as_json: Json = False) -> None:
    """Write the canonical contract of a configuration: digests, calibrated noise, the sites' certificates."""
    from conf import load_settings
    from fl_server.contracting import make_contract
    from privacy.ca import verify_roster
    from privacy.files import FileLayer, read_file
    from privacy.identity import Role
    from privacy.trust import TrustStore

    settings = load_settings(overrides or [])
    trust = TrustStore.load(Path(settings.server.certificates) / "trust")
    entries = verify_roster(read_file(Path(settings.server.roster)), trust)
    contract = make_contract(settings, {e.name: e.sign_fingerprint for e in entries if e.role is Role.SITE})
    FileLayer().write_atomic(out, contract.to_bytes())
    cli_edge.emit({"contract": contract.digest, "run": contract.run}, as_json, f"{out}: contract {contract.digest}")


@contract_app.command("sign")
def sign_command(contract: Annotated[Path, typer.Argument(help="The contract, as create wrote it.")],
                 keys: Annotated[Path, typer.Option("--keys", help="Folder of the engineer's keys.")],
                 certificates: Annotated[Path, typer.Option("--certificates", help="Folder of its certificates.")],
                 out: Annotated[Path, typer.Option("--out", help="Where to write the signature.")],
                 as_json: Json = False) -> None:
    """Sign a contract as its engineer; sites refuse one that nobody of the consortium's engineers has signed."""
    from privacy.contract import load_contract
    from privacy.files import FileLayer, read_file
    from privacy.identity import FileSigner
    from privacy.signing import check_signature, sign_contract
    from privacy.trust import TrustStore

    agreed = load_contract(read_file(contract))
    data = sign_contract(agreed, FileSigner(keys / "sign.key", certificates / "sign.pem"))
    engineer = check_signature(data, agreed, TrustStore.load(certificates / "trust"))
    FileLayer().write_atomic(out, data)
    cli_edge.emit({"contract": agreed.digest, "engineer": engineer.name}, as_json,
                  f"{out}: contract {agreed.digest} signed by {engineer.name}")


@app.command("run")
def run_command(overrides: Overrides = None, as_json: Json = False) -> None:
    """Listen for the contract's sites, run its rounds, write adapter, metrics, evidence and report."""
    from conf import load_settings
    from fl_server.serve import serve
    from privacy import guard

    guard.check()
    metrics = serve(load_settings(overrides or []), plain=as_json)
    cli_edge.emit(metrics, as_json, "")


@app.command("resume")
def resume_command(
        overrides: Annotated[list[str] | None, typer.Argument(help="hydra overrides, those of the run")] = None,
        as_json: Json = False) -> None:
    """Go on with a run whose coordinator was killed: rounds that were stated count, the one under way is void."""
    from conf import load_settings
    from fl_server.serve import serve
    from privacy import guard

    guard.check()
    cli_edge.emit(serve(load_settings(overrides or []), plain=as_json, resume=True), as_json, "")


@app.command("status")
def status_command(folder: Annotated[Path, typer.Argument(help="Output folder of a run.")], as_json: Json = False) -> None:
    """Rounds done and void, whose updates are in each sum, and why sites fell out, from the coordinator's journal."""
    from fl_server.journal import status

    found: dict[str, Any] = status(folder / "journal.jsonl")
    lines = [f"run {found['run']}: {found['state']}, {found['rounds_done']} of {found['rounds_planned']} rounds done"]
    for r in found["rounds"]:
        what = f"sum of {', '.join(r['sites'])}" if r["outcome"] == "done" else f"void ({r['reason']})"
        lost = f"; lost: {', '.join(r['lost'])}" if r["lost"] else ""
        lines.append(f"  round {r['round']}, attempt {r['attempt']}: {what}{lost}")
    cli_edge.emit(found, as_json, "\n".join(lines))


@app.command("control")
def control_command(store: Annotated[Path, typer.Argument(help="Folder of what is served (docs/control-plane.md).")],
                    keys: Annotated[Path, typer.Option("--keys", help="Folder with tls.key.")] = Path("keys"),
                    certificates: Annotated[Path, typer.Option(
                        "--certificates", help="Folder with tls.pem and trust/.")] = Path("certificates"),
                    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
                    port: Annotated[int, typer.Option("--port", help="For holders of certificates.")] = 8444,
                    enrol_port: Annotated[int | None, typer.Option(
                        "--enrol-port", help="For applicants; left out: no enrolment.")] = None,
                    as_json: Json = False) -> None:
    """Serve roster, contracts, evidence, adapters and enrolment until stopped."""
    import signal
    import threading

    from fl_server.control import ControlServer
    from fl_server.control_store import ControlStore
    from privacy import guard

    guard.check()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with ControlServer(ControlStore(store), certificate=certificates / "tls.pem", key=keys / "tls.key",
                       trust=certificates / "trust", host=host, port=port, enrol_port=enrol_port) as control:
        ports = {"port": control.port, "enrol_port": control.enrol_port}
        cli_edge.emit(ports, as_json, f"control plane on {host}:{control.port}, enrolment on {control.enrol_port or 'none'}")
        stop.wait()


def main() -> int:
    """Entry point of `fl-server`."""
    return cli_edge.run(app)


if __name__ == "__main__":
    raise SystemExit(main())
