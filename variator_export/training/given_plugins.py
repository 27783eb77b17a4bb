"""Existing plugins that are trained further."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.model.backbone import Backbone
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_file import load_plugin, load_plugin_config, plugin_sha256

# The same names as are allowed for variants (`recipe.recipe`).
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class GivenPlugins:
    """Plugins to train further.

    Attributes:
        modules: The plugins by name, bound to the backbone that they were loaded for.
        parents: Origin of each plugin, for `plugin_config.json`: its name, digest and training record.
    """

    modules: Mapping[str, CompressionPlugin]
    parents: Mapping[str, dict[str, Any]]


def load_given(folders: Mapping[str, Path], backbone: Backbone) -> GivenPlugins:
    """Load plugins to train them further on a backbone.

    The backbone may be a fine-tuned version of the backbone that the plugins were trained for.

    Raises:
        UserError: A name is not valid as a folder name, or a plugin cannot be read or does not fit the
            backbone.
    """
    for name in folders:
        check_name(name)
    modules = {name: _load(folder, backbone) for name, folder in folders.items()}
    parents = {
        name: {
            "name": name,
            "sha256": plugin_sha256(folder),
            "training": load_plugin_config(folder).training,
        }
        for name, folder in folders.items()
    }
    return GivenPlugins(modules, parents)


def check_name(name: str) -> None:
    """Check the name of a result of a training.

    Raises:
        UserError: It cannot name a folder.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot be a name, because the name is also used for the folder.",
            "Use letters, digits, '-', '_' and '.', and begin with a letter or a digit.",
        )


def _load(folder: Path, backbone: Backbone) -> CompressionPlugin:
    module = CompressionPlugin.from_file(load_plugin(folder)).requires_grad_(True)
    size, config = backbone.info.size, module.config
    if (config.num_layers, config.hidden_size) != (size.num_layers, size.hidden_size):
        raise UserError(
            f"The plugin {folder} is for {config.num_layers} layers of hidden size {config.hidden_size}; "
            f"{backbone.info.source.name} has {size.num_layers} layers of hidden size {size.hidden_size}.",
            "Give plugins that were pre-trained for the model that this backbone was fine-tuned from.",
        )
    if not any(p.any() for layer in module.layer_plugins() for p in layer.decompress.parameters()):
        leave_out_decompression(module)  # the plugin was trained without decompression and stays that way
    # From here on, the plugin belongs to this backbone.
    module.config = dataclasses.replace(config, backbone=backbone.info.identity)
    return module


def leave_out_decompression(plugin: CompressionPlugin) -> None:
    """Set the decompression layers to 0 and freeze them, as an ablation."""
    for layer in plugin.layer_plugins():
        for parameter in layer.decompress.parameters():
            parameter.requires_grad_(False).zero_()
