"""A model of a repository before it is written: its configuration and the files in its folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from variator_export.serving.triton.prototext import write_message
from variator_export.serving.triton.settings import Scheduling

CONFIG_NAME = "config.pbtxt"
# Every model of an export is version 1. A later version of a bundle is a new export.
VERSION_FOLDER = "1"


@dataclass(frozen=True)
class ExportOptions:
    """What a user chooses about an export.

    Attributes:
        backend: The backend of Triton: `python`, `onnxruntime` or `tensorrt`.
        name: The name of the model, or the first part of the names of several.
        target: The target on which sessions run (`python`), or that names the device (`onnxruntime`).
        variants: Only these variants, by name or ratio. None for all.
        default_variant: The variant of requests that name none (`python`), by name or ratio. None for the
            bundle's own.
        bundle_path: Where Triton finds the bundle (`python`). None to copy it into the repository.
        execution_env: Where Triton finds the packed Python environment (`python`). None for its own Python.
        threads: Threads of one operator on a CPU. None for the runtime's own number.
        compute_capabilities: The GPUs to export engines for (`tensorrt`). Empty for all that there are.
        tensorrt_version: The version whose engines to export (`tensorrt`). None if there is one only.
        allow_unverified: Export engines that were never verified on a device.
        scheduling: How requests wait and run.
    """

    backend: str
    name: str
    target: str
    variants: tuple[int | str, ...] | None = None
    default_variant: int | str | None = None
    bundle_path: str | None = None
    execution_env: str | None = None
    threads: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    tensorrt_version: str | None = None
    allow_unverified: bool = False
    scheduling: Scheduling = field(default_factory=Scheduling)


@dataclass(frozen=True)
class PlannedModel:
    """A model to write.

    Attributes:
        name: The name of the model, and of its folder.
        variants: The variants that the model runs.
        config: The fields of the configuration, except the name.
        files: Files to copy, by their name below the version's folder.
        texts: Contents of files to write, by their name below the version's folder.
        needs: What the model needs of the Triton that serves it, for people.
    """

    name: str
    variants: tuple[str, ...]
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    texts: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""

    def write(self, repository: Path) -> None:
        """Write the model's folder into a repository."""
        folder = repository / self.name
        for name, source in self.files.items():
            target = folder / VERSION_FOLDER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(source, target)
        for name, text in self.texts.items():
            target = folder / VERSION_FOLDER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        (folder / CONFIG_NAME).write_text(write_message({"name": self.name, **self.config}), encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    """Copy the bytes alone. An error of writing names no file, so that it is one of the repository."""
    with source.open("rb") as read, target.open("wb") as written:
        while block := read.read(1 << 22):
            written.write(block)
