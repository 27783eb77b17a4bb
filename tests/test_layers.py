"""Imports flow down only, and looking at the package imports nothing heavy."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import variator_export

PACKAGE = Path(variator_export.__file__).parent
# From low to high; `bundle` is what users of a finished bundle open.
LAYERS = [
    "core",
    "data",
    "model",
    "graph",
    "engines",
    "bundle",
    "stages",
    "training",
    "pipeline",
    "cli",
]
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
}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("variator_export.")
    }


def _layer(module: str) -> str | None:
    part = module.split(".")[1]
    return part if part in LAYERS else None


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_imports_flow_down(path: Path) -> None:
    own = _layer("variator_export." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    if own is None:
        return  # the package's own face
    for module in _imports(path):
        other = _layer(module)
        assert other is not None, module
        assert LAYERS.index(other) <= LAYERS.index(own), f"{path.name} imports {module}"


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
        "import variator_export.stages.timing",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code: str) -> None:
    script = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(result.stdout))
