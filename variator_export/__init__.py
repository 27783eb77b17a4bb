"""Export, verify and measure transformers with Variator compression plugins.

    from variator_export import Bundle, build, load_recipe

    build(load_recipe("minilm"))
    session = Bundle.load("artifacts/minilm").session()
    outputs = session.run(inputs, ratio=4)

Heavy dependencies are imported only when they are used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from variator_export.building.recipe_build import BuildResult, build
    from variator_export.core.errors import NumbersDisagreeError, UserError
    from variator_export.recipe.recipe import Recipe
    from variator_export.recipe.recipe_file import load_recipe
    from variator_export.sessions import Bundle

_HOMES = {
    "Bundle": "variator_export.sessions",
    "BuildResult": "variator_export.building.recipe_build",
    "NumbersDisagreeError": "variator_export.core.errors",
    "Recipe": "variator_export.recipe.recipe",
    "UserError": "variator_export.core.errors",
    "build": "variator_export.building.recipe_build",
    "load_recipe": "variator_export.recipe.recipe_file",
}

__all__ = [
    "BuildResult",
    "Bundle",
    "NumbersDisagreeError",
    "Recipe",
    "UserError",
    "__version__",
    "build",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("variator-export")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
