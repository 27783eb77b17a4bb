"""Plugins that a running session takes besides those of its bundle."""

import re
from pathlib import Path

from variator_export.bundle.manifest import BackboneEntry
from variator_export.core.errors import UserError
from variator_export.model.plugin_file import PluginHost, check_plugin_fits, load_plugin
from variator_export.model.plugin_layout import Plugin
from variator_export.model.source import plugin_folder
from variator_export.recipe.recipe import VARIANT_NAME


def load_added_plugin(backbone: BackboneEntry, name: str, source: str | Path, ratio: int | None) -> Plugin:
    """A plugin for a session.

    Args:
        backbone: The session's.
        name: What to call it.
        source: Its folder, `recipes:PATH`, or `hub:ORGANISATION/NAME[/FOLDER][@REVISION]`.
        ratio: The ratio of what has this name in the session already; None: nothing has.

    Raises:
        UserError: It cannot be read, was made for another backbone, or the name is none or that of a plugin
            of another ratio.
    """
    if not isinstance(name, str) or not re.fullmatch(VARIANT_NAME, name):
        raise UserError(f"{name!r} is no name of a plugin.", "Take letters, digits, '.', '_' and '-'.")
    plugin = load_plugin(plugin_folder(str(source)))
    host = PluginHost(
        name=backbone.source,
        model_type=backbone.model_type,
        hidden_size=backbone.hidden_size,
        num_layers=backbone.num_layers,
        weights_sha256=backbone.weights_sha256,
    )
    check_plugin_fits(plugin.config, str(source), host)
    if ratio is not None and ratio != plugin.config.ratio:
        raise UserError(
            f"{name} has the ratio {ratio}; the plugin {source} has {plugin.config.ratio}.",
            "Give it a name of its own.",
        )
    return plugin


def refuse_added_plugin(variant: str) -> None:
    """A session of one variant has no place for another plugin.

    Raises:
        UserError: Always.
    """
    raise UserError(
        f"This session runs {variant} alone and takes no other plugin.",
        "Open one for every ratio: bundle.session() without a variant.",
    )
