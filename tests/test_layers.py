"""Imports flow down only, and looking at the package imports nothing heavy."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import variator_export

PACKAGE = Path(variator_export.__file__).parent
# From high to low; those of one line do not import each other.
LAYERS = [
    {"cli"},
    {"reporting"},
    {"building"},
    {"quality", "serving"},
    {"benchmark"},
    {"verification"},
    {"sessions"},
    {"inference", "text_to_text"},
    {"engines", "graph", "training"},
    {"model"},
    {"bundle", "recipe", "data", "text", "generation", "kernels"},
    {"core"},
]
# The way in of optimum-cli, which is above everything.
ABOVE = {"optimum_commands"}
HEAVY = {
    "accelerate",
    "datasets",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "scipy",
    "sklearn",
    "tensorrt_rtx",
    "torch",
    "transformers",
    "triton",
}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("variator_export.")
    }


def _part(module: str) -> str:
    return module.split(".")[1]


def _level(part: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_imports_flow_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own in ("__init__", "__main__", *ABOVE):
        return  # the package's own face
    for module in _imports(path):
        other = _part(module)
        allowed = other == own or _level(other) > _level(own)
        assert allowed, f"{path.relative_to(PACKAGE)} imports {module}"


def test_folders_stay_small() -> None:
    for folder in (PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())):
        lines = sum(len(path.read_text().splitlines()) for path in folder.glob("*.py"))
        assert lines <= 2500, folder


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "code",
    [
        "import variator_export",
        "from variator_export import load_recipe; load_recipe('minilm')",
        "from variator_export import Bundle",
        "import variator_export.cli.main",
        "import variator_export.benchmark.timing",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code: str) -> None:
    script = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(result.stdout))


def test_every_folder_is_in_the_wheel() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} <= listed
