"""`fl-ca`: the consortium's certificate authority, on a machine that is not the coordinator's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from privacy.cli_edge import emit, run
from privacy.errors import UsageError
from privacy.files import FileLayer, read_file, write_private
from privacy.identity import CERTIFICATE_DAYS, Role

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The consortium's certificate authority.")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The CA's folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command("init")
def init_command(folder: Folder,
                 organisation: Annotated[str, typer.Option("--organisation", help="Name of the consortium.")],
                 days: Annotated[int, typer.Option("--days", help="Validity of the CAs.")] = 1825,
                 as_json: Json = False) -> None:
    """Make the root and one issuing CA per role."""
    from privacy import ca

    root = ca.init(folder, organisation, days=days)
    emit({"ca": root, "folder": str(folder)}, as_json,
         f"CA made in {folder}. Tell every member this fingerprint by another way (ca.sha256):\n{root}")


@app.command("token")
def token_command(folder: Folder,
                  name: Annotated[str, typer.Option("--name", help="The site, such as hospital-a.")],
                  organisation: Annotated[str, typer.Option("--organisation", help="Its organisation.")],
                  out: Annotated[Path, typer.Option("--out", help="New file for the token, which is secret.")],
                  days: Annotated[int, typer.Option("--days", help="Until when it can be used.")] = 7,
                  as_json: Json = False) -> None:
    """Make a token with which one site enrols, once; hand the file over by a way that the coordinator can't read."""
    from privacy import ca_enrol

    token, expires = ca_enrol.make_token(folder, name, organisation, days=days)
    write_private(out, token.text())
    emit({"token": token.id, "name": name, "expires": expires.isoformat(), "out": str(out)}, as_json,
         f"Token {token.id} for {name}, until {expires:%Y-%m-%d %H:%M} UTC: {out}")


@app.command("issue")
def issue_command(folder: Folder,
                  request: Annotated[Path | None, typer.Option(
                      "--request", help="The applicant's request.json, carried by a way that you trust.")] = None,
                  enrolment: Annotated[Path | None, typer.Option(
                      "--enrolment", help="In place of --request: what came through the coordinator.")] = None,
                  role: Annotated[Role | None, typer.Option("--role", help="With --request: what it may be.")] = None,
                  host: Annotated[list[str] | None, typer.Option("--host", help="Host of a coordinator.")] = None,
                  days: Annotated[int, typer.Option("--days", help="Validity.")] = CERTIFICATE_DAYS,
                  as_json: Json = False) -> None:
    """Certify a request. Check by another way that a --request comes from whom it names; an --enrolment proves it."""
    from privacy import ca, ca_enrol

    if request is not None and role is not None and enrolment is None:
        issued = ca.issue(folder, read_file(request), role, days=days, hosts=host or ())
        what = issued.folder
    elif enrolment is not None and request is None and role is None:
        issued = ca_enrol.issue(folder, read_file(enrolment), days=days, hosts=host or ())
        what = issued.folder / ca_enrol.ANSWER
    else:
        raise UsageError("cli.usage", "Neither --request with --role was given, nor --enrolment without them.",
                         "Give one of the two.")
    emit({"name": issued.name, "organisation": issued.organisation, "role": issued.role, "folder": str(issued.folder),
          "tls": issued.tls_fingerprint, "sign": issued.sign_fingerprint}, as_json,
         f"Certified {issued.name} ({issued.organisation}) as {issued.role}. Hand over {what}")


@app.command("revoke")
def revoke_command(folder: Folder, name: Annotated[str, typer.Option("--name", help="Whose certificates.")],
                   as_json: Json = False) -> None:
    """Revoke all certificates of a name."""
    from privacy import ca

    count = ca.revoke(folder, name)
    emit({"name": name, "revoked": count}, as_json,
         f"Revoked {count} certificates. Hand the crl-*.pem of {folder} to every member")


@app.command("roster")
def roster_command(folder: Folder,
                   out: Annotated[Path | None, typer.Option("--out", help="Write the signed roster here.")] = None,
                   as_json: Json = False) -> None:
    """Renew the revocation lists (good for 30 days) and write the signed roster: who takes part, with certificates."""
    from privacy import ca
    from privacy.trust import TrustStore

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


if __name__ == "__main__":
    raise SystemExit(main())
