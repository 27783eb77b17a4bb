"""The recipe that a bundle was built from, as its manifest holds it."""

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import MANIFEST_NAME
from variator_export.recipe.recipe import Recipe
from variator_export.recipe.recipe_file import parse_recipe


def recipe_of(bundle: BundleFiles) -> Recipe:
    """The recipe in a bundle's manifest; its settings of the speed measurement are not stored.

    Raises:
        UserError: The manifest holds something else.
    """
    return parse_recipe(bundle.manifest.recipe, f"the recipe in {bundle.path / MANIFEST_NAME}")
