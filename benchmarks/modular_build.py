"""What assemblies add to a build: all of the shipped modules of MiniLM, beside the original alone.

    python benchmarks/modular_build.py --output benchmarks/results/modular-build.json

The builds run in turns, each in a process of its own, without engines and without measuring speed. The time
of trace, assembly, binding and writing is apart from that of the verification, which every variant needs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from build import Stopwatch
from common import describe, write_result
from modular import MODULES, all_assemblies
from variator_export.building.recipe_build import build
from variator_export.recipe.recipe import Recipe
from variator_export.recipe.recipe_file import load_recipe


def one_build(output: str, assemblies: list[str]) -> dict[str, Any]:
    """Build in this process and say what it took."""
    recipe = {
        **load_recipe("minilm").model_dump(mode="json"),
        "plugins": [],
        "modules": [{"source": source} for source in MODULES] if assemblies else [],
        "assemblies": assemblies,
        "targets": ["onnxruntime"],
        "speed": None,
    }
    watch = Stopwatch()
    start = time.perf_counter()
    result = build(Recipe.model_validate(recipe), output, progress=watch)
    total = time.perf_counter() - start
    verify = sum(seconds for name, seconds in watch.seconds.items() if name.startswith("verify/"))
    graphs = sum(path.stat().st_size for path in result.bundle.glob("*.onnx"))
    return {
        "without_verification_s": total - verify,
        "verification_s": verify,
        "steps_s": {name: round(seconds, 3) for name, seconds in watch.seconds.items()},
        "graphs_bytes": graphs,
    }


def main() -> None:
    """Run the builds in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # OUTPUT KIND
    options = parser.parse_args()
    if options.one:
        output, kind = options.one
        found = one_build(output, all_assemblies() if kind == "assemblies" else [])
        options.output.write_text(json.dumps(found))
        return
    runs: dict[str, list[dict[str, Any]]] = {"original": [], "assemblies": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn, kind in enumerate([*runs] * options.repeats):
            answer = Path(folder) / "answer.json"
            one = ["--one", f"{folder}/{kind}-{turn}", kind]
            subprocess.run([sys.executable, __file__, "--output", str(answer), *one], check=True)
            runs[kind].append(json.loads(answer.read_text()))
    medians = {
        kind: {
            name: round(statistics.median(run[name] for run in found), 2)
            for name in ("without_verification_s", "verification_s")
        }
        for kind, found in runs.items()
    }
    original, assembled = (medians[kind]["without_verification_s"] for kind in ("original", "assemblies"))
    write_result(
        options.output,
        {
            **describe(),
            "assemblies": len(all_assemblies()),
            "medians": medians,
            "assemblies_over_original": round(assembled / original, 3),
            "goal": "at most 1.2",
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
