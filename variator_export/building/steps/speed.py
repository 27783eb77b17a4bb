"""Measuring the speed of a published bundle at the end of its build, and reusing earlier measurements."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from variator_export.benchmark.runtimes import open_subjects
from variator_export.benchmark.schedule import TimingSettings, time_everything
from variator_export.benchmark.speed_table import speed_inputs, speed_rows
from variator_export.building.context import BuildContext
from variator_export.building.variant_plan import VariantPlan
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.reports import SPEED_REPORT, read_report, store_report
from variator_export.core.environment import machine, require_onnxruntime, versions
from variator_export.core.hashing import sha256_json
from variator_export.core.progress import Progress
from variator_export.recipe.recipe import SpeedRecipe

# Timing ends after this many times the rounds that count, settled or not.
_MOST_ROUNDS = 3


def speed_of_bundle(
    bundle: Path, recipe: SpeedRecipe, context: BuildContext, variants: list[VariantPlan], progress: Progress
) -> Mapping[str, Any]:
    """Return the bundle's speed measurement if it covers these graphs on this machine; otherwise measure."""
    depends_on = {
        "graphs": {plan.name: context.staged.sha256(f"{plan.name}.onnx") for plan in variants},
        "plugins": {plan.name: context.graph_input_hashes(plan)["plugin"] for plan in variants},
        "recipe": recipe.model_dump(mode="json"),
        "onnxruntime": versions(require_onnxruntime()),
        "made_by": context.made_by,
        "cpu": {name: value for name, value in machine().items() if name != "load_average_1min"},
    }
    key = sha256_json(depends_on)
    found = read_report(bundle, SPEED_REPORT, "key", "settled")
    if found is not None and found["key"] == key:
        return found
    result = {"key": key, **_measure(bundle, recipe, context, variants, progress)}
    store_report(bundle, SPEED_REPORT, result, "The bundle is published; its speed report is not stored.")
    return result


def _measure(
    bundle: Path, recipe: SpeedRecipe, context: BuildContext, variants: list[VariantPlan], progress: Progress
) -> dict[str, Any]:
    """Time eager PyTorch and ONNX Runtime at every ratio."""
    files = BundleFiles(bundle)
    limit = context.info.max_length
    length = recipe.sequence_length if limit is None else min(recipe.sequence_length, limit)
    shape = (recipe.batch_size, length)
    with open_subjects(files, lambda: context.unquantized) as opener:
        subjects = [
            opener.open(runtime, files.variant(plan.name))
            for runtime in ("eager", "onnxruntime")
            for plan in variants
        ]
        inputs = speed_inputs(context.info.spec.family.inputs, context.info.config.vocab_size, *shape)
        window = math.ceil(recipe.rounds / 2)
        settings = TimingSettings(
            openings=1,
            block_seconds=recipe.block_seconds,
            window=window,
            max_rounds=_MOST_ROUNDS * 2 * window,
        )
        timed = time_everything(opener, subjects, {shape: inputs}, settings, progress)[shape]
        timings = timed.timings
        macs = {s.key: opener.macs(s, *shape) for s in subjects}
    return {
        "batch_size": shape[0],
        "sequence_length": shape[1],
        "rounds": 2 * window,
        "settled": all(timed.settled),
        "machine": machine(),
        "versions": versions("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "variator-export"),
        "rows": speed_rows(subjects, timings, macs, shape[0] * shape[1]),
        "encoder_size": asdict(context.info.size),
    }
