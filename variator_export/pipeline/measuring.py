"""Measuring a published bundle at the end of its build, and finding a measurement again."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from variator_export.core.bundle_files import BundleFiles
from variator_export.core.encoder_size import EncoderSize
from variator_export.core.environment import machine, require_onnxruntime, versions
from variator_export.core.hashing import sha256_json
from variator_export.core.json_file import write_json
from variator_export.core.progress import Progress
from variator_export.core.recipe import SpeedRecipe
from variator_export.engines.base import Runner
from variator_export.model.plugin_file import load_plugin
from variator_export.pipeline.context import BuildContext
from variator_export.pipeline.plan import VariantPlan
from variator_export.pipeline.workshop import PART_SUFFIX

SPEED_REPORT = "reports/speed.json"


def speed_of_bundle(
    bundle: Path, recipe: SpeedRecipe, context: BuildContext, variants: list[VariantPlan], progress: Progress
) -> Mapping[str, Any]:
    """The measurement that the bundle holds, if it is of these graphs on this machine; else a new one."""
    depends_on = {
        "graphs": {plan.name: context.workshop.sha256(f"{plan.name}.onnx") for plan in variants},
        "plugins": {plan.name: context.sources_of_graph(plan)["plugin"] for plan in variants},
        "recipe": recipe.model_dump(mode="json"),
        "onnxruntime": versions(require_onnxruntime()),
        "made_by": context.made_by,
        "cpu": {name: value for name, value in machine().items() if name != "load_average_1min"},
    }
    key = sha256_json(depends_on)
    try:
        found: dict[str, Any] = json.loads((bundle / SPEED_REPORT).read_text(encoding="utf-8"))
        if found["key"] == key:
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a report is not part of the bundle: whatever is wrong with it, measure again
    result = {"key": key, **_measure(bundle, recipe, context, variants, progress)}
    # Beside its place and then over it: a reader never sees half a report.
    unfinished = bundle / (SPEED_REPORT + PART_SUFFIX)
    write_json(unfinished, result)
    os.replace(unfinished, bundle / SPEED_REPORT)  # noqa: PTH105
    return result


def _measure(
    bundle: Path, recipe: SpeedRecipe, context: BuildContext, variants: list[VariantPlan], progress: Progress
) -> dict[str, Any]:
    """Time eager PyTorch and ONNX Runtime at every ratio."""
    from variator_export.engines.eager import EagerModel
    from variator_export.engines.onnxruntime import OnnxRuntimeGraph
    from variator_export.graph.macs import analytic_macs, graph_macs
    from variator_export.stages.speed import Subject, measure_speed, speed_inputs

    context.release_verification()
    files = BundleFiles(bundle)
    size: EncoderSize = context.info.size
    limit = context.info.max_length
    if limit is not None and recipe.sequence_length > limit:
        recipe = recipe.model_copy(update={"sequence_length": limit})
    shape = (recipe.batch_size, recipe.sequence_length)
    subjects: list[Subject] = []
    for runtime in ("eager", "onnxruntime"):
        for plan in variants:
            entry = files.variant(plan.name)
            plugin = load_plugin(files.path / entry.plugin.folder) if entry.plugin else None
            bottleneck = plugin.config.bottleneck_size if plugin else 0
            graph = files.graph(entry.graphs["model"])
            eager = runtime == "eager"
            runner: Runner = (
                EagerModel(context.backbone, plugin, attention="sdpa") if eager else OnnxRuntimeGraph(graph)
            )
            subjects.append(
                Subject(
                    runtime=runtime,
                    ratio=plan.ratio,
                    variant=plan.name,
                    runner=runner,
                    macs=analytic_macs(size, *shape, plan.ratio, bottleneck),
                    graph_macs=None if eager else graph_macs(graph, *shape, plan.ratio),
                )
            )
    inputs = speed_inputs(context.info.spec.family.inputs, context.info.config.vocab_size, recipe)
    with progress.bar("measure speed", recipe.rounds * len(subjects)) as advance:
        result = measure_speed(subjects, inputs, recipe, advance)
    result["encoder_size"] = asdict(size)
    return result
