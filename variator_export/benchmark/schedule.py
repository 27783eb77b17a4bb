"""Timing everything at every shape: opened several times, and in turns each time."""

import functools
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from variator_export.benchmark.runtimes import OPTIONAL_RUNTIMES, RUNTIMES, TORCH_RUNTIMES, Subjects
from variator_export.benchmark.speed_table import Subject
from variator_export.benchmark.timing import Timings, join, time_in_turns
from variator_export.bundle.manifest import Variant
from variator_export.core.errors import UserError, first_line
from variator_export.core.progress import Progress
from variator_export.engines.base import Arrays

Shape = tuple[int, int]
DEFAULT_WINDOW = 3


@dataclass(frozen=True)
class TimingSettings:
    """How long to time.

    Attributes:
        openings: How often everything but PyTorch is opened anew; each time it is timed at every shape.
        block_seconds: How long one subject runs in a turn, warm-up apart.
        window: Rounds that must stand still, compared with as many before them; None: all of `max_rounds` are
            timed, and nothing is compared.
        tolerance: How far their medians may be apart, as a share.
        max_rounds: After these an opening ends in any case, and says that it did not settle.
        threads: Of one operator, on every runtime; None: what each takes itself.
    """

    openings: int = 5
    block_seconds: float = 0.4
    window: int | None = DEFAULT_WINDOW
    tolerance: float = 0.03
    max_rounds: int = 16
    threads: int | None = None


@dataclass(frozen=True)
class Timed:
    """All subjects at one shape.

    Attributes:
        timings: By `Subject.key`.
        settled: Of each opening, whether the medians stood still.
    """

    timings: Mapping[str, Timings]
    settled: tuple[bool, ...]


def open_all(
    opener: Subjects, runtimes: Sequence[str], variants: Sequence[Variant], progress: Progress, *, named: bool
) -> list[Subject]:
    """Every runtime with the variants that are run with it; a group without a baseline cannot be compared.

    What is optional is left out where it cannot be opened, unless it was named.
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
    """Run everything at every shape once, before anything is timed: what is optional and fails is left out.

    torch.compile needs a compiler only then, and a shape may be too large for one of the runtimes.

    Raises:
        UserError: What is not optional, or was named, fails.
    """
    with progress.bar("first runs", len(subjects) * len(inputs)) as advance:
        for subject in list(subjects):
            if subject not in subjects:
                continue
            for (batch_size, length), arrays in inputs.items():
                try:
                    subject.runner.run(arrays)
                except Exception as error:  # of five libraries
                    words = f"{type(error).__name__}: {first_line(error)}"
                    if isinstance(error, UserError):
                        words = error.message
                    failed = f"{subject.runtime} fails at {batch_size}x{length}: {words}"
                    if named or subject.runtime not in OPTIONAL_RUNTIMES:
                        hint = "Leave it out: choose the others with --runtime; or the shape, with --shape."
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
        opener: Opens them again.
        subjects: As they were opened for the first time; replaced by those that were opened last.
        inputs: (batch_size, sequence_length) and what to run.
        settings: How long to time.
        progress: Is told what happens.
    """
    found: dict[Shape, list[tuple[dict[str, Timings], bool]]] = {shape: [] for shape in inputs}
    order = np.arange(len(subjects))
    for opening in range(settings.openings):
        if opening:
            # In another order, so that memory falls elsewhere, and others run before them.
            order = np.random.default_rng(opening).permutation(len(subjects))
            _open_again(opener, subjects, order)
        for shape, arrays in inputs.items():
            calls = {subjects[i].key: functools.partial(subjects[i].runner.run, arrays) for i in order}
            of_all = f", opening {opening + 1} of {settings.openings}" if settings.openings > 1 else ""
            rounds = max(settings.max_rounds, 2 * (settings.window or 0))
            with progress.bar(f"{shape[0]}x{shape[1]}{of_all}, at most", rounds * len(calls)) as advance:
                timed = time_in_turns(
                    calls,
                    block_seconds=settings.block_seconds,
                    window=settings.window,
                    tolerance=settings.tolerance,
                    max_rounds=settings.max_rounds,
                    progress=advance,
                )
            found[shape].append(timed)
            del calls  # holds what is to be closed before it is opened again
    return {
        shape: Timed(join([timings for timings, _ in timed]), tuple(settled for _, settled in timed))
        for shape, timed in found.items()
    }


def _open_again(opener: Subjects, subjects: list[Subject], order: np.ndarray) -> None:
    """PyTorch's stay: they share the backbone's weights, and compiling takes a minute."""
    places = [(subject.runtime, subject.variant) for subject in subjects]
    opened = {i: s for i, s in enumerate(subjects) if s.runtime in TORCH_RUNTIMES}
    subjects.clear()
    gc.collect()
    for i in order:
        if i not in opened:
            opened[i] = opener.open_again(*places[i])
    subjects.extend(opened[i] for i in range(len(places)))
