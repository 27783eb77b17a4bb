"""The folder of recipes, and the plugins beside them, that the package brings."""

from importlib import resources
from pathlib import Path

# Before the path of a plugin that comes with the recipes.
RECIPES_PREFIX = "recipes:"


def recipes_folder() -> Path:
    """Where the recipes of the package lie."""
    # A folder on disk: the package says that it cannot run from an archive (pyproject.toml, zip-safe).
    return Path(str(resources.files("variator_export.recipes")))
