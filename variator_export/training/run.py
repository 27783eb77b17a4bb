"""Where a training run writes, and what it may do there."""

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
from variator_export.model.plugin_card import is_plugin_folder
from variator_export.training.processes import device, is_main_process, num_processes

# What fine-tuning writes beside the model.
RECORD_NAME = "training.json"
# What can change the result of a run.
_DISTRIBUTIONS = (DISTRIBUTION, "torch", "transformers", "accelerate", "tokenizers", "numpy")


@dataclass(frozen=True)
class Run:
    """One training run, apart from what it trains and how.

    Attributes:
        output: The folder to publish.
        dtype: Of plugin files.
        replace: Whether what an earlier run wrote there may be replaced.
        restart: Whether to drop an unfinished run instead of going on with it.
        command: The command line, for those who want to repeat it; None: called from Python.
        terms: Under which terms the data may be used, in the user's words; None: not stated.
        progress: Is told the losses.
    """

    output: Path
    dtype: Literal["float16", "float32"] = "float16"
    replace: bool = False
    restart: bool = False
    command: str | None = None
    terms: str | None = None
    progress: Progress = field(default_factory=Progress)

    def listener(self) -> Progress:
        """The progress; a silent one but in the main process."""
        return self.progress if is_main_process() else Progress()

    def record(self) -> dict[str, Any]:
        """What of the run itself stands beside a result."""
        return {
            "command": self.command,
            "terms": self.terms,
            "processes": num_processes(),
            "device": device().type,
            "versions": versions(*_DISTRIBUTIONS),
            "code": code_digest("training", "model", "data"),
        }

    def check_output(self, inputs: Sequence[Path] = ()) -> None:
        """Refuse an output that holds something that must not be replaced; before anything slow.

        Args:
            inputs: What the run reads.

        Raises:
            UserError: It is a file, holds an input or files that no run wrote, or what one wrote, unasked.
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
        """A staging folder that becomes the output at the end, and one for checkpoints, which a kill leaves.

        Only the main process publishes. Whatever is in the output stays until the new one is whole.

        Raises:
            UserError: As `check_output`, or the output cannot be written.
        """
        output = self.output.absolute()
        checkpoints = output.parent / f".{output.name}.training"
        if not is_main_process():
            yield output, checkpoints
            return
        self.check_output(inputs)
        state = "What was there is unchanged, and the same command goes on from the last whole checkpoint."
        with exclusive(output) as staging, writing_to(output, state):
            if self.restart:
                shutil.rmtree(checkpoints, ignore_errors=True)
            yield staging, checkpoints
            publish(staging, output)
            shutil.rmtree(checkpoints, ignore_errors=True)


def _is_replaceable(output: Path) -> bool:
    """Whether a folder holds what a run wrote, and nothing that would be lost besides."""
    if (output / RECORD_NAME).is_file():
        return all(path.is_file() for path in output.iterdir())
    return all(is_plugin_folder(path) for path in output.iterdir())
