"""How much of what the saved MACs allow is reached on ONNX Runtime, and what the any-ratio graph costs.

    python benchmarks/speed.py --output benchmarks/results/speed-cpu.json

T5-base encoder (random weights) at (8, 128) and MiniLM at (32, 128): ratio 1, ratio 4 and the any-ratio graph
at ratio 4 take turns in blocks. Before anything is timed, the build compares the numbers with eager PyTorch.
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import describe, make_t5_base, minilm_folder, write_result
from variator_export.benchmark.speed_table import speed_inputs
from variator_export.benchmark.timing import speedup, time_in_turns
from variator_export.building.recipe_build import build
from variator_export.core.encoder_size import EncoderSize
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.graph.macs import graph_macs
from variator_export.model.macs import analytic_macs
from variator_export.model.methods import method_of
from variator_export.recipe.recipe import Recipe
from variator_export.sessions import Bundle

RATIO = 4


def measure(backbone: Path, name: str, shape: tuple[int, int], folder: Path, rounds: int) -> dict[str, Any]:
    """Build two ratios of one model and time three graphs."""
    recipe = Recipe.model_validate(
        {
            "name": name,
            "backbone": {"source": str(backbone)},
            "plugins": [{"ratio": RATIO, "initialise": {"seed": RATIO}}],
            "speed": None,
        }
    )
    bundle = Bundle.load(build(recipe, folder / f"{name}-bundle").bundle)
    compressed, baseline = bundle.variant(RATIO), bundle.variant(1)
    inputs = speed_inputs(bundle.manifest.backbone.inputs, 30000, *shape)
    graphs = {
        "k1": OnnxRuntimeRunner(bundle.graph(baseline.graph)),
        "k4": OnnxRuntimeRunner(bundle.graph(compressed.graph)),
        "any-ratio at k4": OnnxRuntimeRunner(
            bundle.graph(bundle.manifest.any_ratio_graph),
            method_of(compressed).inputs_of(bundle, compressed, bundle.manifest.any_ratio_graph),
        ),
    }
    calls = {key: (lambda graph=graph: graph.run(inputs)) for key, graph in graphs.items()}
    timings, _ = time_in_turns(calls, max_rounds=rounds, block_seconds=3.0)
    size = EncoderSize(**bundle.manifest.backbone.encoder_size)
    assert compressed.plugin is not None
    macs = [analytic_macs(size, *shape, k, compressed.plugin.bottleneck_size) for k in (1, RATIO)]
    on_graph = [graph_macs(bundle.file(v.graph), *shape, v.ratio) for v in (baseline, compressed)]
    gained = speedup(timings["k1"], timings["k4"])
    allowed = macs[0] / macs[1]
    return {
        "model": name,
        "batch_size": shape[0],
        "sequence_length": shape[1],
        "median_ms": {key: round(found.median_ms, 2) for key, found in timings.items()},
        "speedup": asdict(gained),
        "speedup_allowed": round(allowed, 4),
        "share_of_allowed": round(gained.value / allowed, 4),
        "share_of_allowed_goal": "at least 0.9",
        "any_ratio_over_bound": asdict(speedup(timings["any-ratio at k4"], timings["k4"])),
        "any_ratio_goal": "at most 1.05",
        "macs": macs,
        "macs_on_graph": on_graph,
    }


def main() -> None:
    """Measure both models and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = (
            (minilm_folder(), "minilm", (32, 128)),
            (make_t5_base(folder / "t5-base"), "t5-base-encoder", (8, 128)),
        )
        results = [measure(*model, folder, options.rounds) for model in models]
    write_result(options.output, {**describe(), "rounds": options.rounds, "results": results})


if __name__ == "__main__":
    main()
