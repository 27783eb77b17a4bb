"""How much one opening of a session differs from the next: what the intervals of `bench` do not hold.

    python benchmarks/opening.py BUNDLE --shape 8x128 --shape 1x512 --output FILE

Ratio 1 and the bundle's ratio 4 are opened in turns, timed and closed again, several times in one process.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import numpy as np
from common import describe, write_result

from variator_export import Bundle
from variator_export.engines.base import Arrays
from variator_export.engines.onnxruntime_graph import OnnxRuntimeGraph

RATIOS, WARMUP = (1, 4), 3


def median_ms(graph: Path, inputs: Arrays, runs: int) -> float:
    """Of a session that is opened for it."""
    session = OnnxRuntimeGraph(graph)
    durations = []
    for _ in range(WARMUP + runs):
        start = time.perf_counter()
        session.run(inputs)
        durations.append((time.perf_counter() - start) * 1e3)
    return statistics.median(durations[WARMUP:])


def main() -> None:
    """Open, time, close, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--shape", action="append", required=True)
    parser.add_argument("--openings", type=int, default=8)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    names = bundle.manifest.backbone.inputs
    rows = []
    for shape in options.shape:
        batch, length = (int(part) for part in shape.split("x"))
        ids = np.random.default_rng(0).integers(1000, 20000, (batch, length))
        ones = np.ones_like(ids)
        values = {"input_ids": ids, "attention_mask": ones, "token_type_ids": ones * 0}
        found: dict[int, list[float]] = {ratio: [] for ratio in RATIOS}
        for _ in range(options.openings):
            for ratio in RATIOS:
                graph = bundle.graph(bundle.variant(ratio).graphs["model"])
                found[ratio].append(median_ms(graph, {name: values[name] for name in names}, options.runs))
                gc.collect()
        rows.append(
            {
                "shape": shape,
                "median_ms": {f"ratio-{k}": [round(m, 3) for m in medians] for k, medians in found.items()},
                "largest_over_smallest": {
                    f"ratio-{k}": round(max(medians) / min(medians), 4) for k, medians in found.items()
                },
                "speedups": [round(a / b, 4) for a, b in zip(found[1], found[4], strict=True)],
            }
        )
    settings = {"openings": options.openings, "runs": options.runs, "warmup": WARMUP}
    result = {"bundle": bundle.path.name, "settings": settings, "shapes": rows}
    write_result(options.output, {**describe(), **result})


if __name__ == "__main__":
    main()
