"""What a build costs: time of trace, bind and write by number of ratios, size of the bundle, peak memory.

    python benchmarks/build.py --output benchmarks/results/build-t5-base.json

A T5-base encoder with random weights. Each build runs in a process of its own, two and four ratios in turns,
without engines and without measuring speed; verification is timed apart. Peak memory is that of one more
build of four ratios with all that the default recipe does: measuring speed, engines by TensorRT for RTX.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import describe, make_t5_base, write_result
from variator_export.building.recipe_build import build
from variator_export.core.progress import Progress, StepReport
from variator_export.recipe.recipe import Recipe

FEW, MANY = (1, 4), (1, 2, 4, 8)


class Stopwatch(Progress):
    """Seconds of each step that made something."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = 0.0

    def started(self, name: str, why: str) -> None:
        """Start."""
        del name, why
        self._start = time.perf_counter()

    def finished(self, report: StepReport) -> None:
        """Stop."""
        self.seconds[report.name] = time.perf_counter() - self._start


def one_build(backbone: str, output: str, ratios: tuple[int, ...], *, whole: bool) -> dict[str, Any]:
    """Build in this process and say what it took."""
    recipe = Recipe.model_validate(
        {
            "name": "t5-base",
            "backbone": {"source": backbone},
            "plugins": [{"ratio": k, "initialise": {"seed": k}} for k in ratios if k > 1],
            "speed": {} if whole else None,
            "targets": ["tensorrt-rtx"] if whole else ["onnxruntime"],
        }
    )
    watch = Stopwatch()
    start = time.perf_counter()
    result = build(recipe, output, progress=watch)
    total = time.perf_counter() - start
    verify = sum(seconds for name, seconds in watch.seconds.items() if name.startswith("verify/"))
    files = json.loads((result.bundle / "manifest.json").read_text())["files"]
    sizes = {name: entry["size_bytes"] for name, entry in files.items()}
    return {
        "trace_bind_write_s": total - verify,
        "verify_s": verify,
        "steps_s": {name: round(seconds, 3) for name, seconds in watch.seconds.items()},
        "bundle_bytes": sum(p.stat().st_size for p in result.bundle.rglob("*") if p.is_file()),
        "weights_bytes": sizes["weights.safetensors"],
        "plugins_bytes": sum(size for name, size in sizes.items() if name.startswith("plugins/")),
        # Linux gives kilobytes.
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_memory_of_builder_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def main() -> None:
    """Run the builds in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # BACKBONE OUTPUT RATIOS KIND
    options = parser.parse_args()
    if options.one:
        backbone, output, ratios, kind = options.one
        found = one_build(backbone, output, tuple(int(k) for k in ratios.split(",")), whole=kind == "whole")
        options.output.write_text(json.dumps(found))
        return
    runs: dict[str, list[dict[str, Any]]] = {"few": [], "many": [], "whole": []}
    with tempfile.TemporaryDirectory() as folder:
        backbone = make_t5_base(Path(folder) / "t5-base")
        turns = [("few", FEW), ("many", MANY)] * options.repeats + [("whole", MANY)]
        for turn, (name, ratios) in enumerate(turns):
            target = Path(folder) / f"{name}-{turn}"
            answer = Path(folder) / "answer.json"
            one = ["--one", str(backbone), str(target), ",".join(map(str, ratios)), name]
            subprocess.run([sys.executable, __file__, "--output", str(answer), *one], check=True)
            runs[name].append(json.loads(answer.read_text()))
            print(f"{name}: {runs[name][-1]['trace_bind_write_s']:.1f} s", file=sys.stderr)
            shutil.rmtree(target)
    few, many = (statistics.median(r["trace_bind_write_s"] for r in runs[n]) for n in ("few", "many"))
    last, whole = runs["many"][-1], runs["whole"][-1]
    limit = 4 * last["weights_bytes"] + 1.5e9
    write_result(
        options.output,
        {
            **describe(),
            "model": "T5-base encoder, random weights",
            "ratios": {"few": FEW, "many": MANY},
            "trace_bind_write": {
                "few_s": round(few, 2),
                "many_s": round(many, 2),
                "many_over_few": round(many / few, 3),
                "goal": "at most 1.3",
            },
            "verify_many_s": round(statistics.median(r["verify_s"] for r in runs["many"]), 2),
            "bundle": {
                "bytes": last["bundle_bytes"],
                "over_weights_and_plugins": round(
                    last["bundle_bytes"] / (last["weights_bytes"] + last["plugins_bytes"]), 4
                ),
                "goal": "at most 1.08",
            },
            "peak_memory": {
                "bytes": whole["peak_memory_bytes"],
                "over_limit": round(whole["peak_memory_bytes"] / limit, 3),
                "builder_process_bytes": whole["peak_memory_of_builder_bytes"],
                "without_engines_and_speed_bytes": last["peak_memory_bytes"],
                "goal": "at most 4x the weights plus 1.5 GB",
            },
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
