"""benchmarks/gpu.py as far as a machine without a GPU can run it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Runs a script as on a machine where these are not installed.
WITHOUT = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "optimum", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, BENCHMARKS)
PLANT
sys.argv = ["gpu.py", *sys.argv[1:]]
runpy.run_path(BENCHMARKS + "/gpu.py", run_name="__main__")
"""
OPTIONS = (
    *("--device", "cpu", "--models", "tiny", "--precisions", "float32", "--ratios", "1", "4", "8"),
    *("--shapes", "2x9", "--block-seconds", "0.01", "--max-rounds", "1"),
    *("--runtimes", "eager", "onnxruntime", "tensorrt"),
)
# The graph of ratio 8 is a thousandth off.
FAULT = """
import gpu_runners
real = gpu_runners.Ways.open
def open_wrong(self, runtime, ratio, attention="sdpa"):
    way = real(self, runtime, ratio, attention)
    if (runtime, ratio) == ("onnxruntime", 8):
        run = way.run
        way.run = lambda inputs: {name: 1.001 * array for name, array in run(inputs).items()}
    return way
gpu_runners.Ways.open = open_wrong
"""


def _run(output: Path) -> tuple[dict[str, Any], str]:
    code = WITHOUT.replace("BENCHMARKS", repr(str(BENCHMARKS))).replace("PLANT", FAULT)
    command = [sys.executable, "-c", code, "--output", str(output), *OPTIONS]
    environment = {**os.environ, "PYTHONPATH": ""}  # the store of traces needs what is not installed there
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text()), result.stdout


def test_it_needs_little_times_only_right_numbers_and_leaves_out_by_name(tmp_path: Path) -> None:
    result, said = _run(tmp_path / "gpu.json")
    (part,) = result["parts"]
    ways = {f"{runtime}/ratio-{k}" for runtime in ("eager", "onnxruntime") for k in (1, 4, 8)}
    assert set(part["numbers"]) == ways
    assert {name for name, used in part["numbers"].items() if used > part["allowed"]} == {
        "onnxruntime/ratio-8"
    }
    assert part["skipped"].keys() == {"onnxruntime/ratio-8", *(f"tensorrt/ratio-{k}" for k in (1, 4, 8))}
    assert "times eager's own error" in part["skipped"]["onnxruntime/ratio-8"]
    assert part["skipped"]["tensorrt/ratio-4"] == "tensorrt is not installed."
    rows = {f"{row['runtime']}/{row['variant']}": row for row in part["shapes"][0]["rows"]}
    assert set(rows) == ways - {"onnxruntime/ratio-8"}
    compressed = rows["onnxruntime/ratio-4"]
    assert compressed["baseline"] == "onnxruntime", "of its own family"
    assert compressed["graph_macs"] > compressed["macs"], "9 tokens are padded to 12"
    assert "no plot: matplotlib is not installed" in said
    again, said = _run(tmp_path / "gpu.json")
    assert (again, "tiny float32: there already" in said) == (result, True)
