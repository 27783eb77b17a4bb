"""What a GPU gives: every way to run a model at ratios 1 and 4, its numbers checked before it is timed.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json --part device
    python benchmarks/gpu.py --output benchmarks/results/gpu.json --part eager      # then: compiled, graphs
    python benchmarks/gpu.py --output try.json --device cpu --models tiny --shapes 1x16

Four parts, each of less than ten minutes on an H200:

- device: the memory of `CudaDevice` for real, and each operation of the plugin alone, beside the time that
  its bytes take at the bandwidth of a copy;
- eager: eager PyTorch, and with the fused kernels (Triton);
- compiled: torch.compile for every shape, torch.compile for one shape (max-autotune), AOTInductor;
- graphs: our graphs on ONNX Runtime (CUDA) and, where it is installed, TensorRT.

MiniLM and the T5-base encoder; bfloat16 first. Needs torch, transformers, onnx, onnxscript, onnxruntime and
safetensors, and downloads nothing. What is not installed is skipped by name.

The result is written after each way and shape, and what is there already is left out: a run that was cut off
goes on, before it loads anything. Each way is compared with the same weights in float64 first: it may be off
by at most 4 times what eager PyTorch itself is off by in the same precision (docs/verification.md). What is
not, is reported and not timed. Ratios take turns. Every way runs as a CUDA graph where it can; the time is
that between events around a replay, with the weights in the cache (warm) and after the cache was overwritten
(cold), and beside it the time that a caller waits.

The plot is drawn beside the result where matplotlib is installed, or later: --plot-only.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpu_device
import gpu_operations
from gpu_models import MODELS, Model, make_model
from gpu_runners import PARTS, Way, Ways
from gpu_timing import time_in_turns
from variator_export.benchmark.speed_table import speed_inputs
from variator_export.core.environment import conditions, machine, versions
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.engines.eager import EagerModel
from variator_export.model.macs import analytic_macs
from variator_export.verification.judging.compare import Deviation, deviation
from variator_export.verification.judging.error_budget import MULTIPLE, make_budgets

PRECISIONS = ("bfloat16", "float16", "float32")
SHAPES = ("1x128", "32x128", "64x512", "8x512")
# Lengths around the ratios, a row with padding, a long one.
_CHECKED = ((1, 7), (2, 8), (3, 37), (2, 128))


def main() -> None:
    """Measure what is missing, and write the result after each measurement."""
    options = _options()
    # PyTorch's own compiler warns of its own code, once for each graph.
    warnings.simplefilter("ignore", FutureWarning)
    if not options.plot_only:
        if options.device == "cuda" and not torch.cuda.is_available():
            sys.exit(f"PyTorch {torch.__version__} sees no GPU here; --device cpu tries the script out.")
        _measure(options, Result(options.output, _settings(options)))
    _plot(options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minilm", "t5-base"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--ratios", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="BxS")
    parser.add_argument("--replays", type=int, default=50, help="of each way, ratio and shape")
    parser.add_argument("--seconds", type=float, help="begin nothing after so many seconds")
    parser.add_argument("--plot-only", action="store_true", help="draw the plot of a result that is there")
    return parser.parse_args()


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all measurements of a result have in common."""
    return {name: getattr(options, name) for name in ("device", "ratios", "replays")}


class Result:
    """The file with the measurements.

    Attributes:
        measured: Measurements by key: `MODEL/PRECISION/WAY` for numbers, and `/SHAPE` after that for times.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": settings}
        if there["settings"] != settings:
            sys.exit(
                f"{path} was measured with {there['settings']}, not {settings}: choose another --output."
            )
        self.measured: dict[str, Any] = there.get("measured", {})
        self._content = {**there, "measured": self.measured}

    def add(self, key: str, found: Any) -> None:
        """Add a measurement, and write the file as a whole."""
        self.measured[key] = found
        content = self._content | {"machine": machine(), "versions": _versions(), "allowed": MULTIPLE}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_name(f".{self._path.name}.new")
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        new.replace(self._path)


def _versions() -> dict[str, Any]:
    names = ("torch", "transformers", "triton", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")
    return {**versions(*names, "tensorrt", "variator-export"), "cuda": torch.version.cuda}


def _measure(options: argparse.Namespace, result: Result) -> None:
    start = time.monotonic()

    def has_time() -> bool:
        return options.seconds is None or time.monotonic() - start < options.seconds

    if "device" in options.part:
        for key, measure in _device_measurements(options):
            if key not in result.measured and has_time():
                result.add(key, _or_words(measure))
    runtimes = [runtime for part in options.part for runtime in PARTS[part]]
    for precision in options.precisions:
        for name in options.models:
            missing = {
                runtime: shapes
                for runtime in runtimes
                if (shapes := _missing(result, f"{name}/{precision}/{runtime}", options.shapes))
            }
            if missing and has_time():
                with tempfile.TemporaryDirectory() as folder:
                    _model(name, precision, missing, options, result, has_time, Path(folder))


def _device_measurements(options: argparse.Namespace) -> list[tuple[str, Callable[[], Any]]]:
    found: list[tuple[str, Callable[[], Any]]] = []
    if options.device == "cuda":
        found.append(("device", gpu_device.check))
        found.append(("bandwidth", gpu_operations.bandwidth))
    for shape in gpu_operations.SHAPES if options.device == "cuda" else gpu_operations.TINY:
        found.append((f"operations {shape}", lambda shape=shape: gpu_operations.table(shape, options.device)))
    return found


def _missing(result: Result, key: str, shapes: list[str]) -> list[str]:
    """The shapes at which a way was neither measured nor found not to run."""
    if "skipped" in result.measured.get(key, {}):
        return []
    return [shape for shape in shapes if f"{key}/{shape}" not in result.measured]


def _model(
    name: str,
    precision: str,
    missing: dict[str, list[str]],
    options: argparse.Namespace,
    result: Result,
    has_time: Callable[[], bool],
    folder: Path,
) -> None:
    """Check and time the ways of a model that are missing."""
    print(f"{name} {precision}", flush=True)
    # Compilations count by function, not by model: without this the later models would run eagerly, unseen.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 16 * len(options.ratios)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model = make_model(name, precision, options.ratios, folder)
    ways = Ways(model, options.device, folder)
    expected = {ratio: _reference(model, ways, ratio) for ratio in options.ratios}
    for runtime, shapes in missing.items():
        if not has_time():
            return
        key = f"{name}/{precision}/{runtime}"
        opened, numbers = _checked(ways, runtime, expected)
        result.add(key, numbers)
        for shape in shapes if opened else []:
            if has_time():
                found = _or_words(lambda own=dict(opened), shape=shape: _times(model, own, shape, options))
                result.add(f"{key}/{shape}", found)
                print(f"  {runtime} {shape}: {_brief(found)}", flush=True)
        opened.clear()
        if options.device == "cuda":
            torch.cuda.empty_cache()


class _Expected:
    """What a ratio has to give: the reference, and how far eager PyTorch is off in the same precision."""

    def __init__(
        self, inputs: list[Arrays], exact: list[Arrays], eager: list[Arrays], precision: str
    ) -> None:
        self.inputs, self.exact = inputs, exact
        self.budgets = make_budgets([_deviations(e, x) for e, x in zip(eager, exact, strict=True)], precision)

    def used(self, way: Way) -> float:
        """The largest multiple of eager's error, over all cases and outputs; NaN where anything is NaN."""
        multiples = []
        for inputs, exact, budgets in zip(self.inputs, self.exact, self.budgets, strict=True):
            found = _deviations(way.run(inputs), exact)
            multiples += [budgets[name].used(found[name]) for name in exact]
        return float(np.max(multiples))


