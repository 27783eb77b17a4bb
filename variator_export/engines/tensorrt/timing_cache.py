"""The timing cache of TensorRT: how long kernels took, so that the next build need not time them again.

One file for each GPU, CUDA and TensorRT version. Several builds may use it at once: what they add is merged
under a lock and put in its place in one rename.
"""

import fcntl
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError


def timing_cache_path(gpu: str, cuda: str, tensorrt: str) -> Path:
    """Where the cache of a GPU, a CUDA version and a TensorRT version lies."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "-".join(
        re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in (gpu, f"cuda{cuda}", f"tensorrt{tensorrt}")
    )
    return root / "variator-export" / "timing" / f"{name}.cache"


class TimingCache:
    """One file.

    Args:
        path: Of the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, config: Any, *, must_exist: bool) -> None:
        """Give what the file holds to a builder configuration.

        Raises:
            UserError: There is no file and there must be one, or it belongs to another GPU or version.
        """
        if must_exist and not self._path.is_file():
            raise UserError(
                f"There is no timing cache {self._path}.",
                "Build once with --timing-cache use on this GPU, or copy the file from a machine with it.",
            )
        content = self._path.read_bytes() if self._path.is_file() else b""
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            raise UserError(
                f"TensorRT refuses the timing cache {self._path}: broken, or of another GPU or version.",
                f"Remove it: rm '{self._path}'",
            )

    def store(self, config: Any) -> None:
        """Put what a build found into the file, beside what other builds put there meanwhile."""
        found = config.get_timing_cache()
        if found is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            there = config.create_timing_cache(self._path.read_bytes() if self._path.is_file() else b"")
            merged = there if there is not None and there.combine(found, False) else found
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                file.write(bytes(merged.serialize()))
            Path(file.name).replace(self._path)
