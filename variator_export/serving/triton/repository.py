"""A model repository of Triton from a bundle: planned and checked first, then published whole."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.hub_bundle import bundle_folder
from variator_export.bundle.publishing import exclusive, publish
from variator_export.core.errors import UsageError, UserError
from variator_export.serving.triton.graph_backends import onnxruntime_models, tensorrt_models
from variator_export.serving.triton.model import CONFIG_NAME, ExportOptions, PlannedModel
from variator_export.serving.triton.python_backend import python_models

_Plan = Callable[[BundleFiles, ExportOptions], list[PlannedModel]]
BACKENDS: Mapping[str, _Plan] = {
    "python": python_models,
    "onnxruntime": onnxruntime_models,
    "tensorrt": tensorrt_models,
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class ExportedModel:
    """A model of the repository.

    Attributes:
        name: Its name in Triton.
        variants: The variants that it runs.
        size_bytes: The size of its folder.
        needs: What it needs of the Triton that serves it.
    """

    name: str
    variants: tuple[str, ...]
    size_bytes: int
    needs: str


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        repository: The model repository.
        models: Its models.
        command: The command that serves it.
    """

    repository: Path
    models: tuple[ExportedModel, ...]
    command: str


def export_repository(
    source: str | Path, output: Path, options: ExportOptions, *, overwrite: bool = False
) -> Exported:
    """Write a model repository. Triton sees it whole or not at all.

    Args:
        source: The bundle's folder, or `ORGANISATION/NAME[@REVISION]` on the hub.
        output: The repository's folder.
        options: The backend, and how requests wait and run.
        overwrite: Whether to replace a repository that exists.

    Raises:
        UserError: There is no bundle, the backend cannot run it, or the folder exists or cannot be written.
        UsageError: An option does not fit.
    """
    if not _NAME.fullmatch(options.name):
        raise UsageError(
            f"{options.name!r} is not a name for a model: letters, digits, '.', '_' and '-'.", "--name minilm"
        )
    _check_output(output, overwrite=overwrite)
    bundle = BundleFiles(bundle_folder(source))
    bundle.refuse_decoder("export-triton")
    models = BACKENDS[options.backend](bundle, options)
    with exclusive(output) as staging:
        for model in models:
            model.write(staging)
        bundle.check_unchanged()
        written = tuple(
            ExportedModel(model.name, model.variants, _size(staging / model.name), model.needs)
            for model in models
        )
        publish(staging, output)
    repository = output.absolute()
    return Exported(repository, written, f"tritonserver --model-repository={repository}")


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to replace what should stay.

    Raises:
        UserError: The path is a file, a folder that is no model repository, or one that may not be replaced.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not all((entry / CONFIG_NAME).is_file() for entry in output.iterdir()):
        raise UserError(
            f"{output} exists and is not a model repository: not every entry is a folder with {CONFIG_NAME}.",
            "Choose a new folder with --output.",
        )
    if not overwrite:
        raise UserError(
            f"{output} exists.", "Replace it with --overwrite, or choose a new folder with --output."
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
