"""A training run's output: the folder that the run writes to, and what may be replaced there."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from variator_export.bundle.publishing import exclusive, publish, writing_to
from variator_export.core.environment import DISTRIBUTION, versions
from variator_export.core.errors import UserError
from variator_export.core.hashing import code_digest
from variator_export.core.progress import Progress
from variator_export.model.modular.card import is_module_folder
from variator_export.model.plugin_card import is_plugin_folder
from variator_export.training.processes import device, is_main_process, num_processes

# The record that fine-tuning writes next to the model.
RECORD_NAME = "training.json"
# Distributions whose versions can change the result of a run.
_DISTRIBUTIONS = (DISTRIBUTION, "torch", "transformers", "accelerate", "tokenizers", "numpy")


@dataclass(frozen=True)
class Run:
    """Output, options and record of one training run, independent of what it trains.

    Attributes:
        output: The folder to publish.
        dtype: Data type of the tensors in plugin files.
        replace: Whether the results of an earlier run in the output folder may be replaced.
        restart: Whether to drop an unfinished run instead of continuing it.
        command: The command line, stored so that the run can be repeated; None if called from Python.
        terms: Terms of use of the data, in the user's words; None if not stated.
        progress: Receives the losses.
    """

    output: Path
    dtype: Literal["float16", "float32"] = "float16"
    replace: bool = False
    restart: bool = False
    command: str | None = None
    terms: str | None = None
    progress: Progress = field(default_factory=Progress)

    def listener(self) -> Progress:
        """Return the progress; in processes other than the main process, a silent one."""
        return self.progress if is_main_process() else Progress()

    def record(self) -> dict[str, Any]:
        """Return the facts about the run that are stored with a result."""
        return {
            "command": self.command,
            "terms": self.terms,
            "processes": num_processes(),
            "device": device().type,
            "versions": versions(*_DISTRIBUTIONS),
            "code": code_digest("training", "model", "data"),
        }

    def check_output(self, inputs: Sequence[Path] = ()) -> None:
        """Refuse an output folder whose contents must not be replaced, before anything slow starts.

        Args:
            inputs: Paths that the run reads.

        Raises:
            UserError: The output is a file, holds an input or files that no run wrote, or holds the results
                of an earlier run that may not be replaced (`replace`).
        """
        output = self.output
        if output.exists() and not output.is_dir():
            raise UserError(f"{output} is a file.", "Choose a folder with --output.")
        for path in inputs:
            if path.resolve().is_relative_to(output.resolve()):
                raise UserError(
                    f"The output {output} holds {path}, which the run reads.",
                    "Choose another folder with --output.",
                )
        if not output.is_dir() or not any(output.iterdir()):
            return
        if not _is_replaceable(output):
            raise UserError(
                f"{output} holds files that no training run wrote.",
                "Choose another folder with --output; nothing in this one was touched.",
            )
        if not self.replace:
            raise UserError(
                f"{output} is there already.",
                "Choose another folder with --output, or replace it: --replace",
            )

    @contextmanager
    def publishing(self, inputs: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
        """Provide a staging folder, which becomes the output at the end, and a folder for checkpoints.

        The checkpoints are kept if the run is killed. Only the main process publishes. The contents of the
        output stay until the new output is complete.

        Raises:
            UserError: The output is refused by `check_output`, or cannot be written.
        """
        output = self.output.absolute()
        checkpoints = output.parent / f".{output.name}.training"
        if not is_main_process():
            yield output, checkpoints
            return
        self.check_output(inputs)
        state = (
            "Any previous output is unchanged, and the same command goes on from the last whole checkpoint."
        )
        with exclusive(output) as staging, writing_to(output, state):
            if self.restart:
                shutil.rmtree(checkpoints, ignore_errors=True)
            yield staging, checkpoints
            publish(staging, output)
            shutil.rmtree(checkpoints, ignore_errors=True)


def _is_replaceable(output: Path) -> bool:
    """Check whether a folder holds only the results of a run, so that nothing else would be lost."""
    if (output / RECORD_NAME).is_file():
        return all(path.is_file() for path in output.iterdir())
    return all(is_plugin_folder(path) or is_module_folder(path) for path in output.iterdir())
