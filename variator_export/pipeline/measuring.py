"""Measuring a published bundle at the end of its build, and finding a measurement again."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from variator_export.core.bundle_files import BundleFiles
from variator_export.core.encoder_size import EncoderSize
from variator_export.core.recipe import SpeedRecipe
from variator_export.engines.base import Runner
from variator_export.model.plugin_file import load_plugin
from variator_export.pipeline.context import BuildContext
from variator_export.pipeline.plan import VariantPlan
from variator_export.pipeline.progress import Progress
from variator_export.pipeline.steps import write_json

SPEED_REPORT = "reports/speed.json"


def stored_speed(bundle: Path, recipe: SpeedRecipe, variants: list[VariantPlan]) -> dict[str, Any] | None:
    """The measurement that the bundle holds, if it is of these variants and this shape."""
    try:
        found: dict[str, Any] = json.loads((bundle / SPEED_REPORT).read_text(encoding="utf-8"))
        measured = {row["variant"] for row in found["rows"]}
        shape = (found["batch_size"], found["sequence_length"], found["rounds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a report is not part of the bundle: whatever is wrong with it, measure again
    wanted = (recipe.batch_size, recipe.sequence_length, recipe.rounds)
    return found if measured == {v.name for v in variants} and shape == wanted else None


def measure_bundle(
    bundle: Path, recipe: SpeedRecipe, context: BuildContext, variants: list[VariantPlan], progress: Progress
) -> Mapping[str, Any]:
    """Time eager PyTorch and ONNX Runtime at every ratio, and write the report into the bundle."""
    from variator_export.engines.eager import EagerModel
    from variator_export.engines.onnxruntime import OnnxRuntimeGraph
    from variator_export.graph.macs import analytic_macs, graph_macs
    from variator_export.stages.speed import Subject, measure_speed, speed_inputs

    files = BundleFiles(bundle)
    size: EncoderSize = context.info.size
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
    # Beside its place and then over it: a reader never sees half a report.
    unfinished = bundle / f"{SPEED_REPORT}.part"
    write_json(unfinished, result)
    os.replace(unfinished, bundle / SPEED_REPORT)  # noqa: PTH105
    return result
