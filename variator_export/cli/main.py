"""Entry point of the `variator-export` command."""

import errno
import io
import itertools
import os
import sys
import traceback
from typing import NoReturn

from variator_export.cli.app import COMMANDS, make_app
from variator_export.cli.output import Format, Output
from variator_export.core import interrupts
from variator_export.core.errors import EXIT_BUG, EXIT_INTERRUPTED, UserError

# The environment variables in which a shell gives the words to complete: bash, and zsh or fish.
_WORDS = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")

_REFUSALS = {
    errno.EACCES: "Run as a user who has access to it.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ENOSPC: "Free some space, or write somewhere else.",
}


def main() -> None:
    """Run the command line and end the process with its exit code."""
    interrupts.install()
    for stream in (sys.stdout, sys.stderr):
        # A terminal or a pipe that is not UTF-8 gets \\u2026 instead of a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        # An argument that happens to be a command's name only loads one command more than needed.
        make_app(COMMANDS.keys() & {*sys.argv[1:], *_completed_words()})()
    except KeyboardInterrupt:  # while a command is imported; Typer handles it later
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        # A library may have turned the interrupt into an error of its own.
        if interrupts.was_interrupted():
            sys.exit(EXIT_INTERRUPTED)
        _end(error)


def _completed_words() -> set[str]:
    return {word for name in _WORDS for word in os.environ.get(name, "").split()}


def _end(error: Exception) -> NoReturn:
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        if error.filename is None:
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - nothing more can be written there
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
    """Return an output in the format that `sys.argv` requests: an error may come before it is parsed."""
    arguments = sys.argv[1:]
    is_json = "--format=json" in arguments or any(
        a == "--format" and b == "json" for a, b in itertools.pairwise(arguments)
    )
    return Output(Format.JSON if is_json else Format.TEXT)


if __name__ == "__main__":
    main()
