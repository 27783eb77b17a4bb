"""The build: from a recipe to a published, verified bundle."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variator_export.building import graph_steps as steps
from variator_export.building.context import ANY_RATIO_NAME, BuildContext
from variator_export.building.engine_steps import EngineOrder, EngineSources, check_order, make_engines
from variator_export.building.plan import VariantPlan, merge, pin_sources, select_plugins
from variator_export.building.speed import speed_of_bundle
from variator_export.building.staging import StagedBundle
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import (
    MANIFEST_NAME,
    BackboneEntry,
    Manifest,
    PluginEntry,
    Variant,
    is_bundle,
)
from variator_export.bundle.parts import MODEL, PartEntry, graph_name
from variator_export.bundle.publishing import exclusive
from variator_export.bundle.reports import build_verification_report
from variator_export.core.environment import require_onnxruntime
from variator_export.core.errors import UserError
from variator_export.core.precision import find_precision
from variator_export.core.progress import Progress, StepReport
from variator_export.engines.targets import GRAPHS
from variator_export.model.methods import METHODS
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import Recipe

if TYPE_CHECKING:
    from variator_export.model.backbone import BackboneInfo


@dataclass(frozen=True)
class BuildResult:
    """What a build did.

    Attributes:
        bundle: The bundle's folder.
        published: False if the bundle was up to date.
        steps: What was made and what was reused, and why.
        verification: The worst finding of each variant, by variant.
        speed: The measurement (`benchmark.speed_table.measure_speed`); None if none was asked for.
        untrained: Variants whose plugins were only initialised.
        ratios: Those of the bundle.
        precision: Of its graphs.
    """

    bundle: Path
    published: bool
    steps: tuple[StepReport, ...]
    verification: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, Any] | None = None
    untrained: tuple[str, ...] = ()
    ratios: tuple[int, ...] = ()
    precision: str = "float32"


def build(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Build a bundle, or add to one.

    Args:
        recipe: What to build. Its `ratios` choose among its plugins; the baseline comes along.
        output: The bundle's folder; None: `default_bundle`.
        replace: Start from nothing: whatever is in the folder goes when the new bundle is complete.
        progress: Is told what happens.

    Raises:
        UserError: The input or the machine does not allow it. An earlier bundle is unchanged.
        NumbersDisagreeError: A graph does not compute what eager PyTorch computes; it was not published.
    """
    progress = progress or Progress()
    bundle = Path(output if output is not None else default_bundle(recipe)).resolve()
    recipe = pin_sources(recipe)
    asked = select_plugins(recipe)  # refuses a wrong ratio before anything slow
    require_onnxruntime()
    order = EngineOrder(recipe.engine, [target for target in recipe.targets if target != GRAPHS])
    versions = check_order(order)
    source = resolve_source(recipe.backbone.source, recipe.backbone.sha256)
    with exclusive(bundle) as staging:
        old = _old_bundle(bundle, replace=replace)
        resolved, variants = merge(recipe, asked, source.weights_sha256, old.manifest if old else None)
        staged = StagedBundle(staging, old, progress)
        context = BuildContext(staged, resolved, source)
        manifest = _make(context, variants, order, versions)
        published = staged.finish(manifest, bundle)
        speed: Mapping[str, Any] | None = None
        if recipe.speed is not None and find_precision(recipe.precision).is_half:
            progress.note(f"speed: not measured: a CPU does not compute in {recipe.precision} as a GPU does")
        elif recipe.speed is not None:
            # Still alone in the folder: two builds would time each other.
            speed = speed_of_bundle(bundle, recipe.speed, context, variants, progress)
    return BuildResult(
        bundle=bundle,
        published=published,
        steps=tuple(staged.reports),
        verification={plan.name: worst_finding(bundle, plan.name) for plan in variants},
        speed=speed,
        untrained=tuple(v.name for v in manifest.variants if v.plugin is not None and not v.plugin.trained),
        ratios=tuple(v.ratio for v in manifest.variants),
        precision=manifest.precision,
    )


def default_bundle(recipe: Recipe) -> Path:
    """Where a recipe's bundle goes if nothing else is said: artifacts/NAME, or NAME-PRECISION."""
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
            f"{bundle} holds files but is no bundle: it has no {MANIFEST_NAME} of one.",
            "Choose another folder with --output; nothing in this one was touched.",
        )
    return None if replace else BundleFiles(bundle)


def _make(
    context: BuildContext, variants: list[VariantPlan], order: EngineOrder, versions: Mapping[str, str]
) -> Manifest:
    """Run all steps; plugins first, because a wrong one should be refused before the long trace."""
    steps.copy_backbone_files(context)
    for plan in variants:
        if plan.plugin is not None:
            steps.make_plugin(context, plan)
    steps.trace_backbone(context, variants)
    entries = []
    for plan in variants:
        steps.bind_variant(context, plan)
        entries.append(_variant_entry(context, plan))
    for plan in variants:
        steps.verify_variant(context, plan)
    backbone, any_ratio = _backbone_entry(context), {MODEL: ANY_RATIO_NAME}
    sources = EngineSources(backbone, entries, any_ratio, context.recipe.precision)
    engines = make_engines(context.staged, sources, order, versions)
    targets = tuple(sorted({*context.recipe.targets, *(engine.target for engine in engines)}))
    return Manifest(
        made_by=context.made_by,
        # How the speed is measured decides nothing of what is in the bundle.
        recipe={**context.recipe.model_dump(mode="json", exclude={"speed"}), "targets": list(targets)},
        backbone=backbone,
        precision=context.recipe.precision,
        any_ratio=any_ratio,
        variants=tuple(entries),
        engines=tuple(engines),
    )


def _variant_entry(context: BuildContext, plan: VariantPlan) -> Variant:
    plugin = None
    if plan.plugin is not None:
        config = context.plugin_config(plan)
        folder = context.plugin_folder(plan)
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
        baseline=METHODS.find(plan.method).is_baseline,
        ratio=plan.ratio,
        plugin=plugin,
        graphs={MODEL: graph_name(plan.name, MODEL)},
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
        parts={MODEL: _part(staged, info)},
        pad_token_id=context.encoder.pad_token_id,
        max_length=info.max_length,
        encoder_size=asdict(info.size),
    )


def _part(staged: StagedBundle, info: "BackboneInfo") -> PartEntry:
    """What the trace says of itself; a trace that was reused may not be copied yet."""
    import onnx_ir as ir

    from variator_export.graph.parts import part_of

    path = staged.folder / ANY_RATIO_NAME
    if not path.exists() and staged.old is not None:
        path = staged.old.path / ANY_RATIO_NAME
    return part_of(ir.load(path).graph, info.size.num_layers)


def worst_finding(bundle: Path, variant: str) -> dict[str, Any] | None:
    """The largest deviation in a variant's verification report; None if the report is not there."""
    try:
        report = json.loads((bundle / build_verification_report(variant)).read_text(encoding="utf-8"))
        found: dict[str, Any] = max(report["findings"], key=lambda f: f["used"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a report is not part of the bundle
    return found
