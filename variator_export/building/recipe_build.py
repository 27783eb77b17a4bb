"""Building a published, verified bundle from a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from variator_export.building.context import BuildContext
from variator_export.building.plan import BuildPlan, pin_sources, select_plugins
from variator_export.building.plan_modular import select_modules
from variator_export.building.planning import plan_build, trace
from variator_export.building.staging import StagedBundle
from variator_export.building.steps import forms, modular, text_to_text
from variator_export.building.steps import graphs as steps
from variator_export.building.steps.engine_sources import EngineSources
from variator_export.building.steps.engines import EngineOrder, check_order, make_engines
from variator_export.building.steps.quality import check_quality
from variator_export.building.steps.speed import speed_of_bundle
from variator_export.building.variant_plan import VariantPlan
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import (
    MANIFEST_NAME,
    BackboneEntry,
    Manifest,
    PluginEntry,
    Variant,
    is_bundle,
)
from variator_export.bundle.origin import store_origin
from variator_export.bundle.parts import PartEntry
from variator_export.bundle.publishing import exclusive
from variator_export.bundle.quality_report import counted_losses, quality_of_graphs
from variator_export.bundle.reports import build_verification_report, read_report
from variator_export.core.environment import require_onnxruntime
from variator_export.core.errors import UserError
from variator_export.core.parts import DECODER
from variator_export.core.precision import find_precision
from variator_export.core.progress import Progress, StepReport
from variator_export.engines.targets import GRAPHS
from variator_export.model.methods import METHODS
from variator_export.model.source import is_plain_folder, resolve_source
from variator_export.recipe.recipe import Recipe
from variator_export.recipe.recipe_file import load_recipe
from variator_export.verification.judging.judge import GIVEN_ROUNDING


@dataclass(frozen=True)
class BuildResult:
    """Result of a build.

    Attributes:
        bundle: The bundle's folder.
        published: False if the bundle was already up to date.
        steps: One report for each step: whether it was run or reused, and why.
        verification: The worst finding of each variant, by variant name.
        losses: What quantisation changes in each variant, by name; empty for other precisions.
        speed: The speed measurement (`building.steps.speed.speed_of_bundle`); None if nothing was measured.
        untrained: Variants whose plugins or modules were not trained.
        plugins_of_assemblies: Variants with modules and a plugin, which was trained for the original layers;
            and what each loses by stored evaluations, as a share of the metric: the most of all data sets.
            None without an evaluation.
        ratios: Ratios of the bundle's variants.
        precision: Precision of the graphs.
    """

    bundle: Path
    published: bool
    steps: tuple[StepReport, ...]
    verification: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    speed: Mapping[str, Any] | None = None
    untrained: tuple[str, ...] = ()
    plugins_of_assemblies: Mapping[str, float | None] = field(default_factory=dict)
    ratios: tuple[int, ...] = ()
    precision: str = "float32"


def build(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Build a bundle, or extend an existing bundle.

    Args:
        recipe: The recipe to build, or the name or file of one, as `load_recipe` takes it. Its `ratios`
            select among its plugins; the baseline is always included.
        output: The bundle's folder; None for `default_bundle`.
        replace: Start from scratch: the folder's contents are removed once the new bundle is complete.
        progress: Receives progress reports.

    Returns:
        The result, whether or not anything had to be built.

    Raises:
        UserError: The input is invalid, or this machine cannot build it. An existing bundle is unchanged.
        NumbersDisagreeError: A graph does not compute the same as eager PyTorch, or a ratio loses more
            quality than the recipe allows. Nothing was published.
    """
    progress = progress or Progress()
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    bundle = Path(output if output is not None else default_bundle(recipe)).resolve()
    recipe = pin_sources(recipe)
    asked = select_plugins(recipe)  # rejects a wrong ratio before anything slow starts
    modules = select_modules(recipe)
    require_onnxruntime()
    order = EngineOrder(recipe.engine, [target for target in recipe.targets if target != GRAPHS])
    versions = check_order(order, recipe.precision)
    source = resolve_source(recipe.backbone.source, recipe.backbone.sha256)
    with exclusive(bundle) as staging:
        old = _old_bundle(bundle, replace=replace)
        staged = StagedBundle(staging, old, progress)
        plan, context, request = plan_build(recipe, asked, modules, source, staged)
        variants = plan.variants
        manifest = _make(context, plan, order, versions)
        if request is not None:
            check_quality(context, manifest, request)
        published = staged.finish(manifest, bundle)
        if is_plain_folder(recipe.backbone.source):
            store_origin(bundle, source.folder)
        speed: Mapping[str, Any] | None = None
        if recipe.speed is not None and context.generates:
            progress.note("speed: not measured in the build: `bench` times models that generate text")
        elif recipe.speed is not None and find_precision(recipe.precision).is_half:
            progress.note(f"speed: not measured: {recipe.precision} is not representative on a CPU")
        elif recipe.speed is not None:
            # Measured while the folder is still locked: parallel builds would distort each other's timings.
            speed = speed_of_bundle(bundle, recipe.speed, context, list(variants), progress)
    return BuildResult(
        bundle=bundle,
        published=published,
        steps=tuple(staged.reports),
        verification={plan.name: worst_finding(bundle, plan.name) for plan in variants},
        losses={p.name: found for p in variants if (found := losses_of_report(bundle, p.name))},
        speed=speed,
        untrained=tuple(v.name for v in manifest.variants if manifest.is_untrained(v)),
        plugins_of_assemblies=_plugins_of_assemblies(bundle, manifest),
        ratios=tuple(v.ratio for v in manifest.variants),
        precision=manifest.precision,
    )


