"""TensorRT's timing cache: kernel times, stored so that the next build need not measure them again.

Each GPU, CUDA and TensorRT version has a file. Several builds may use a file at once: their additions are
merged under a lock, and one rename replaces the file.
"""

import fcntl
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.engines.cache_file import cache_file, read_cache, replace_cache


def timing_cache_path(gpu: str, cuda: str, tensorrt: str) -> Path:
    """Path of the timing cache of a GPU, a CUDA version and a TensorRT version."""
    return cache_file("timing", gpu, f"cuda{cuda}", f"tensorrt{tensorrt}")


class TimingCache:
    """A timing cache in one file.

    Args:
        path: Path of the file; `store` creates its folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, config: Any, *, must_exist: bool) -> None:
        """Load the file into a builder configuration.

        Raises:
            UserError: The file must exist but does not, or TensorRT refuses it because it is broken or
                belongs to another GPU or version.
        """
        if must_exist and not self._path.is_file():
            raise UserError(
                f"There is no timing cache {self._path}.",
                "Build once with --timing-cache use on this GPU, or copy the file from a machine with it.",
            )
        cache = config.create_timing_cache(read_cache(self._path))
        if cache is None or not config.set_timing_cache(cache, False):
            raise UserError(
                f"TensorRT refuses the timing cache {self._path}: broken, or of another GPU or version.",
                f"Remove it: rm '{self._path}'",
            )

    def store(self, config: Any) -> None:
        """Merge the times of a build into the file, with those that other builds stored meanwhile."""
        found = config.get_timing_cache()
        if found is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            there = config.create_timing_cache(read_cache(self._path))
            merged = there if there is not None and there.combine(found, False) else found
            replace_cache(self._path, bytes(merged.serialize()))
