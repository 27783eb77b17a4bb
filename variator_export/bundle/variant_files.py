"""The files that a variant has besides the backbone's: its plugin, and the modules of its assembly."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from variator_export.core.assembly import Assembly

# Files of a folder of modules in a bundle.
MODULE_CONFIG_NAME = "module_config.json"
MODULE_TENSORS_NAME = "modules.safetensors"
# The modules in a bundle whose precision quantises; the other file holds them as they were before.
QUANTIZED_MODULES_NAME = "quantized.safetensors"


@dataclass(frozen=True)
class VariantFiles:
    """A variant's own files.

    Attributes:
        root: The bundle's folder.
        plugin: Folder of the plugin inside the bundle; None for no plugin.
        assembly: The assembly; None for the original layers.
        modules: Folders of modules inside the bundle that the assembly may use.
        switches: The value of `assembly.branches` in the graph that runs every assembly, bool (branches,);
            None for a bundle without assemblies.
    """

    root: Path
    plugin: str | None = None
    assembly: Assembly | None = None
    modules: tuple[str, ...] = ()
    switches: np.ndarray | None = None

    @property
    def plugin_folder(self) -> Path:
        """The plugin's folder. The variant must have a plugin."""
        assert self.plugin is not None
        return self.root / self.plugin