def default_bundle(recipe: Recipe) -> Path:
    """Return the default folder of a recipe's bundle: artifacts/NAME, or artifacts/NAME-PRECISION."""
    return Path("artifacts") / f"{recipe.name}{find_precision(recipe.precision).suffix}"


def _old_bundle(bundle: Path, *, replace: bool) -> BundleFiles | None:
    if not bundle.exists():
        return None
    if not bundle.is_dir():
        raise UserError(f"{bundle} is a file.", "Choose a folder with --output.")
    if not any(bundle.iterdir()):
        return None
    if not is_bundle(bundle):
        raise UserError(
            f"{bundle} holds files but is not a bundle: it has no bundle's {MANIFEST_NAME}.",
            "Choose another folder with --output; nothing in this one was touched.",
        )
    return None if replace else BundleFiles(bundle)


def _make(
    context: BuildContext, plan: BuildPlan, order: EngineOrder, versions: Mapping[str, str]
) -> Manifest:
    """Run all steps. Plugins come first, so that an invalid plugin is rejected before the slow trace."""
    variants, graphs = plan.variants, context.recipe.graphs
    assert graphs.opset is not None
    modular.check_plan(context, variants, plan.modules)
    trace(context, plan)
    modular.assemble_graphs(context, plan.modules)
    if context.generates:
        modular.assemble_decoders(context, variants, plan.modules)
    entries = []
    for variant in variants:
        steps.bind_variant(context, variant)
        entries.append(_variant_entry(context, variant))
    for variant in variants:
        steps.verify_variant(context, variant)
    default = next(variant for variant in variants if variant.name == graphs.default_variant)
    forms.name_default(context, default)
    if graphs.adapters:
        for variant in plan.with_plugins:
            forms.make_adapter(context, variant)
    backbone, any_ratio = _backbone_entry(context), context.traced
    baseline = next(p for p in variants if _is_baseline(p))
    if context.generates:
        text_to_text.make_first_step(context)
        text_to_text.verify_generation(context, variants)
    else:
        steps.check_texts_of_baseline(context, baseline, backbone)
    entries_of_modules = modular.modules_entries(context, plan.modules)
    sources = EngineSources(backbone, entries, entries_of_modules, any_ratio, context.recipe.precision)
    engines = make_engines(context.staged, sources, order, versions)
    targets = tuple(sorted({*context.recipe.targets, *(engine.target for engine in engines)}))
    return Manifest(
        made_by=context.made_by,
        # The speed settings have no influence on the contents of the bundle.
        recipe={**context.recipe.model_dump(mode="json", exclude={"speed"}), "targets": list(targets)},
        backbone=backbone,
        precision=context.recipe.precision,
        opset=graphs.opset,
        any_ratio=any_ratio,
        default_variant=default.name,
        variants=tuple(entries),
        modules=entries_of_modules,
        any_assembly_graph=context.session_graph if context.branches else None,
        branches=context.branches,
        engines=tuple(engines),
    )


