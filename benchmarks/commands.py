"""How long commands take that are given often: --help, a build, and the same again with nothing changed.

    python benchmarks/commands.py --output benchmarks/results/commands-cpu.json

Each is a process of its own, as a user starts it. The build is that of the default recipe, three ratios and
the baseline, verified, for ONNX Runtime and without the measurement of speed.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import describe, write_result

BUILD = ("build", "minilm", "--target", "onnxruntime", "--no-speed", "--output")


def seconds(*arguments: str, runs: int) -> list[float]:
    """Wall-clock seconds of a command, several times."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "variator_export", *arguments], check=True, capture_output=True)
        found.append(round(time.perf_counter() - start, 3))
    return found


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, Any] = {}

    def add(name: str, runs: list[float], goal: str) -> None:
        results[name] = {"median_seconds": statistics.median(runs), "goal": goal, "seconds": runs}

    seconds("--help", runs=1)  # what is read from a cold disk is not ours
    add("--help", seconds("--help", runs=21), "under 0.3 s")
    with tempfile.TemporaryDirectory() as folder:
        add(
            "build",
            [seconds(*BUILD, f"{folder}/{index}", runs=1)[0] for index in range(3)],
            "three ratios, verified, under 60 s on two cores",
        )
        add("build, nothing changed", seconds(*BUILD, f"{folder}/0", runs=7), "under 2 s")
    write_result(options.output, {**describe(), "results": results})


if __name__ == "__main__":
    main()
