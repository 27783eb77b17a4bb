"""A variant of a build, as planned."""

import re
from dataclasses import dataclass

from variator_export.core.assembly import Assembly
from variator_export.model.plugin_file import ResolvedPlugin
from variator_export.recipe.recipe import PluginRecipe

BASELINE = "ratio-1"
# The method of assemblies.
MODULAR = "modular"
# Names of other files of a bundle, and of variants of the original layers.
_RESERVED = re.compile(r"any-ratio|any-assembly|model|encoder_model|ratio-\d+")


def is_reserved(name: str) -> bool:
    """Whether a name cannot be chosen for a variant."""
    return _RESERVED.fullmatch(name) is not None


@dataclass(frozen=True)
class VariantPlan:
    """A variant to build.

    Attributes:
        name: Name of the variant.
        ratio: Compression ratio of the variant.
        plugin: The plugin's recipe; None for no plugin.
        files: The plugin's files; None if there are no files to read: for the baseline, for a plugin to be
            initialised, and for a plugin that exists only in the bundle.
        kept: Whether the variant is planned only because the bundle already has it.
        assembly: The assembly; None for the original layers.
        modules: Names of the folders of modules that the assembly takes.
    """

    name: str
    ratio: int
    plugin: PluginRecipe | None
    files: ResolvedPlugin | None = None
    kept: bool = False
    assembly: Assembly | None = None
    modules: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The method that creates the variant."""
        if self.assembly is not None:
            return MODULAR
        return "none" if self.plugin is None else self.plugin.method

    @property
    def plugin_folder(self) -> str | None:
        """The plugin's folder, relative to the bundle; None without a plugin."""
        return None if self.plugin is None else f"plugins/{self.plugin.name}"

    @property
    def module_folders(self) -> tuple[str, ...]:
        """The folders of modules, relative to the bundle."""
        return tuple(f"modules/{name}" for name in self.modules)
