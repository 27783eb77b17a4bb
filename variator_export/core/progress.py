"""How long work tells what it is doing; the command line shows it, a library call is silent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
