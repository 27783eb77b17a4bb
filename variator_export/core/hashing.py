"""Hashes of files and of the inputs of a step."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The sha256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_files(files: Mapping[str, Path]) -> str:
    """One sha256 for several files by name. One file alone has its own sha256."""
    if len(files) == 1:
        return sha256_file(next(iter(files.values())))
    return sha256_json({name: sha256_file(path) for name, path in files.items()})


@cache
def code_digest(part: str = ".") -> str:
    """The sha256 of this package's source, or of one folder of it.

    A version number does not change between two edits; a graph made by other code is not up to date.
    """
    package = Path(__file__).resolve().parent.parent / part
    sources = {str(path.relative_to(package)): sha256_file(path) for path in sorted(package.rglob("*.py"))}
    return sha256_json(sources)
