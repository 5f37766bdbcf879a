"""The edge that every command-line tool shares: exit codes, one line of error, one line of JSON.

Guarantees: the exit codes of the error tree and no others (click's own errors are 2, an interrupt is 130); no traceback
and no text of a foreign exception, unless CONSILO_DEBUG=1; with --json the last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click
import typer

from privacy.errors import ConsiloError, UsageError


def run(app: typer.Typer, argv: Sequence[str] | None = None) -> int:
    """Run a typer app and return its exit code. argv: without the program's name; default: the command line.

    A command reports failure by an error of privacy.errors, or, after `emit`, by `typer.Exit(code)`.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        result = typer.main.get_command(app).main(args, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except ConsiloError as e:
        error = e
    except click.exceptions.NoArgsIsHelpError:
        error = UsageError("cli.usage", "No command was given.", "--help lists the commands.")
    except click.ClickException as e:
        error = UsageError("cli.usage", e.format_message(), "--help shows how to use the command.")
    except click.Abort:
        return 130
    except Exception as e:  # noqa: BLE001 - the last resort: a bug must not print what it holds
        if os.environ.get("CONSILO_DEBUG") == "1":
            traceback.print_exc()
        if isinstance(e, OSError) and e.filename is not None:
            error = UsageError("file.io", f"A file operation failed: {e.strerror}.",
                               "Check the paths, their permissions and the free space.")
        else:
            error = ConsiloError("internal.bug", f"An unexpected {type(e).__name__} occurred.",
                                 "Report it; CONSILO_DEBUG=1 shows the traceback, which may hold private data.")
    if "--json" in args:
        emit(error.as_dict(), True, "")
    else:
        typer.echo(" ".join(str(error).split()), err=True)
    return error.exit_code


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a result: the JSON object on one line, or the text. Flushed, so that nothing of this process follows it.

    Raises ValueError for NaN and infinity.
    """
    typer.echo(json.dumps(result, sort_keys=True, allow_nan=False) if as_json else text)
    sys.stdout.flush()
