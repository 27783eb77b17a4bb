"""Files in the user's cache folder for what builders and runtimes would otherwise compute again."""

import os
import re
import tempfile
from pathlib import Path


def cache_file(kind: str, *parts: str) -> Path:
    """Path of a cache.

    Args:
        kind: Folder of the caches of this kind.
        parts: What a cache belongs to: a GPU, a version, an engine.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts)
    return root / "variator-export" / kind / f"{name}.cache"


def read_cache(path: Path) -> bytes:
    """The content of a cache; empty if there is none."""
    return path.read_bytes() if path.is_file() else b""


def replace_cache(path: Path, content: bytes) -> None:
    """Replace a cache in a folder that exists as a whole: who reads it sees the old or the new content."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
