"""`fl-ca`: the consortium's certificate authority, on a machine that is not the coordinator's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from privacy import ca
from privacy.cli_edge import emit, run
from privacy.files import FileLayer, read_file
from privacy.identity import Role, TrustStore

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The consortium's certificate authority.")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The CA's folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command("init")
def init_command(folder: Folder,
                 organisation: Annotated[str, typer.Option("--organisation", help="Name of the consortium.")],
                 days: Annotated[int, typer.Option("--days", help="Validity of the CAs.")] = 1825,
                 as_json: Json = False) -> None:
    """Make the root and one issuing CA per role."""
    root = ca.init(folder, organisation, days=days)
    emit({"ca": root, "folder": str(folder)}, as_json,
         f"CA made in {folder}. Tell every member this fingerprint by another way (ca.sha256):\n{root}")


@app.command("issue")
def issue_command(folder: Folder,
                  request: Annotated[Path, typer.Option("--request", help="The applicant's request.json.")],
                  role: Annotated[Role, typer.Option("--role", help="What the applicant may be.")],
                  host: Annotated[list[str] | None, typer.Option("--host", help="Host of a coordinator.")] = None,
                  days: Annotated[int, typer.Option("--days", help="Validity.")] = 365,
                  as_json: Json = False) -> None:
    """Certify a request; check by another way that it comes from whom it names."""
    issued = ca.issue(folder, read_file(request), role, days=days, hosts=host or ())
    emit({"name": issued.name, "organisation": issued.organisation, "role": role, "folder": str(issued.folder),
          "tls": issued.tls_fingerprint, "sign": issued.sign_fingerprint}, as_json,
         f"Certified {issued.name} ({issued.organisation}) as {role}. Hand over the folder {issued.folder}")


@app.command("revoke")
def revoke_command(folder: Folder, name: Annotated[str, typer.Option("--name", help="Whose certificates.")],
                   as_json: Json = False) -> None:
    """Revoke all certificates of a name."""
    count = ca.revoke(folder, name)
    emit({"name": name, "revoked": count}, as_json,
         f"Revoked {count} certificates. Hand the crl-*.pem of {folder} to every member")


@app.command("roster")
def roster_command(folder: Folder,
                   out: Annotated[Path | None, typer.Option("--out", help="Write the signed roster here.")] = None,
                   as_json: Json = False) -> None:
    """Renew the revocation lists (good for 30 days) and write the signed roster: who takes part, with certificates."""
    ca.refresh_crls(folder)
    data = ca.roster(folder)
    entries = ca.verify_roster(data, TrustStore.load(folder))
    if out is not None:
        FileLayer().write_atomic(out, data)
    emit({"entries": [{"name": e.name, "organisation": e.organisation, "role": e.role, "tls": e.tls_fingerprint,
                       "sign": e.sign_fingerprint} for e in entries], "out": str(out or "")}, as_json,
         "\n".join(f"{e.role:<12} {e.name}  {e.organisation}  sign {e.sign_fingerprint}" for e in entries))


def main() -> int:
    return run(app)
