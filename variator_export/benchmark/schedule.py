"""Schedule of a benchmark: time all subjects at every shape, in turns, in several openings.

An opening opens every session anew, in a new order, and times it at every shape.
"""

import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from variator_export.benchmark.runtimes import LASTING_RUNTIMES, OPTIONAL_RUNTIMES, RUNTIMES, Subjects
from variator_export.benchmark.speed_table import Subject
from variator_export.benchmark.timing import Timings, join, time_in_turns
from variator_export.bundle.manifest import Variant
from variator_export.core.errors import UserError, first_line
from variator_export.core.progress import Progress
from variator_export.engines.base import Arrays

Shape = tuple[int, int]
S = TypeVar("S")


class Opened(Protocol):
    """A subject that is open: a variant on a runtime."""

    @property
    def runtime(self) -> str:
        """Name of the runtime."""
        ...

    @property
    def variant(self) -> Any:
        """The variant, as what opens it takes it."""
        ...


OpenedT = TypeVar("OpenedT", bound=Opened)
DEFAULT_WINDOW = 3


@dataclass(frozen=True)
class TimingSettings:
    """Settings of the timing.

    Attributes:
        openings: Number of times that everything except PyTorch is opened anew and timed at every shape.
        block_seconds: Seconds that one subject runs in a turn, without warm-up.
        window: Number of rounds whose medians must be stable, compared with as many rounds before them. None
            means that all `max_rounds` rounds are timed and nothing is compared.
        tolerance: Largest difference between the two medians, as a share.
        max_rounds: Number of rounds after which an opening ends at the latest. If the medians are not stable
            by then, the opening is reported as not settled.
        threads: Threads of one operator, on every runtime. None leaves the choice to each runtime.
    """

    openings: int = 5
    block_seconds: float = 0.4
    window: int | None = DEFAULT_WINDOW
    tolerance: float = 0.03
    max_rounds: int = 16
    threads: int | None = None


@dataclass(frozen=True)
class Timed:
    """Timings of all subjects at one shape.

    Attributes:
        timings: Timings by `Subject.key`.
        settled: Whether the medians became stable, for each opening.
    """

    timings: Mapping[str, Timings]
    settled: tuple[bool, ...]


def open_all(
    opener: Subjects, runtimes: Sequence[str], variants: Sequence[Variant], progress: Progress, *, named: bool
) -> list[Subject]:
    """Open every runtime with the variants that it runs.

    The baseline must be among the variants, because a group without a baseline cannot be compared. Optional
    runtimes that cannot be opened are left out, unless the user named them.
    """
    subjects: list[Subject] = []
    for name in runtimes:
        only_baseline = RUNTIMES[name].only_baseline
        try:
            subjects += [opener.open(name, v) for v in variants if v.baseline or not only_baseline]
        except UserError as error:
            if named or name not in OPTIONAL_RUNTIMES:
                raise
            progress.note(f"{name} is left out: {error.message}")
    return subjects


def run_once(
    subjects: list[Subject], inputs: Mapping[Shape, Arrays], progress: Progress, *, named: bool
) -> None:
    """Run every subject at every shape once before anything is timed, and leave out optional ones that fail.

    Some errors appear only in the first run: torch.compile may lack a compiler, and a shape may be too large
    for one of the runtimes.

    Raises:
        UserError: A runtime fails that is not optional or that the user named.
    """
    with progress.bar("first runs", len(subjects) * len(inputs)) as advance:
        for subject in list(subjects):
            if subject not in subjects:
                continue
            for (batch_size, length), arrays in inputs.items():
                try:
                    subject.runner.run(arrays)
                except Exception as error:  # five libraries raise their own exceptions
                    words = f"{type(error).__name__}: {first_line(error)}"
                    if isinstance(error, UserError):
                        words = error.message
                    failed = f"{subject.runtime} fails at {batch_size}x{length}: {words}"
                    if named or subject.runtime not in OPTIONAL_RUNTIMES:
                        hint = "Choose the other runtimes with --runtime, or the other shapes with --shape."
                        raise UserError(failed, hint) from error
                    progress.note(f"{subject.runtime} is left out: {failed}")
                    subjects[:] = [s for s in subjects if s.runtime != subject.runtime]
                    break
                advance()


