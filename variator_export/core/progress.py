"""Progress of long operations: the command line shows it, a library call is silent."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StepReport:
    """One step of a build.

    Attributes:
        name: The step and the variant, for example `bind/ratio-4`.
        action: Whether the result was made, reused from the existing bundle, or dropped from the new one.
        why: The reason, as text for people.
    """

    name: str
    action: Literal["made", "reused", "dropped"]
    why: str


class Progress:
    """Listener of a build or a training run. This base class stays silent."""

    def started(self, name: str, why: str) -> None:
        """Called when a step starts."""

    def finished(self, report: StepReport) -> None:
        """Called when a step is done."""

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """Count items that take long to process; call the yielded function once per item."""
        del description, total
        yield lambda: None

    def note(self, text: str) -> None:
        """Called with a message worth one line."""


class PhaseBars:
    """Progress bars, one for each phase of a builder."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix
        self._open = ExitStack()
        self._advance: Callable[[], None] | None = None

    def __enter__(self) -> "PhaseBars":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def tell(self, phase: str, step: int, steps: int) -> None:
        """Show the progress of a phase."""
        if step == 0:
            self._open.close()
            self._advance = self._open.enter_context(self._progress.bar(f"{self._prefix}: {phase}", steps))
        elif self._advance is not None:
            self._advance()
