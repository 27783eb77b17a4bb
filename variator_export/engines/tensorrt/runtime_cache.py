"""Kernels that TensorRT for RTX compiled, kept from one process to the next.

An engine of TensorRT for RTX compiles its kernels for the GPU that it runs on, in each process again, unless
they are stored. Each engine and kind of GPU has a file. TensorRT itself checks that a file is of its version,
its CUDA and this GPU, and compiles anew if not.
"""

import warnings
from pathlib import Path
from typing import Any

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import EngineEntry
from variator_export.engines.cache_file import cache_file, read_cache, replace_cache
from variator_export.engines.tensorrt.api import FLAVOURS
from variator_export.engines.tensorrt.device import Device

# Digits of an engine's hash in a file name.
_DIGITS = 16


class RuntimeCache:
    """The compiled kernels of an engine, in one file.

    Args:
        path: Path of the file; `store` creates its folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._stored = b""

    def attach(self, config: Any) -> None:
        """Give the kernels to a context's configuration; all contexts of an engine share them."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            content = read_cache(self._path)
            if content and self._cache.deserialize(content):
                self._stored = content
        config.set_runtime_cache(self._cache)

    def store(self) -> None:
        """Write the file if kernels were compiled since it was read. A warning says if that fails."""
        if self._cache is None or (content := bytes(self._cache.serialize())) == self._stored:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_cache(self._path, content)
        except OSError as error:
            warnings.warn(f"Compiled kernels are not kept for the next process: {error}", stacklevel=2)
            return
        self._stored = content


def runtime_cache(bundle: BundleFiles, entry: EngineEntry, device: Device) -> RuntimeCache | None:
    """The compiled kernels of an engine on a device; None for engines that hold theirs."""
    if not FLAVOURS[entry.target].compiles_kernels:
        return None
    digits = bundle.manifest.files[entry.engine].sha256[:_DIGITS]
    return RuntimeCache(cache_file("kernels", digits, device.name))
