"""What a build has to make: the variants of a recipe, together with those that the bundle has already."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from variator_export.bundle.manifest import Manifest
from variator_export.core.errors import UserError
from variator_export.core.validation import describe_validation_error
from variator_export.engines.targets import GRAPHS
from variator_export.model.methods import METHODS
from variator_export.model.plugin_file import ResolvedPlugin, resolve_plugin
from variator_export.model.source import pin_source, plugin_folder
from variator_export.recipe.recipe import PluginRecipe, Recipe

BASELINE = "ratio-1"


@dataclass(frozen=True)
class VariantPlan:
    """A variant to build.

    Attributes:
        plugin: None for the baseline.
        files: The plugin's files; None where there are none to read: for the baseline, a plugin that is
            initialised, and one that only the bundle has.
        kept: Whether it is there only because the bundle has it already.
    """

    name: str
    ratio: int
    plugin: PluginRecipe | None
    files: ResolvedPlugin | None = None
    kept: bool = False

    @property
    def method(self) -> str:
        """The method that makes it."""
        return "none" if self.plugin is None else self.plugin.method


@dataclass(frozen=True)
class AskedPlugin:
    """A plugin that a recipe asks for.

    Attributes:
        recipe: Its entry, with ratio and name filled in.
        files: What its source holds; None: it is initialised.
    """

    recipe: PluginRecipe
    files: ResolvedPlugin | None


def pin_sources(recipe: Recipe) -> Recipe:
    """The recipe with the commits that its branches and tags of the hub are now, for the whole build.

    Raises:
        UserError: The hub has no such repository or revision, or cannot be reached.
    """
    backbone = recipe.backbone.model_copy(update={"source": pin_source(recipe.backbone.source)})
    plugins = tuple(
        plugin.model_copy(update={"source": pin_source(plugin.source)}) if plugin.source else plugin
        for plugin in recipe.plugins
    )
    return recipe.model_copy(update={"backbone": backbone, "plugins": plugins})


def select_plugins(recipe: Recipe) -> tuple[AskedPlugin, ...]:
    """The plugins that a recipe asks for, with their ratio and name filled in, by ratio and name.

    Raises:
        UserError: A ratio has no plugin, a folder has another ratio than the recipe says, a name comes twice.
    """
    named = tuple(map(_resolve, recipe.plugins))
    names = [plugin.recipe.name for plugin in named]
    for plugin in (asked.recipe for asked in named):
        if names.count(plugin.name) > 1:
            raise UserError(
                f"The plugin name {plugin.name} is used twice.",
                "Name plugins apart: --plugin NAME=DIR, or name: in the recipe.",
            )
        if plugin.name in (BASELINE, "any-ratio") or (
            re.fullmatch(r"ratio-\d+", str(plugin.name)) and plugin.name != f"ratio-{plugin.ratio}"
        ):
            raise UserError(
                f"A plugin of ratio {plugin.ratio} cannot have the name {plugin.name}, which means another "
                "variant.",
                "Choose another name: --plugin NAME=DIR, or name: in the recipe.",
            )
    if recipe.ratios is None:
        chosen = named
    else:
        there = sorted({asked.recipe.ratio for asked in named if asked.recipe.ratio is not None})
        for ratio in recipe.ratios:
            if ratio != 1 and ratio not in there:
                listed = ", ".join(map(str, there)) or "none"
                raise UserError(
                    f"There is no plugin of ratio {ratio}; there are plugins of the ratios {listed}.",
                    "Choose one of them, or give a plugin: --plugin DIR",
                )
        chosen = tuple(asked for asked in named if asked.recipe.ratio in recipe.ratios)
    return tuple(sorted(chosen, key=lambda asked: (asked.recipe.ratio, asked.recipe.name)))


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


def merge(
    recipe: Recipe, asked: Sequence[AskedPlugin], weights_sha256: str, old: Manifest | None
) -> tuple[Recipe, list[VariantPlan]]:
    """The resolved recipe and its variants, together with what the bundle has already.

    Args:
        recipe: What is asked for now.
        asked: Its plugins (`select_plugins`).
        weights_sha256: Of its backbone.
        old: The manifest of the bundle that is there, or None.

    Raises:
        UserError: The bundle is of another backbone or precision, or a trained plugin would be lost.
    """
    kept: list[PluginRecipe] = []
    if old is not None:
        if old.backbone.weights_sha256 != weights_sha256:
            raise UserError(
                f"The bundle is of another backbone: {old.backbone.source}, whose weights have the sha256 "
                f"{old.backbone.weights_sha256}; those of {recipe.backbone.source} have {weights_sha256}.",
                "Choose another folder with --output, or start the bundle afresh with --replace.",
            )
        if old.precision != recipe.precision:
            raise UserError(
                f"The bundle is in {old.precision}; {recipe.precision} is asked for. A bundle has one "
                "precision: another one has weights of its own.",
                "Choose another folder with --output, or start the bundle afresh with --replace.",
            )
        _keep_trained(asked, old)
        names = {plugin.recipe.name for plugin in asked}
        kept = [plugin for plugin in _recipe_of(old).plugins if plugin.name not in names]
    plans = [_plan(plugin.recipe, plugin.files) for plugin in asked]
    plans += [_plan(plugin, None, kept=True) for plugin in kept]
    plans.sort(key=lambda plan: (plan.ratio, plan.name))
    resolved = recipe.model_copy(
        update={
            "plugins": tuple(plan.plugin for plan in plans),
            "ratios": (1, *sorted({plan.ratio for plan in plans})),
            "targets": tuple(sorted({GRAPHS, *recipe.targets})),
        }
    )
    return resolved, [VariantPlan(BASELINE, 1, None), *plans]


def _plan(plugin: PluginRecipe, files: ResolvedPlugin | None, *, kept: bool = False) -> VariantPlan:
    assert plugin.name is not None
    assert plugin.ratio is not None
    return VariantPlan(plugin.name, plugin.ratio, plugin, files, kept=kept)


def _recipe_of(old: Manifest) -> Recipe:
    try:
        return Recipe.model_validate(old.recipe)
    except ValidationError as error:
        raise UserError(
            "The recipe in the bundle's manifest does not validate: "
            f"{describe_validation_error(error, Recipe)}",
            "Start the bundle afresh with --replace, or choose another folder with --output.",
        ) from error


def _keep_trained(asked: Sequence[AskedPlugin], old: Manifest) -> None:
    """An untrained plugin does not take the place of a trained one by a forgotten argument."""
    trained = {v.name for v in old.variants if v.plugin is not None and v.plugin.trained}
    lost = [
        str(plugin.recipe.name)
        for plugin in asked
        if plugin.recipe.name in trained and not (plugin.files and plugin.files.config.training is not None)
    ]
    if lost:
        raise UserError(
            f"The bundle has a trained plugin {lost[0]}; the recipe would replace it by an initialised one.",
            "Give the recipe or the --plugin that the bundle was built from, or --replace.",
        )


def _resolve(plugin: PluginRecipe) -> AskedPlugin:
    """Read what a plugin's source says of it, once for the whole build."""
    METHODS.find(plugin.method)  # refuses an unknown one
    ratio, files = plugin.ratio, None
    if plugin.source is not None:
        files = resolve_plugin(plugin_folder(plugin.source))
        found = files.config.ratio
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
    named = plugin.model_copy(update={"ratio": ratio, "name": plugin.name or f"ratio-{ratio}"})
    return AskedPlugin(named, files)
