"""The only place that imports TensorRT.

TensorRT and TensorRT for RTX have the same classes and methods for what is used here: builder, network,
parser, optimization profile, builder configuration. Enum numbers differ between versions: never store one.
"""

import importlib
from types import ModuleType

from variator_export.core.environment import install_command, installed_version
from variator_export.core.errors import UserError

# Target: (Python module, distribution, extra).
_FLAVOURS = {
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx"),
    "tensorrt": ("tensorrt", "tensorrt", "tensorrt"),
}


# Asks each for its version, in a process of its own.
PROBES = {module: f"import {module}; print({module}.__version__)" for module, _, _ in _FLAVOURS.values()}


def load_tensorrt(target: str) -> ModuleType:
    """The TensorRT module of a target.

    Raises:
        UserError: It is not installed, or its libraries cannot be loaded.
    """
    module, distribution, extra = _FLAVOURS[target]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"The target {target} needs the Python package {distribution}, which is not installed here.",
            f"Install it with: {install_command(extra)}, or leave the target out.",
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
    _, distribution, extra = _FLAVOURS[target]
    version = installed_version(distribution)
    if version is None:
        raise UserError(
            f"The target {target} needs the Python package {distribution}, which is not installed here.",
            f"Install it with: {install_command(extra)}, or leave the target out: --target onnxruntime",
        )
    return version
