"""The folder of the recipes and plugins that ship with the package."""

from importlib import resources
from pathlib import Path

# The prefix of the path of a plugin or a backbone that ships with the recipes.
RECIPES_PREFIX = "recipes:"


def recipes_folder() -> Path:
    """The folder of the package's recipes."""
    # A folder on disk: the package declares that it cannot run from an archive (pyproject.toml, zip-safe).
    return Path(str(resources.files("variator_export.recipes")))
