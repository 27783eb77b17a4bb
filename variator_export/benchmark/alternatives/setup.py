"""What every alternative is made from."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from variator_export.core.environment import require
from variator_export.core.errors import UserError, first_line
from variator_export.engines.base import Arrays
from variator_export.model.backbone import Backbone


@dataclass(frozen=True)
class Setup:
    """What every alternative is made from.

    Attributes:
        backbone: The backbone without plugins, in float32.
        scratch: A folder for what is exported. It outlives the alternative.
        threads: Threads of one operator; None for the runtime's default.
        calibration: Inputs (1, S) for a quantisation that needs examples.
    """

    backbone: Backbone
    scratch: Path
    threads: int | None
    calibration: Sequence[Arrays]


@contextlib.contextmanager
def attempt(runtime: str, module: str, does: str, extra: str = "alternatives") -> Iterator[None]:
    """Import and call another library, quietly.

    Args:
        runtime: The runtime's name, for messages.
        module: The module that it needs.
        does: What fails, for messages: `NNCF cannot quantise the backbone`.
        extra: The extra of this package that installs the module.

    Raises:
        UserError: The module is not installed, or anything in the block fails.
    """
    require(module, extra, f"The runtime {runtime}")
    try:
        with _quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # libraries raise exceptions of any type
        raise UserError(
            f"{does}: {first_line(error)}", "Leave it out: choose the others with --runtime."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars and advice of other libraries; errors are raised all the same."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _no_output(),
        ):
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Close the file descriptors 1 and 2 for libraries that write there directly."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        try:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
