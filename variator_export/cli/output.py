"""Output of commands: data on stdout, progress and hints on stderr.

With `--format json`, stdout is one JSON document.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

from variator_export.core.errors import UserError
from variator_export.core.progress import Progress, StepReport

if TYPE_CHECKING:
    from rich.table import Table


class Format(StrEnum):
    """Format in which a command prints its result."""

    TEXT = "text"
    JSON = "json"


_WIDTH_WITHOUT_TERMINAL = 160


class Output:
    """Printer for the results, hints and errors of a command.

    Args:
        format: Text for people, or one JSON document.
    """

    def __init__(self, format: Format = Format.TEXT) -> None:
        self.format = format
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)

    @property
    def is_json(self) -> bool:
        """Whether stdout is one JSON document."""
        return self.format is Format.JSON

    def document(self, content: Any) -> None:
        """Print the JSON document."""
        is_utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
        sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=not is_utf8, allow_nan=False) + "\n")

    def text(self, line: str = "") -> None:
        """Print a line of data."""
        self.out.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self, table: "Table") -> None:
        """Print a table of data."""
        self.out.print(table)

    def hint(self, line: str) -> None:
        """Print a hint or a warning."""
        self.err.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def warning(self) -> Iterator[None]:
        """Print a `UserError` raised inside as a warning, and continue."""
        try:
            yield
        except UserError as error:
            self.hint(f"warning: {error.message}")

    def error(self, error: UserError) -> None:
        """Print an error and its hint."""
        self.hint(f"error: {error.message}")
        if error.hint:
            self.hint(f"  hint: {error.hint}")
        if self.is_json:
            self.document({"error": error_document(error)})


def error_document(error: UserError) -> dict[str, Any]:
    """Return the error as an entry of a JSON document."""
    return {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}


def _console(stream: Any) -> Console:
    return Console(file=stream, width=None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL)


class ConsoleProgress(Progress):
    """Progress of a build on stderr: a line per step, with bars and running steps on a terminal only.

    Args:
        output: Printer of the command.
        prefix: Text before each line when several builds run side by side. With a prefix there are no bars.
    """

    def __init__(self, output: Output, prefix: str = "") -> None:
        self._output = output
        self._prefix = prefix
        self._started = 0.0
        self._quiet = output.is_json
        self._alive = output.err.is_terminal and not (os.environ.get("CI") or self._quiet or prefix)
        self._status: Any = None

    def started(self, name: str, why: str) -> None:
        """Show a step as running."""
        self._started = time.monotonic()
        if self._alive:
            self._status = self._output.err.status(f"{name} ({why})")
            self._status.start()

    def finished(self, report: StepReport) -> None:
        """Print the line of a finished step."""
        self._stop_status()
        if self._quiet:
            return
        seconds = f"{time.monotonic() - self._started:6.1f} s" if report.action == "made" else "        "
        self._output.hint(f"{self._prefix}{report.action:7} {seconds}  {report.name:46} {report.why}")

    def note(self, text: str) -> None:
        """Print a note on a line of its own."""
        if not self._quiet:
            self._output.hint(self._prefix + text)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a progress bar if stderr is a terminal."""
        self._stop_status()
        if not self._alive:
            yield lambda: None
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._output.err, transient=True) as bars:
            task = bars.add_task(description, total=total)
            yield lambda: bars.advance(task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the terminal."""
        self._stop_status()

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
