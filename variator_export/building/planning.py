"""The beginning of a build: its plan, and the trace, which budgets need before the plan is whole."""

from collections.abc import Mapping, Sequence

from variator_export.building.context import BuildContext
from variator_export.building.plan import AskedPlugin, BuildPlan, merge, recipe_of
from variator_export.building.plan_modular import ModulesPlan, keep_modules
from variator_export.building.staging import StagedBundle
from variator_export.building.steps import graphs as steps
from variator_export.building.steps import modular, strategies, text_to_text
from variator_export.building.steps.calibrate import calibrate_backbone
from variator_export.building.steps.quality import read_request
from variator_export.engines.onnxruntime.kernels import check_quantized
from variator_export.model.source import BackboneSource
from variator_export.quality.evaluation import Request
from variator_export.recipe.assemblies import AssemblyRecipe
from variator_export.recipe.recipe import Recipe


def plan_build(
    recipe: Recipe,
    asked: Sequence[AskedPlugin],
    modules: Sequence[ModulesPlan],
    source: BackboneSource,
    staged: StagedBundle,
) -> tuple[BuildPlan, BuildContext, Request | None]:
    """Plan a build, and read the data of its evaluation.

    For a budget that is new, the backbone is traced and its layers are timed first.
    """
    old = staged.old
    before = None if old is None else recipe_of(old.manifest)
    known = strategies.read_strategies(recipe, before, keep_modules(modules, before, old), old)

    def plan_with(chosen: Mapping[str, AssemblyRecipe]) -> BuildPlan:
        entries = [entry for entry in recipe.assemblies if entry.name not in chosen]
        # A variant that is not chosen yet is no variant, and cannot be the default one.
        missing = {str(entry.name) for entry in known.all} - chosen.keys()
        graphs = recipe.graphs
        if graphs.default_variant in missing:
            graphs = graphs.model_copy(update={"default_variant": None})
        change = {"assemblies": (*entries, *chosen.values()), "strategies": known.all, "graphs": graphs}
        changed = recipe.model_copy(update=change)
        return merge(changed, asked, modules, source.weights_sha256, old, without=missing)

    chosen = dict(known.chosen)
    plan = plan_with(chosen)
    context = BuildContext(staged, plan.recipe, source)
    context.keeps_calibration = old is not None and recipe.quantization.calibration is None
    request = read_request(context)  # rejects data that cannot be measured before the slow trace
    if fresh := known.fresh:
        strategies.check(context, fresh, plan.modules)
        modular.check_plan(context, plan.variants, plan.modules)
        trace(context, plan)
        chosen |= strategies.choose(context, fresh, plan.modules)
        plan = plan_with(chosen)
        context.recipe = plan.recipe
    strategies.record_choices(context, known, plan.modules, chosen)
    return plan, context, request


def trace(context: BuildContext, plan: BuildPlan) -> None:
    """Copy the backbone's files, make the plugins, and trace the backbone."""
    if context.generates:
        text_to_text.check_recipe(context)
    steps.copy_backbone_files(context)
    graphs = context.recipe.graphs
    assert graphs.opset is not None
    if context.quantizes:
        check_quantized(context.recipe.precision, graphs.opset)
    with_plugins = plan.with_plugins
    for variant in with_plugins:
        steps.make_plugin(context, variant)
    calibrate_backbone(context)
    for modules in plan.modules:
        modular.copy_modules(context, modules)
    steps.trace_backbone(context, with_plugins)
