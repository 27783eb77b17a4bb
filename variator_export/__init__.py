"""Export, verify and measure transformers with Variator compression plugins.

    from variator_export import Bundle, build

    build("minilm")
    vectors = Bundle.load("artifacts/minilm").embed(["The ferry leaves at seven."], ratio=4)

Heavy dependencies are imported only when they are used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from variator_export.benchmark.bundle_benchmark import bench
    from variator_export.benchmark.text_benchmark import bench_text
    from variator_export.building.evaluate import evaluate
    from variator_export.building.recipe_build import BuildResult, build
    from variator_export.core.errors import NumbersDisagreeError, UserError
    from variator_export.data.example_files import read_examples
    from variator_export.data.examples import Columns
    from variator_export.recipe.recipe import Recipe
    from variator_export.recipe.recipe_file import load_recipe
    from variator_export.reporting.bundle_report import report
    from variator_export.sessions import Bundle
    from variator_export.verification.bundle_verification import verify

_HOMES = {
    "Bundle": "variator_export.sessions",
    "Columns": "variator_export.data.examples",
    "BuildResult": "variator_export.building.recipe_build",
    "NumbersDisagreeError": "variator_export.core.errors",
    "Recipe": "variator_export.recipe.recipe",
    "UserError": "variator_export.core.errors",
    "bench": "variator_export.benchmark.bundle_benchmark",
    "bench_text": "variator_export.benchmark.text_benchmark",
    "build": "variator_export.building.recipe_build",
    "evaluate": "variator_export.building.evaluate",
    "load_recipe": "variator_export.recipe.recipe_file",
    "read_examples": "variator_export.data.example_files",
    "report": "variator_export.reporting.bundle_report",
    "verify": "variator_export.verification.bundle_verification",
}

__all__ = [
    "BuildResult",
    "Bundle",
    "Columns",
    "NumbersDisagreeError",
    "Recipe",
    "UserError",
    "__version__",
    "bench",
    "bench_text",
    "build",
    "evaluate",
    "load_recipe",
    "read_examples",
    "report",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("variator-export")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
