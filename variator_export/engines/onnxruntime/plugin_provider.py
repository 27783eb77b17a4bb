"""Providers that another distribution adds to ONNX Runtime, as a library that is loaded at run time."""

import importlib
from collections.abc import Sequence
from typing import Any

from variator_export.core.environment import is_importable
from variator_export.core.errors import UserError
from variator_export.engines.onnxruntime.providers import Provider

# ONNX Runtime loads the library of a name once in a process.
_loaded: set[str] = set()


def is_plugin(provider: Provider, available: Sequence[str]) -> bool:
    """Whether an installed distribution adds the provider, because ONNX Runtime does not have it itself.

    Args:
        provider: The provider.
        available: Names of the providers that ONNX Runtime lists.
    """
    if provider.plugin is None or not is_importable(provider.plugin):
        return False
    return provider.name in _loaded or provider.name not in available


def plugin_devices(provider: Provider) -> list[Any]:
    """Load the library of a provider; returns the devices that it runs on.

    Raises:
        UserError: The installed ONNX Runtime loads no such libraries, the library cannot be loaded, or it
            finds no device.
    """
    import onnxruntime

    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} loads no providers of other distributions.",
            f"Install onnxruntime 1.24 or later for {provider.plugin}.",
        )
    if provider.name not in _loaded:
        try:
            library = importlib.import_module(str(provider.plugin)).get_library_path()
            onnxruntime.register_execution_provider_library(provider.name, str(library))
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise UserError(
                f"ONNX Runtime cannot load {provider.plugin}: {error}",
                "It needs NVIDIA's driver and the CUDA that it was built for.",
            ) from error
        _loaded.add(provider.name)
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider.name]
    if not found:
        raise UserError(
            f"{provider.plugin} finds no GPU here that it runs on.",
            "Run on a GPU of compute capability 8.0 or later, or choose the target onnxruntime.",
        )
    return found
