"""What a build has to make: the variants of a recipe, together with those that the bundle has already."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from variator_export.core.errors import UserError
from variator_export.core.manifest import Manifest
from variator_export.core.recipe import PluginRecipe, Recipe
from variator_export.model.plugin_file import load_plugin_config

BASELINE = "ratio-1"


@dataclass(frozen=True)
class VariantPlan:
    """A variant to build.

    Attributes:
        plugin: None for the baseline.
        kept: Whether it is there only because the bundle has it already.
    """

    name: str
    ratio: int
    plugin: PluginRecipe | None
    kept: bool = False


def select_plugins(recipe: Recipe) -> tuple[PluginRecipe, ...]:
    """The plugins that a recipe asks for, with their ratio and name filled in, by ratio and name.

    Raises:
        UserError: A ratio has no plugin, a folder has another ratio than the recipe says, a name comes twice.
    """
    named = tuple(_with_name(plugin) for plugin in recipe.plugins)
    names = [plugin.name for plugin in named]
    for name in names:
        if names.count(name) > 1 or name == BASELINE:
            raise UserError(
                f"The plugin name {name} is used twice."
                if name != BASELINE
                else f"{BASELINE} is the baseline's name.",
                "Name plugins apart: --plugin NAME=DIR, or name: in the recipe.",
            )
    if recipe.ratios is None:
        chosen = named
    else:
        there = sorted({plugin.ratio for plugin in named if plugin.ratio is not None})
        for ratio in recipe.ratios:
            if ratio != 1 and ratio not in there:
                listed = ", ".join(map(str, there)) or "none"
                raise UserError(
                    f"There is no plugin of ratio {ratio}; the recipe {recipe.name} has plugins of the "
                    f"ratios {listed}.",
                    "Choose one of them, or give a plugin: --plugin DIR",
                )
        chosen = tuple(plugin for plugin in named if plugin.ratio in recipe.ratios)
    return tuple(sorted(chosen, key=lambda plugin: (plugin.ratio, plugin.name)))


def parse_ratio(text: str) -> int:
    """A ratio as a user writes it.

    Raises:
        UserError: It is no whole number of at least 1.
    """
    try:
        ratio = int(text)
    except ValueError:
        ratio = 0
    if ratio < 1:
        raise UserError(
            f"The ratio {text!r} is no whole number of at least 1: it says how many neighbouring hidden "
            "vectors become one.",
            "Give, for example, --ratio 4; ratio 1 is the backbone without plugins.",
        )
    return ratio


def merge(recipe: Recipe, weights_sha256: str, old: Manifest | None) -> tuple[Recipe, list[VariantPlan]]:
    """The resolved recipe and its variants, together with what the bundle has already.

    Args:
        recipe: What is asked for now.
        weights_sha256: Of its backbone.
        old: The manifest of the bundle that is there, or None.

    Raises:
        UserError: The bundle holds variants of another backbone, which could not be built again.
    """
    asked = select_plugins(recipe)
    kept: list[PluginRecipe] = []
    targets: Sequence[str] = recipe.targets
    if old is not None:
        before = Recipe.model_validate(old.recipe)
        names = {plugin.name for plugin in asked}
        kept = [plugin for plugin in before.plugins if plugin.name not in names]
        targets = [*before.targets, *recipe.targets]
        if kept and old.backbone.weights_sha256 != weights_sha256:
            raise UserError(
                f"The bundle has {', '.join(str(plugin.name) for plugin in kept)} of another backbone: its "
                f"weights have the sha256 {old.backbone.weights_sha256}, those of {recipe.backbone.source} "
                f"have {weights_sha256}.",
                "Choose another folder with --output, or start the bundle afresh with --replace.",
            )
    kept_names = {plugin.name for plugin in kept}
    plugins = tuple(sorted((*asked, *kept), key=lambda plugin: (plugin.ratio, plugin.name)))
    resolved = recipe.model_copy(
        update={
            "plugins": plugins,
            "ratios": (1, *sorted({plugin.ratio for plugin in plugins if plugin.ratio})),
            "targets": tuple(dict.fromkeys(sorted(targets))),
        }
    )
    variants = [VariantPlan(BASELINE, 1, None)]
    for plugin in plugins:
        assert plugin.name is not None
        assert plugin.ratio is not None
        variants.append(VariantPlan(plugin.name, plugin.ratio, plugin, kept=plugin.name in kept_names))
    return resolved, variants


def _with_name(plugin: PluginRecipe) -> PluginRecipe:
    ratio = plugin.ratio
    if plugin.source is not None:
        found = load_plugin_config(Path(plugin.source)).ratio
        if ratio is not None and found != ratio:
            raise UserError(
                f"The plugin {plugin.source} has ratio {found}; the recipe says {ratio}.",
                "Correct the ratio in the recipe, or give the right folder.",
            )
        if found == 1:
            raise UserError(
                f"The plugin {plugin.source} has ratio 1, which compresses nothing.",
                "The baseline comes along by itself; give a plugin of ratio 2 or more.",
            )
        ratio = found
    return plugin.model_copy(update={"ratio": ratio, "name": plugin.name or f"ratio-{ratio}"})
