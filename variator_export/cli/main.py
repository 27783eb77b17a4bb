"""The command line: `variator-export`."""

import errno
import itertools
import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from variator_export.cli.bench import bench_command
from variator_export.cli.build import build_command
from variator_export.cli.doctor import doctor_command
from variator_export.cli.evaluate import evaluate_command
from variator_export.cli.import_upstream import import_command
from variator_export.cli.inspect import inspect_command
from variator_export.cli.output import Format, Output
from variator_export.cli.report import report_command
from variator_export.cli.run import run_command
from variator_export.cli.schema import schema_command
from variator_export.cli.train import train_app
from variator_export.cli.verify import verify_command
from variator_export.core import interrupts
from variator_export.core.environment import DISTRIBUTION, installed_version
from variator_export.core.errors import EXIT_BUG, EXIT_INTERRUPTED, UserError

app = typer.Typer(
    name="variator-export",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Export transformers with Variator compression plugins to verified ONNX graphs and TensorRT "
    "engines.",
    epilog="Exit codes: 0 done; 1 the input or the machine does not allow it; 2 wrong usage; "
    "3 numbers disagree; 4 too slow for --fail-under; 70 a bug of ours; 130 interrupted.",
)
app.command("build")(build_command)
app.command("verify")(verify_command)
app.command("bench")(bench_command)
app.command("report")(report_command)
app.command("run")(run_command)
app.command("inspect")(inspect_command)
app.command("evaluate")(evaluate_command)
app.command("import")(import_command)
app.command("doctor")(doctor_command)
app.command("schema")(schema_command)
app.add_typer(train_app, name="train")


_REFUSALS = {
    errno.EACCES: "Run as a user who may read it.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ENOSPC: "Free some space, or write somewhere else.",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{DISTRIBUTION} {installed_version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Run the command line and end the process with its exit code."""
    interrupts.install()
    try:
        app()
    except Exception as error:
        # A library may have made an error of its own of it.
        if interrupts.was_interrupted():
            sys.exit(EXIT_INTERRUPTED)
        _end(error)


def _end(error: Exception) -> NoReturn:
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        if error.filename is None:
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - nothing more can be written to it
        where = error.filename or "standard output"
        error = UserError(f"{where}: {(error.strerror or 'refused').lower()}.", _REFUSALS[error.errno])
    if not isinstance(error, UserError):
        _report_bug()
    _output().error(error)
    sys.exit(error.exit_code)


def _report_bug() -> NoReturn:
    traceback.print_exc()
    _output().hint("This is a bug in variator-export. Please report it with the command and the lines above.")
    sys.exit(EXIT_BUG)


def _output() -> Output:
    """An error has no command to ask for its format."""
    arguments = sys.argv[1:]
    is_json = "--format=json" in arguments or any(
        a == "--format" and b == "json" for a, b in itertools.pairwise(arguments)
    )
    return Output(Format.JSON if is_json else Format.TEXT)


if __name__ == "__main__":
    main()
