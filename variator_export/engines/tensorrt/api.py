"""The only module that imports TensorRT.

TensorRT 10, TensorRT 11 and TensorRT for RTX share the classes and methods used here: builder, network,
parser, optimization profile, builder configuration. The table of flavours lists what each cannot do.
Enum numbers differ between versions: never store one.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType

from variator_export.core.environment import install_command, installed_version
from variator_export.core.errors import UserError
from variator_export.recipe.recipe import EngineRecipe


@dataclass(frozen=True)
class Flavour:
    """One of the TensorRT products.

    Attributes:
        module: Python module.
        distribution: Distribution that installs the module; the extra of this package has the same name.
        magic: First bytes of a plan.
        cannot: Options of `recipe.recipe.EngineRecipe` that this TensorRT refuses, with the reasons.
        compute_capabilities: Compute capabilities that it can build for without the GPU. None if it builds
            only for the GPU of the machine.
        portable: Compute capabilities on which an engine runs if none was named.
        captures_cuda_graphs: Whether execution contexts capture CUDA graphs themselves. If not, their stream
            is captured.
        compiles_kernels: Whether engines compile their kernels where they run, once for each process.
    """

    module: str
    distribution: str
    magic: bytes
    cannot: Mapping[str, str] = field(default_factory=dict)
    compute_capabilities: tuple[str, ...] | None = None
    portable: tuple[str, ...] = ()
    captures_cuda_graphs: bool = False
    compiles_kernels: bool = False


FLAVOURS = {
    # Each entry was tried with 1.7.1 on a machine without a GPU.
    "tensorrt-rtx": Flavour(
        "tensorrt_rtx",
        "tensorrt-rtx",
        b"vtrt",
        {
            "hardware_compatibility": "its engines run on every GPU they were built for; name the GPUs with "
            "compute_capabilities",
            "version_compatible": "it has no lean runtime; build an engine for each version",
            "timing_cache": "it times no kernels when it builds",
            "strip_weights": "it builds such engines only on a machine with a GPU, and gives no reason "
            "elsewhere",
        },
        # sm75 must be named. It has no kernels for float32 products and none for bfloat16.
        ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        portable=("sm80", "sm86", "sm89", "sm120", "sm121"),
        captures_cuda_graphs=True,
        compiles_kernels=True,
    ),
    "tensorrt": Flavour(
        "tensorrt",
        "tensorrt",
        b"ftrt",
        {"compute_capabilities": "it builds for the GPU that it runs on; see hardware_compatibility"},
    ),
}


def load_tensorrt(target: str) -> ModuleType:
    """Import the TensorRT module of a target.

    Raises:
        UserError: The module is not installed, or its libraries cannot be loaded.
    """
    flavour = FLAVOURS[target]
    distribution = flavour.distribution
    try:
        return importlib.import_module(flavour.module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"The target {target} needs the Python package {distribution}, which is not installed here.",
            f"Install it with: {install_command(distribution)}, or leave the target out.",
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        version = installed_version(distribution)
        raise UserError(
            f"{distribution} {version} is installed, but cannot be loaded: {error}.",
            f"Reinstall it: pip install --force-reinstall '{distribution}=={version}'",
        ) from error


def require_tensorrt(target: str) -> str:
    """The version of a target's TensorRT, read without importing the module.

    Raises:
        UserError: TensorRT is not installed.
    """
    distribution = FLAVOURS[target].distribution
    version = installed_version(distribution)
    if version is None:
        raise UserError(
            f"The target {target} needs the Python package {distribution}, which is not installed here.",
            f"Install it with: {install_command(distribution)}, or leave the target out.",
        )
    return version


def cuda_version(target: str) -> str | None:
    """The CUDA version that a target's TensorRT is built for, by its dependencies; None if unknown."""
    try:
        needed = " ".join(requires(FLAVOURS[target].distribution) or ())
    except PackageNotFoundError:
        return None
    found = re.search(r"[-_]cu(\d+)", needed)
    return found[1] if found else None


def refuse_options(target: str, options: EngineRecipe, timing_cache: str) -> None:
    """Refuse options that a target does not have, instead of ignoring them.

    Raises:
        UserError: An option is set that the target does not have, or a GPU that it cannot build for.
    """
    flavour, plain = FLAVOURS[target], EngineRecipe()
    asked = {**dict(options), "timing_cache": timing_cache}
    usual = {**dict(plain), "timing_cache": "ignore"}
    for name, reason in flavour.cannot.items():
        if asked[name] != usual[name]:
            raise UserError(f"{name} is not for the target {target}: {reason}.", f"Leave {name} out.")
    if options.version_compatible and options.strip_weights:
        raise UserError(
            "version_compatible and strip_weights exclude each other: the lean runtime, with which a later "
            "TensorRT opens an engine, cannot put weights into it.",
            "Leave one of them out.",
        )
    known = flavour.compute_capabilities
    for wanted in {sm for entry in options.compute_capabilities for sm in entry.split("+")}:
        if known is not None and wanted not in known:
            raise UserError(
                f"The target {target} cannot build for {wanted}; it supports {', '.join(known)}.",
                "Choose one of those, or --target tensorrt on a machine with that GPU.",
            )
