"""Building several recipes, one after another or in parallel, each in its own process.

A build that fails, or that the system kills because it runs out of memory, does not affect other builds.
"""

import contextlib
import multiprocessing
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as changed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from variator_export.building.recipe_build import BuildResult, build
from variator_export.core import interrupts
from variator_export.core.child_process import end_with_parent
from variator_export.core.errors import EXIT_BUG, EXIT_INTERRUPTED, UserError
from variator_export.core.progress import Progress, StepReport
from variator_export.recipe.recipe import Recipe


@dataclass(frozen=True)
class Order:
    """A recipe and the folder of its bundle."""

    recipe: Recipe
    bundle: Path


@dataclass(frozen=True)
class Outcome:
    """Result of an order.

    Attributes:
        name: The recipe's name.
        bundle: The bundle's folder.
        result: Result of the build; None if the build failed.
        error: Why the build failed; None if it succeeded.
    """

    name: str
    bundle: Path
    result: BuildResult | None
    error: UserError | None

    @property
    def state(self) -> str:
        """The result in a word or two: `failed`, `published` or `up to date`."""
        if self.result is None:
            return "failed"
        return "published" if self.result.published else "up to date"

    @property
    def exit_code(self) -> int:
        """The exit code of a command that builds this order alone."""
        return 0 if self.error is None else self.error.exit_code


class _CrashError(UserError):
    """A build ended without a result, or with an error that the user did not cause."""

    exit_code = EXIT_BUG


def build_all(
    orders: Sequence[Order],
    *,
    jobs: int = 1,
    replace: bool = False,
    progress_of: Callable[[str], Progress] = lambda _: Progress(),
) -> list[Outcome]:
    """Build several recipes. A recipe that fails does not stop the others.

    Args:
        orders: The recipes to build and their folders.
        jobs: Number of builds that run at a time. With more than one, the speed of the bundles is measured
            at the end, one bundle after another, because builds that run in parallel would distort each
            other's timings.
        replace: Same meaning as for `build`.
        progress_of: Creates the progress of a recipe, given the recipe's name.

    Returns:
        One outcome for each order, in the same order. Orders that were built before are quickly found to be
        up to date, so repeating the call continues where an earlier call ended.

    Raises:
        UserError: Two orders have the same folder.
    """
    folders = [order.bundle.resolve() for order in orders]
    for order, folder in zip(orders, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(
                f"Two recipes have the same folder, {order.bundle}.",
                "Give each recipe its own name (name: …).",
            )
    later = jobs > 1
    first = [changed(o, recipe=o.recipe.model_copy(update={"speed": None})) if later else o for o in orders]
    # The builders exit before the pool: they end the processes that the pool's threads wait for.
    with ThreadPoolExecutor(max_workers=jobs) as pool, _Builders() as builders:

        def build_one(order: Order) -> Outcome:
            return builders.run(order, replace=replace, progress=progress_of(order.recipe.name))

        outcomes = list(pool.map(build_one, first))
        for index, order in enumerate(orders):
            found = outcomes[index].result
            if later and found is not None and order.recipe.speed is not None:
                timed = builders.run(order, replace=False, progress=_Notes(progress_of(order.recipe.name)))
                speed = None if timed.result is None else timed.result.speed
                outcomes[index] = (
                    timed if speed is None else changed(timed, result=changed(found, speed=speed))
                )
    interrupts.raise_if_interrupted()
    return outcomes


class _Builders:
    """The processes of running builds. On exit, the remaining processes are terminated and joined."""

    def __init__(self) -> None:
        # Not fork, because torch runs threads.
        self._context = multiprocessing.get_context("spawn")
        self._running: set[Any] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def __enter__(self) -> "_Builders":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
            for process in self._running:
                process.join()

    def run(self, order: Order, *, replace: bool, progress: Progress) -> Outcome:
        """Build in a separate process and report its progress in this process."""
        name, bundle = order.recipe.name, order.bundle
        here, there = self._context.Pipe(duplex=False)
        arguments = (there, order.recipe, bundle, replace)
        process = self._context.Process(target=_build, args=arguments, name=f"build {name}")
        with self._lock:
            if self._stopped or interrupts.was_interrupted():
                return Outcome(name, bundle, None, UserError("The build was not started."))
            process.start()
            self._running.add(process)
        there.close()
        answer: Any = None
        with here, contextlib.suppress(EOFError):
            while answer is None:
                kind, content = here.recv()
                if kind == "done":
                    answer = content
                else:
                    getattr(progress, kind)(*content)
        process.join()
        with self._lock:
            self._running.discard(process)
        if isinstance(answer, BuildResult):
            return Outcome(name, bundle, answer, None)
        return Outcome(name, bundle, None, answer or _killed(process.exitcode))


def _killed(code: int | None) -> UserError:
    if code is not None and code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
        hint = "If the system ran out of memory, use fewer --jobs. Repeat the command to continue."
        return UserError(f"The process of the build {how}.", hint)
    return _CrashError(f"The process of the build ended with code {code} and without a result.")


def _build(out: Connection, recipe: Recipe, bundle: Path, replace: bool) -> None:
    """Build in this child process. It ends when its parent ends, because nobody would receive its result."""
    interrupts.install()
    end_with_parent()
    try:
        answer: Any = build(recipe, bundle, replace=replace, progress=_Told(out))
    except UserError as error:
        answer = error
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception:  # a bug in this package, which the parent process reports with the traceback
        if interrupts.was_interrupted():
            sys.exit(EXIT_INTERRUPTED)
        answer = _CrashError(
            f"This is a bug in variator-export:\n{traceback.format_exc().rstrip()}",
            "Please report it with the command and these lines.",
        )
    out.send(("done", answer))


class _Told(Progress):
    """Sends every report to the parent process."""

    def __init__(self, out: Connection) -> None:
        self._out = out

    def started(self, name: str, why: str) -> None:
        """Send the start of a step."""
        self._out.send(("started", (name, why)))

    def finished(self, report: StepReport) -> None:
        """Send the report of a step."""
        self._out.send(("finished", (report,)))

    def note(self, text: str) -> None:
        """Send a note."""
        self._out.send(("note", (text,)))


class _Notes(Progress):
    """Progress of a build that only measures speed: its steps are not reported a second time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """Pass the bar on unchanged."""
        with self._progress.bar(description, total) as advance:
            yield advance

    def note(self, text: str) -> None:
        """Pass the note on unchanged."""
        self._progress.note(text)
