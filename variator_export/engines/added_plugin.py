"""Plugins added to a running session, besides those of its bundle."""

import re
from collections.abc import Iterable
from pathlib import Path

from variator_export.bundle.manifest import BackboneEntry, Variant
from variator_export.core.errors import UserError
from variator_export.model.plugin_file import PluginHost, check_plugin_fits, load_plugin
from variator_export.model.plugin_layout import Plugin
from variator_export.model.source import plugin_folder
from variator_export.recipe.recipe import VARIANT_NAME


def load_added_plugin(backbone: BackboneEntry, name: str, source: str | Path, ratio: int | None) -> Plugin:
    """Load a plugin for a session.

    Args:
        backbone: Backbone of the session.
        name: Name of the plugin in the session.
        source: The plugin's folder, `recipes:PATH`, or `hub:ORGANISATION/NAME[/FOLDER][@REVISION]`.
        ratio: Ratio of the plugin that already has this name in the session; None if the name is free.

    Raises:
        UserError: The plugin cannot be read or was made for another backbone, or the name is not valid
            or belongs to a plugin of another ratio.
    """
    if not isinstance(name, str) or not re.fullmatch(VARIANT_NAME, name):
        raise UserError(f"{name!r} is not a valid plugin name.", "Use letters, digits, '.', '_' and '-'.")
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
            "Choose another name for the plugin.",
        )
    return plugin


def refuse_name_of_assembly(variants: Iterable[Variant], name: str) -> None:
    """Refuse to replace the plugin of an assembly: an added plugin runs with the original layers.

    Raises:
        UserError: The name is that of an assembly.
    """
    if any(variant.name == name and variant.assembly_spec is not None for variant in variants):
        raise UserError(
            f"{name} is an assembly; an added plugin runs with the original layers.",
            "Choose another name for the plugin.",
        )


def refuse_added_plugin(variant: str) -> None:
    """Refuse a plugin: a session of one variant has no room for another plugin.

    Raises:
        UserError: Always.
    """
    raise UserError(
        f"This session runs {variant} alone and accepts no other plugin.",
        "Open a session for every ratio: leave out `variant` in bundle.session(...).",
    )
