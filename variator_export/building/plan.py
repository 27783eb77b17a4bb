"""Planning a build: the variants of a recipe, together with the variants that the bundle already has."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from variator_export.building.plan_modular import (
    ModulesPlan,
    keep_assemblies,
    keep_modules,
    plan_assemblies,
)
from variator_export.building.variant_plan import BASELINE, MODULAR, VariantPlan, is_reserved
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import Manifest
from variator_export.core.assembly import parse_assembly
from variator_export.core.errors import UserError
from variator_export.core.validation import describe_validation_error
from variator_export.engines.targets import GRAPHS
from variator_export.model.methods import METHODS
from variator_export.model.plugin_file import ResolvedPlugin, resolve_plugin
from variator_export.model.source import pin_source, plugin_folder
from variator_export.recipe.assemblies import AssemblyRecipe
from variator_export.recipe.recipe import GraphsRecipe, PluginRecipe, Recipe


@dataclass(frozen=True)
class AskedPlugin:
    """A plugin that a recipe asks for.

    Attributes:
        recipe: The plugin's entry in the recipe, with ratio and name filled in.
        files: The files of the plugin's source; None if the plugin is to be initialised.
    """

    recipe: PluginRecipe
    files: ResolvedPlugin | None


def pin_sources(recipe: Recipe) -> Recipe:
    """Replace the recipe's hub branches and tags by their current commits, which the whole build then uses.

    Raises:
        UserError: The hub does not have a repository or revision, or cannot be reached.
    """
    backbone = recipe.backbone.model_copy(update={"source": pin_source(recipe.backbone.source)})
    plugins = tuple(
        plugin.model_copy(update={"source": pin_source(plugin.source)}) if plugin.source else plugin
        for plugin in recipe.plugins
    )
    modules = tuple(entry.model_copy(update={"source": pin_source(entry.source)}) for entry in recipe.modules)
    return recipe.model_copy(update={"backbone": backbone, "plugins": plugins, "modules": modules})


def select_plugins(recipe: Recipe) -> tuple[AskedPlugin, ...]:
    """Return the plugins that a recipe asks for, ratio and name filled in, sorted by ratio and name.

    Raises:
        UserError: A ratio has no plugin, a plugin's ratio differs from the ratio in the recipe, or a name is
            used twice.
    """
    named = tuple(map(_resolve, recipe.plugins))
    names = [plugin.recipe.name for plugin in named]
    for plugin in (asked.recipe for asked in named):
        if names.count(plugin.name) > 1:
            raise UserError(
                f"The plugin name {plugin.name} is used twice.",
                "Give each plugin its own name: --plugin NAME=DIR, or name: in the recipe.",
            )
        if is_reserved(str(plugin.name)) and plugin.name != f"ratio-{plugin.ratio}":
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
    """Parse a ratio that a user typed.

    Raises:
        UserError: The text is not a whole number of at least 1.
    """
    try:
        ratio = int(text)
    except ValueError:
        ratio = 0
    if ratio < 1:
        raise UserError(
            f"The ratio {text!r} is not a whole number of at least 1: it is the number of neighbouring "
            "hidden vectors that are merged into one.",
            "Give, for example, --ratio 4; ratio 1 is the backbone without plugins.",
        )
    return ratio


def _refuse_other_words(recipe: Recipe, old: Manifest) -> None:
    """Refuse to make another classifier, or a generator, of a bundle with label words, and the reverse."""
    asked, there = recipe.backbone, old.backbone
    words = [None if w is None else list(w.items()) for w in (asked.label_words, there.label_words)]
    if words[0] == words[1] and asked.decoder_prompt == there.decoder_prompt:
        return
    known = ", ".join(f"{label}={word}" for label, word in (there.label_words or {}).items()) or "none"
    prompt = f" after {there.decoder_prompt!r}" if there.decoder_prompt else ""
    raise UserError(
        f"The bundle's label words are {known}{prompt}; others are asked for.",
        "Give the same --label-word and --decoder-prompt, choose another folder with --output, or start the "
        "bundle afresh with --replace.",
    )


@dataclass(frozen=True)
class BuildPlan:
    """What a build makes.

    Attributes:
        recipe: The resolved recipe.
        variants: The variants, the baseline first.
        modules: The folders of modules that assemblies may take.
    """

    recipe: Recipe
    variants: tuple[VariantPlan, ...]
    modules: tuple[ModulesPlan, ...] = ()

    @property
    def with_plugins(self) -> list[VariantPlan]:
        """The variants of the original layers that have a plugin."""
        return [variant for variant in self.variants if variant.plugin and variant.assembly is None]


def merge(
    recipe: Recipe,
    asked: Sequence[AskedPlugin],
    modules: Sequence[ModulesPlan],
    weights_sha256: str,
    old_bundle: BundleFiles | None,
    *,
    without: Collection[str] = (),
) -> BuildPlan:
    """Merge a recipe with the existing bundle into the resolved recipe and its variants.

    Args:
        recipe: The recipe to build now.
        asked: The recipe's plugins (`select_plugins`).
        modules: The recipe's modules (`select_modules`).
        weights_sha256: Hash of the weights of the recipe's backbone.
        old_bundle: The existing bundle; None if there is none.
        without: Names of assemblies of the bundle that are not kept.

    Returns:
        The plan, with the variants and modules that the bundle already has.

    Raises:
        UserError: The bundle has another backbone or precision, or a trained plugin would be lost.
    """
    old = None if old_bundle is None else old_bundle.manifest
    kept: list[PluginRecipe] = []
    before: Recipe | None = None
    if old is not None:
        if old.backbone.weights_sha256 != weights_sha256:
            raise UserError(
                f"The bundle is of another backbone: {old.backbone.source}, whose weights have the sha256 "
                f"{old.backbone.weights_sha256}. The weights of {recipe.backbone.source} have the sha256 "
                f"{weights_sha256}.",
                "Choose another folder with --output, or start the bundle afresh with --replace.",
            )
        if old.precision != recipe.precision:
            raise UserError(
                f"The bundle is in {old.precision}; {recipe.precision} is asked for. A bundle has only one "
                "precision, because each precision has its own weights.",
                "Choose another folder with --output, or start the bundle afresh with --replace.",
            )
        _refuse_other_words(recipe, old)
        _keep_trained(asked, old)
        before = recipe_of(old)
        names = {plugin.recipe.name for plugin in asked}
        kept = [plugin for plugin in before.plugins if plugin.name not in names]
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
    all_modules = keep_modules(modules, before, old_bundle)
    variants = [VariantPlan(BASELINE, 1, None), *plans]
    wanted = [e for e in keep_assemblies(_of_ratios(recipe), before) if e.name not in without]
    assembled, assemblies = plan_assemblies(wanted, variants, all_modules)
    variants += assembled
    resolved = resolved.model_copy(
        update={"modules": tuple(plan.recipe for plan in all_modules), "assemblies": assemblies}
    )
    there = None if before is None else before.graphs
    if there is not None and there.default_variant in without:
        there = there.model_copy(update={"default_variant": None})
    graphs = _graphs(recipe.graphs, variants, there)
    quantization = recipe.quantization
    if before is not None and quantization.calibration is None:
        quantization = quantization.model_copy(update={"calibration": before.quantization.calibration})
    resolved = resolved.model_copy(update={"graphs": graphs, "quantization": quantization})
    return BuildPlan(resolved, tuple(variants), all_modules)


def _of_ratios(recipe: Recipe) -> tuple[AssemblyRecipe, ...]:
    """The recipe's assemblies without those of ratios that it has plugins for, but does not build."""
    if recipe.ratios is None:
        return recipe.assemblies
    ratios = (None, 1, *recipe.ratios)
    return tuple(entry for entry in recipe.assemblies if parse_assembly(entry.spec)[1] in ratios)