def _is_baseline(plan: VariantPlan) -> bool:
    return METHODS.find(plan.method).is_baseline


def _variant_entry(context: BuildContext, plan: VariantPlan) -> Variant:
    plugin = None
    if plan.plugin is not None:
        config = context.plugin_config(plan)
        folder = plan.plugin_folder
        assert folder is not None
        plugin = PluginEntry(
            folder=folder,
            source=plan.plugin.source or "initialised",
            sha256=context.staged.sha256(f"{folder}/plugin.safetensors"),
            masking=config.masking,
            bottleneck_size=config.bottleneck_size,
            trained=config.training is not None,
        )
    return Variant(
        name=plan.name,
        method=plan.method,
        baseline=_is_baseline(plan),
        ratio=plan.ratio,
        plugin=plugin,
        assembly_spec=None if plan.assembly is None else str(plan.assembly),
        modules=plan.modules,
        graphs={context.part: context.graph(plan)}
        | ({DECODER: context.decoder(plan)} if context.generates else {}),
        reference=steps.reference_path(plan),
        precision_proof=steps.precision_proof(context, plan),
    )


def _backbone_entry(context: BuildContext) -> BackboneEntry:
    old, staged = context.staged.old, context.staged
    if old is not None and old.manifest.steps.get("trace") == staged.steps["trace"]:
        return old.manifest.backbone.model_copy(update={"source": context.source.name})
    info = context.info
    return BackboneEntry(
        source=context.source.name,
        architecture=info.spec.name,
        task=info.spec.head.task,
        model_type=info.spec.family.name,
        weights_sha256=context.source.weights_sha256,
        hidden_size=info.size.hidden_size,
        num_layers=info.size.num_layers,
        parts={part: _part(context, part, graph) for part, graph in context.traced.items()},
        pad_token_id=context.encoder.pad_token_id,
        max_length=info.max_length,
        encoder_size=info.size,
        decoder_size=info.decoder_size,
        max_output_length=info.max_output_length,
        label_words=context.recipe.backbone.label_words,
        decoder_prompt=context.recipe.backbone.decoder_prompt,
        padding_states_vary=info.spec.family.padding_states_vary,
    )


def _part(context: BuildContext, part: str, graph: str) -> PartEntry:
    """Read the description of a part of the model from its trace.

    A reused trace may not have been copied yet, so the old bundle's file is read in that case.
    """
    import onnx_ir as ir

    from variator_export.graph.parts import part_of

    path = context.staged.folder / graph
    if not path.exists() and context.staged.old is not None:
        path = context.staged.old.path / graph
    return part_of(
        ir.load(path).graph,
        num_sites=context.info.size.num_layers if part == context.part else 0,
        feeds=text_to_text.feeds(context.info) if part == DECODER else {},
    )


def worst_finding(bundle: Path, variant: str) -> dict[str, Any] | None:
    """Return the largest deviation in a variant's verification report, or None if there is no report.

    For a quantised variant, that is the largest one given the graph's own rounding.
    """
    report = read_report(bundle, build_verification_report(variant), "findings") or {"findings": ()}
    try:
        findings = report["findings"]
        given = [f for f in findings if f["check"] == GIVEN_ROUNDING]
        found: dict[str, Any] = max(given or [f for f in findings if "max_abs" in f], key=lambda f: f["used"])
    except (ValueError, KeyError, TypeError):
        return None  # reports are not part of the bundle, so a missing or broken one is no error
    return found


def _plugins_of_assemblies(bundle: Path, manifest: Manifest) -> dict[str, float | None]:
    """Variants with a plugin and modules, and what each loses (`BuildResult.plugins_of_assemblies`)."""
    names = [variant.name for variant in manifest.variants if variant.plugin is not None and variant.modules]
    if not names:
        return {}
    hashes = BundleFiles(bundle).variant_hashes()
    measured = quality_of_graphs(bundle, hashes, manifest.baseline.name)
    return {
        name: max(
            (
                loss
                for quality in measured
                for loss in counted_losses(quality, name, [quality["metric"]]).values()
            ),
            default=None,
        )
        for name in names
    }


def losses_of_report(bundle: Path, variant: str) -> list[dict[str, Any]]:
    """Return what quantisation changes in a variant, from its verification report; empty without one."""
    report = read_report(bundle, build_verification_report(variant), "quantization")
    return [] if report is None else list(report["quantization"])