def _deviations(found: Arrays, expected: Arrays) -> dict[str, Deviation]:
    return {name: deviation(found[name], expected[name]) for name in expected}


def _reference(model: Model, ways: Ways, ratio: int) -> _Expected:
    size = model.backbone.info.config.vocab_size
    inputs = []
    for batch, length in _CHECKED:
        case = speed_inputs(model.backbone.spec.family.inputs, size, batch, length)
        case["attention_mask"][-1, length // 2 + 1 :] = 0
        inputs.append(case)
    exact = EagerModel(model.exact, model.plugins[ratio])
    eager = ways.open("eager", ratio, attention="eager")
    return _Expected(
        inputs, [exact.run(case) for case in inputs], [eager.run(case) for case in inputs], model.precision
    )


def _checked(
    ways: Ways, runtime: str, expected: dict[int, _Expected]
) -> tuple[dict[int, Way], dict[str, Any]]:
    """A way at each ratio if all run here and give the right numbers; the error of each, or why not."""
    opened: dict[int, Way] = {}
    used: dict[str, float] = {}
    for ratio, wanted in expected.items():
        try:
            opened[ratio] = ways.open(runtime, ratio)
            used[str(ratio)] = round(wanted.used(opened[ratio]), 3)
        except Exception as error:  # of seven libraries; the others go on
            print(f"  {runtime}: skipped: {_words(error)}", flush=True)
            return {}, {"skipped": _words(error)}
    if not max(used.values()) <= MULTIPLE:  # NaN too
        print(f"  {runtime}: WRONG NUMBERS: {used}", flush=True)
        return {}, {"skipped": "wrong numbers", "used": {r: str(u) for r, u in used.items()}}
    return opened, {"used": used}


def _times(model: Model, opened: dict[int, Way], shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """The times of a way at a shape, ratios in turns."""
    batch, length = map(int, shape.split("x"))
    vocabulary = model.backbone.info.config.vocab_size
    inputs = speed_inputs(model.backbone.spec.family.inputs, vocabulary, batch, length)
    before = conditions()
    prepared = {str(ratio): way.prepare(inputs) for ratio, way in opened.items()}
    times = time_in_turns(prepared, options.replays)
    info = model.backbone.info
    plugins = {ratio: model.plugins[ratio] for ratio in opened}
    return {
        "times": times,
        "macs": {
            str(ratio): analytic_macs(
                info.size, batch, length, ratio, plugin.config.bottleneck_size if plugin else 0
            )
            for ratio, plugin in plugins.items()
        },
        "weights": model.weights,
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "conditions": {"before": before, "after": conditions()},
    }


def _brief(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    return ", ".join(
        f"k={ratio} {times.get('warm_ms', times['wall_ms'])['median']:.3f} ms"
        for ratio, times in found["times"].items()
    )


def _or_words(measure: Callable[[], Any]) -> Any:
    """What is measured, or why it cannot be."""
    try:
        return measure()
    except Exception as error:  # out of memory, say
        return {"skipped": _words(error)}


def _words(error: Exception) -> str:
    """Of an error, short; the rest goes to standard error."""
    if not isinstance(error, UserError):
        traceback.print_exception(error, limit=-4)
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return error.message


def _plot(result: Path) -> None:
    try:
        from gpu_plot import draw
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed; draw it elsewhere with --plot-only")
        return
    path = result.with_suffix(".svg")
    draw(json.loads(result.read_text(encoding="utf-8"))["measured"], path)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
