"""Commands and what becomes of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sparsekern._version import __version__
from sparsekern.cli.plan import plan_command
from sparsekern.cli.prune import prune_command
from sparsekern.cli.recipes import recipes_command
from sparsekern.cli.report import report_command
from sparsekern.cli.slim import slim_command
from sparsekern.cli.study import study_app
from sparsekern.cli.train import train_command
from sparsekern.training.errors import Interrupted, TrainingError

DEBUG = "SPARSEKERN_DEBUG"

app = typer.Typer(
    name="sparsekern",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("train")(train_command)
app.command("plan")(plan_command)
app.command("prune")(prune_command)
app.command("recipes")(recipes_command)
app.command("slim")(slim_command)
app.command("report")(report_command)
app.add_typer(study_app, name="study")


@app.command("doctor")
def doctor_command() -> None:
    """Say what is installed, what is missing, and how to fix it."""
    from sparsekern import doctor

    raise typer.Exit(doctor.main() or 0)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"sparsekern {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train block-sparse networks that are actually faster."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 done, 1 internal error, 2 a mistake that the message says how to fix, 128 + signal when interrupted.
    """
    try:
        command = typer.main.get_command(app)
        args = list(sys.argv[1:] if arguments is None else arguments)
        status = command.main(args=args, prog_name="sparsekern", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except Interrupted as error:
        _say(str(error))
        return 128 + error.signal_number
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone; nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        return _report(error)


def _report(error: Exception) -> int:
    from sparsekern.data import DataError

    if type(error).__name__ == "Abort":
        _say("interrupted")
        return 130
    if hasattr(error, "format_message"):  # a usage error of click, whichever copy of it typer uses
        if error.format_message():  # empty after the help of a call without arguments
            _say(f"error: {error.format_message()}")
        return 2
    if isinstance(error, (TrainingError, DataError)):
        _say(f"error: {error}")
        return 2
    if isinstance(error, OSError):
        _say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 2
    _say(f"internal error: {type(error).__name__}: {error} (set {DEBUG}=1 for the traceback)")
    return 1


def _say(text: str) -> None:
    print("sparsekern: " + " ".join(text.split()), file=sys.stderr)
