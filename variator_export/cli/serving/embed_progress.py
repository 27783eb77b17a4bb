"""Progress of `variator-export embed` on stderr: a bar on a terminal, or else a line every few seconds."""

import os
import time
from typing import Any, Self

from variator_export.cli.output import Output
from variator_export.serving.offline.progress import EmbedProgress

_SECONDS_BETWEEN_LINES = 10.0


class ConsoleEmbedProgress(EmbedProgress):
    """Shows the progress of a run.

    Args:
        output: Printer of the command. Nothing is shown if it prints a JSON document.
        seconds_between_lines: Time between lines where there is no terminal.
    """

    def __init__(self, output: Output, seconds_between_lines: float = _SECONDS_BETWEEN_LINES) -> None:
        super().__init__()
        self._output = output
        self._quiet = output.is_json
        self._alive = output.err.is_terminal and not (os.environ.get("CI") or self._quiet)
        self._wait = seconds_between_lines
        self._started = self._last_line = 0.0
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the terminal."""
        self._stop()

    def opened(self) -> None:
        """Start the clock, and the bar on a terminal."""
        self._started = self._last_line = time.monotonic()
        if self._alive:
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("embed"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._output.err, transient=True)
            self._bar.add_task("", total=None)
            self._bar.start()

    def advanced(self, texts: int, tokens: int) -> None:
        """Count a batch; show it on the bar, or in a line if the last one is long ago."""
        super().advanced(texts, tokens)
        if self._bar is not None:
            done = self.texts + self.resumed_texts
            self._bar.update(0, total=self.expected_texts, completed=done, description=self._line())
        elif not self._quiet and time.monotonic() - self._last_line >= self._wait:
            self._last_line = time.monotonic()
            self._output.hint(f"embed: {self._line()}")

    def assembling(self) -> None:
        """Say that the parts are being put together."""
        self._stop()
        if not self._quiet:
            self._output.hint(f"embed: {self._line()}; writing the output")

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        done, expected = self.texts + self.resumed_texts, self.expected_texts
        words = f"{done:,} texts"
        if expected is not None and expected > done:
            words = f"{done:,} of about {expected:,} texts"
        words += f", {self.texts / seconds:,.0f} texts/s, {self.tokens / seconds:,.0f} tokens/s"
        if expected is not None and expected > done and self.texts:
            words += f", {_duration((expected - done) * seconds / self.texts)} left"
        return words

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
