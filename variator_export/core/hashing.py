"""Hashes of files and of the inputs of a build step."""

import ast
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
    """One sha256 for several files by name. A single file keeps its own sha256."""
    if len(files) == 1:
        return sha256_file(next(iter(files.values())))
    return sha256_json({name: sha256_file(path) for name, path in files.items()})


@cache
def code_digest(*parts: str) -> str:
    """The sha256 of the source code in some folders and files of this package.

    A version number does not change with every edit, but a graph built by other code is not up to date.
    Comments, docstrings and layout do not affect results, so they are left out.

    Args:
        parts: Folders and files below the package, for example `graph` and `model/plugin.py`.
    """
    package = Path(__file__).resolve().parent.parent
    sources: dict[str, str] = {}
    for part in parts:
        path = package / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            _remove_docstrings(tree)
            sources[str(file.relative_to(package))] = ast.dump(tree)
    return sha256_json(sources)


def _remove_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                statement
                for statement in node.body
                if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
            ]
