"""How long work tells what it is doing; the command line shows it, a library call is silent."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StepReport:
    """One step of a build.

    Attributes:
        name: The step and the variant, for example `bind/ratio-4`.
        action: Whether its result was taken from the bundle that was there, or left out of the new one.
        why: In words.
    """

    name: str
    action: Literal["made", "reused", "dropped"]
    why: str


class Progress:
    """Listens to a build or a training run. This one says nothing."""

    def started(self, name: str, why: str) -> None:
        """A step starts to make something."""

    def finished(self, report: StepReport) -> None:
        """A step is done."""

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """A count of things that take long; call what it gives once for each."""
        del description, total
        yield lambda: None

    def note(self, text: str) -> None:
        """Something worth a line."""


class PhaseBars:
    """A bar for each phase of a builder."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix
        self._open = ExitStack()
        self._advance: Callable[[], None] | None = None

    def __enter__(self) -> "PhaseBars":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def tell(self, phase: str, step: int, steps: int) -> None:
        """Show how far a phase is."""
        if step == 0:
            self._open.close()
            self._advance = self._open.enter_context(self._progress.bar(f"{self._prefix}: {phase}", steps))
        elif self._advance is not None:
            self._advance()