def _graphs(asked: GraphsRecipe, variants: Sequence[VariantPlan], old: GraphsRecipe | None) -> GraphsRecipe:
    """Fill in what a recipe leaves open: as the bundle has it, or else the defaults."""
    values = {name: value for name, value in asked if value is not None}
    kept = {name: value for name, value in old if value is not None} if old is not None else {}
    found = GraphsRecipe.model_validate({"opset": 23, "adapters": False, **kept, **values})
    return found.model_copy(update={"default_variant": _default_variant(found.default_variant, variants)})


def _default_variant(asked: int | str | None, variants: Sequence[VariantPlan]) -> str:
    if asked is None:
        return BASELINE
    found = [p.name for p in variants if asked == p.name or (asked == p.ratio and p.assembly is None)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{plan.name} (ratio {plan.ratio})" for plan in variants)
    raise UserError(
        f"The default variant is {asked!r}; {'several variants match' if found else 'no variant matches'}: "
        f"{there}.",
        "Name one of them: --default-variant NAME, or graphs.default_variant in the recipe.",
    )


def _plan(plugin: PluginRecipe, files: ResolvedPlugin | None, *, kept: bool = False) -> VariantPlan:
    assert plugin.name is not None
    assert plugin.ratio is not None
    return VariantPlan(plugin.name, plugin.ratio, plugin, files, kept=kept)


def recipe_of(old: Manifest) -> Recipe:
    """The recipe that a bundle was built from.

    Raises:
        UserError: It does not validate.
    """
    try:
        return Recipe.model_validate(old.recipe)
    except ValidationError as error:
        raise UserError(
            "The recipe in the bundle's manifest does not validate: "
            f"{describe_validation_error(error, Recipe)}",
            "Start the bundle afresh with --replace, or choose another folder with --output.",
        ) from error


def _keep_trained(asked: Sequence[AskedPlugin], old: Manifest) -> None:
    """Refuse to replace a trained plugin by an untrained one, because an argument was probably forgotten."""
    trained = {v.name for v in old.variants if v.plugin is not None and v.plugin.trained}
    lost = [
        str(plugin.recipe.name)
        for plugin in asked
        if plugin.recipe.name in trained and not (plugin.files and plugin.files.config.training is not None)
    ]
    if lost:
        raise UserError(
            f"The bundle has a trained plugin {lost[0]}; the recipe would replace it by an untrained one.",
            "Give the recipe or the --plugin that the bundle was built from, or use --replace.",
        )


def _resolve(plugin: PluginRecipe) -> AskedPlugin:
    """Read a plugin's source, once for the whole build, and fill in ratio and name."""
    METHODS.find(plugin.method)  # rejects an unknown method
    if plugin.method == MODULAR:
        raise UserError(
            f"{MODULAR} is no method of a plugin.", "List modules and assemblies in the recipe instead."
        )
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
                "The baseline is always included; give a plugin of ratio 2 or more.",
            )
        ratio = found
    named = plugin.model_copy(update={"ratio": ratio, "name": plugin.name or f"ratio-{ratio}"})
    return AskedPlugin(named, files)
