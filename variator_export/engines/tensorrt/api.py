"""The only place that imports TensorRT.

TensorRT 10 and 11 and TensorRT for RTX have the same classes and methods for what is used here: builder,
network, parser, optimization profile, builder configuration. What they cannot do is in the table of flavours.
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
    """One of the TensorRTs.

    Attributes:
        module: Its Python module.
        distribution: What installs it; the extra of this package has the same name.
        magic: The first bytes of its plans.
        cannot: What of `recipe.recipe.EngineRecipe` it refuses, and why.
        compute_capabilities: Those that it can build for without the GPU; None: that of the GPU that builds.
        portable: Those that an engine runs on for which none was named.
        records_graphs: Whether its execution contexts record CUDA graphs; else their stream is recorded.
    """

    module: str
    distribution: str
    magic: bytes
    cannot: Mapping[str, str] = field(default_factory=dict)
    compute_capabilities: tuple[str, ...] | None = None
    portable: tuple[str, ...] = ()
    records_graphs: bool = False


FLAVOURS = {
    # Each was tried with 1.7.1 on a machine without a GPU.
    "tensorrt-rtx": Flavour(
        "tensorrt_rtx",
        "tensorrt-rtx",
        b"vtrt",
        {
            "hardware_compatibility": "its engines run on every GPU they were built for; name those with "
            "compute_capabilities",
            "version_compatible": "it has no lean runtime; build an engine for each version",
            "timing_cache": "it times no kernels when it builds",
            "strip_weights": "it builds such engines only where a GPU is, and gives no reason where none is",
        },
        # sm75 has to be named, and has no kernels for float32 products and none for bfloat16.
        ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        portable=("sm80", "sm86", "sm89", "sm120", "sm121"),
        records_graphs=True,
    ),
    "tensorrt": Flavour(
        "tensorrt",
        "tensorrt",
        b"ftrt",
        {"compute_capabilities": "it builds for the GPU that it runs on; see hardware_compatibility"},
    ),
}


def load_tensorrt(target: str) -> ModuleType:
    """The TensorRT module of a target.

    Raises:
        UserError: It is not installed, or its libraries cannot be loaded.
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
            f"Install it again: pip install --force-reinstall '{distribution}=={version}'",
        ) from error


def require_tensorrt(target: str) -> str:
    """The version of a target's TensorRT, without importing it.

    Raises:
        UserError: It is not installed.
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
    """The CUDA that a target's TensorRT is built for, by what its distribution depends on; None: unknown."""
    try:
        needed = " ".join(requires(FLAVOURS[target].distribution) or ())
    except PackageNotFoundError:
        return None
    found = re.search(r"[-_]cu(\d+)", needed)
    return found[1] if found else None


def refuse_options(target: str, options: EngineRecipe, timing_cache: str) -> None:
    """Refuse what a target cannot do, instead of leaving it out.

    Raises:
        UserError: An option is set that the target does not have, or a GPU that it cannot build for.
    """
    flavour, plain = FLAVOURS[target], EngineRecipe()
    asked = {**dict(options), "timing_cache": timing_cache}
    usual = {**dict(plain), "timing_cache": "ignore"}
    for name, reason in flavour.cannot.items():
        if asked[name] != usual[name]:
            raise UserError(f"{name} is not for the target {target}: {reason}.", f"Leave {name} out.")
    known = flavour.compute_capabilities
    for wanted in {sm for entry in options.compute_capabilities for sm in entry.split("+")}:
        if known is not None and wanted not in known:
            raise UserError(
                f"The target {target} cannot build for {wanted}; it knows {', '.join(known)}.",
                "Choose one of those, or --target tensorrt on a machine with that GPU.",
            )
