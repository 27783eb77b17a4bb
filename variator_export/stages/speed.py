"""The measurement at the end of a build: eager and exported, with and without plugins, beside the limit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from variator_export.core.environment import machine, versions
from variator_export.core.recipe import SpeedRecipe
from variator_export.engines.base import Arrays, Runner
from variator_export.stages.timing import speedup, time_in_turns


@dataclass(frozen=True)
class Subject:
    """One thing to time.

    Attributes:
        runtime: `eager` or `onnxruntime`.
        ratio: k.
        variant: The variant's name.
        runner: Runs it.
        macs: Multiply-accumulates by formula, at the unpadded shape.
        graph_macs: Those counted on its graph; None for eager.
    """

    runtime: str
    ratio: int
    variant: str
    runner: Runner
    macs: int
    graph_macs: int | None


def speed_inputs(names: tuple[str, ...], vocab_size: int, recipe: SpeedRecipe) -> Arrays:
    """Full rows of random tokens."""
    shape = (recipe.batch_size, recipe.sequence_length)
    rng = np.random.default_rng(0)
    inputs = {name: np.zeros(shape, np.int64) for name in names}
    inputs["input_ids"][:] = rng.integers(0, vocab_size, shape)
    inputs["attention_mask"][:] = 1
    return inputs


def measure_speed(
    subjects: list[Subject],
    inputs: Mapping[str, np.ndarray],
    recipe: SpeedRecipe,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Time the subjects in turns.

    Returns:
        A JSON document: the shape, the machine, and for each subject its median, its speed-up over ratio 1 of
        the same runtime with a 95 % confidence interval, and the speed-up that the saved MACs would allow.
    """
    calls = {
        f"{subject.runtime}/{subject.variant}": (lambda runner=subject.runner: runner.run(inputs))
        for subject in subjects
    }
    timings = time_in_turns(
        calls, rounds=recipe.rounds, block_seconds=recipe.block_seconds, progress=progress
    )
    rows = []
    for subject in subjects:
        baseline = next(s for s in subjects if s.runtime == subject.runtime and s.ratio == 1)
        own = timings[f"{subject.runtime}/{subject.variant}"]
        gained = speedup(timings[f"{baseline.runtime}/{baseline.variant}"], own)
        allowed = baseline.macs / subject.macs
        over_eager = speedup(timings["eager/ratio-1"], own)
        rows.append(
            {
                "runtime": subject.runtime,
                "variant": subject.variant,
                "ratio": subject.ratio,
                "median_ms": round(own.median_ms, 3),
                "speedup": round(gained.value, 4),
                "speedup_low": round(gained.low, 4),
                "speedup_high": round(gained.high, 4),
                "speedup_allowed": round(allowed, 4),
                "share_of_allowed": round(gained.value / allowed, 4),
                "speedup_over_eager": round(over_eager.value, 4),
                "macs": subject.macs,
                "graph_macs": subject.graph_macs,
            }
        )
    return {
        "batch_size": recipe.batch_size,
        "sequence_length": recipe.sequence_length,
        "rounds": recipe.rounds,
        "machine": machine(),
        "versions": versions("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "variator-export"),
        "rows": rows,
    }
