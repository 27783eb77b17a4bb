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
    *("--shapes", "2x9", "--replays", "2"),
)
# Without what compiles, which takes a minute. The graph of ratio 8 is a thousandth off.
FAULT = """
import gpu_runners
gpu_runners.PARTS["compiled"] = ()
real = gpu_runners.Ways.open
def open_wrong(self, runtime, ratio, attention="sdpa"):
    way = real(self, runtime, ratio, attention)
    if (runtime, ratio) == ("onnxruntime", 8):
        run = way.run
        way.run = lambda inputs: {name: 1.001 * array for name, array in run(inputs).items()}
    return way
gpu_runners.Ways.open = open_wrong
"""


def _run(output: Path, *more: str) -> tuple[dict[str, Any], str]:
    code = WITHOUT.replace("BENCHMARKS", repr(str(BENCHMARKS))).replace("PLANT", FAULT)
    command = [sys.executable, "-c", code, "--output", str(output), *OPTIONS, *more]
    environment = {**os.environ, "PYTHONPATH": ""}  # the store of traces needs what is not installed there
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text()), result.stdout


def test_it_needs_little_times_only_right_numbers_and_leaves_out_by_name(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    result, said = _run(path)
    assert "no plot: matplotlib is not installed" in said
    found, allowed = result["measured"], result["allowed"]
    prefix = "tiny/float32/"
    for way in ("eager", "eager, fused kernels"):  # the tests have Triton interpret its kernels
        used = found[f"{prefix}{way}"]["used"]
        assert list(used) == ["1", "4", "8"]
        assert all(multiple <= allowed for multiple in used.values())
        entry = found[f"{prefix}{way}/2x9"]
        assert {ratio: times["wall_ms"]["count"] for ratio, times in entry["times"].items()} == {
            "1": 5,
            "4": 5,
            "8": 5,
        }
        assert entry["macs"]["4"] < entry["macs"]["1"]
    wrong = found[f"{prefix}onnxruntime"]
    assert wrong["skipped"] == "wrong numbers"
    assert float(wrong["used"]["8"]) > allowed >= float(wrong["used"]["4"])
    assert f"{prefix}onnxruntime/2x9" not in found, "nothing wrong is timed"
    assert found[f"{prefix}tensorrt"] == {"skipped": "tensorrt is not installed."}
    operations = found["operations 1x16x32x4"]
    assert operations["compression"]["bytes"] == 4 * (16 * 32 + 4 * 4 * 32 + 4 * 32)
    # What is there is neither measured nor loaded again; what was cut off goes on.
    again, said = _run(path)
    assert again == result
    assert "tiny float32" not in said
    del result["measured"][f"{prefix}eager/2x9"]
    path.write_text(json.dumps(result))
    again, said = _run(path)
    assert again["measured"].keys() == found.keys() | {f"{prefix}eager/2x9"}
    assert "onnxruntime" not in said


def test_other_settings_need_another_file(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"settings": {"ratios": [1, 2]}, "measured": {}}))
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--output", str(tmp_path / "gpu.json"), *OPTIONS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "choose another --output" in result.stderr