def time_everything(
    opener: Subjects,
    subjects: list[Subject],
    inputs: Mapping[Shape, Arrays],
    settings: TimingSettings,
    progress: Progress,
) -> dict[Shape, Timed]:
    """Time subjects in turns at every shape, once for each opening.

    Args:
        opener: Opens the subjects again.
        subjects: The subjects as opened the first time. The list is updated with those of the last opening.
        inputs: The model's inputs for each shape (batch_size, sequence_length).
        settings: Settings of the timing.
        progress: Receives progress reports.
    """

    def calls(shape: Shape, order: np.ndarray) -> dict[str, Callable[[], object]]:
        return {subjects[i].key: functools.partial(subjects[i].runner.run, inputs[shape]) for i in order}

    shapes = {shape: f"{shape[0]}x{shape[1]}" for shape in inputs}
    reopen = functools.partial(open_again, opener.open_again, subjects)
    return time_in_openings(shapes, len(subjects), calls, reopen, settings, progress)


def time_in_openings(
    shapes: Mapping[S, str],
    num_subjects: int,
    calls: Callable[[S, np.ndarray], Mapping[str, Callable[[], object]]],
    reopen: Callable[[np.ndarray], None],
    settings: TimingSettings,
    progress: Progress,
) -> dict[S, Timed]:
    """Time calls in turns at every shape, once for each opening.

    Args:
        shapes: Shapes with their names.
        num_subjects: The number of subjects.
        calls: Function from a shape and an order of the subjects to the calls to time, by name.
        reopen: Function from an order to nothing, which opens the subjects again in this order.
        settings: Settings of the timing.
        progress: Receives progress reports.
    """
    found: dict[S, list[tuple[dict[str, Timings], bool]]] = {shape: [] for shape in shapes}
    order = np.arange(num_subjects)
    for opening in range(settings.openings):
        if opening:
            # A new order changes the memory layout, and which subject runs before which.
            order = np.random.default_rng(opening).permutation(num_subjects)
            reopen(order)
        for shape, name in shapes.items():
            of_shape = calls(shape, order)
            of_all = f", opening {opening + 1} of {settings.openings}" if settings.openings > 1 else ""
            rounds = max(settings.max_rounds, 2 * (settings.window or 0))
            with progress.bar(f"{name}{of_all}, at most", rounds * len(of_shape)) as advance:
                timed = time_in_turns(
                    of_shape,
                    block_seconds=settings.block_seconds,
                    window=settings.window,
                    tolerance=settings.tolerance,
                    max_rounds=settings.max_rounds,
                    progress=advance,
                )
            found[shape].append(timed)
            del of_shape  # holds sessions that must be closed before they are opened again
    return {
        shape: Timed(join([timings for timings, _ in timed]), tuple(settled for _, settled in timed))
        for shape, timed in found.items()
    }


def open_again(open_one: Callable[[str, Any], OpenedT], subjects: list[OpenedT], order: np.ndarray) -> None:
    """Open all subjects again, except PyTorch's.

    PyTorch's models stay, because they share the backbone's weights and compiling takes a minute.

    Args:
        open_one: Opens a runtime's variant.
        subjects: The subjects, replaced in place.
        order: The order to open them in.
    """
    places = [(subject.runtime, subject.variant) for subject in subjects]
    opened = {i: s for i, s in enumerate(subjects) if s.runtime in LASTING_RUNTIMES}
    subjects.clear()
    gc.collect()
    for i in order:
        if i not in opened:
            opened[i] = open_one(*places[i])
    subjects.extend(opened[i] for i in range(len(places)))
