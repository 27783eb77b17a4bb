"""What a GPU gives: every way to run a model, in every precision and ratio, its numbers checked first.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json
    python benchmarks/gpu.py --output try.json --device cpu --models tiny --precisions float32 --shapes 1x16

MiniLM and the T5-base encoder with eager PyTorch, torch.compile, AOTInductor, our graphs on ONNX Runtime
(CUDA) and, where it is installed, TensorRT; float32 without TF32, float16 and bfloat16; ratios 1, 2, 4, 8.
Needs torch, transformers, onnx, onnxscript, onnxruntime and safetensors, and downloads nothing. What is not
installed is skipped by name.

Each model in each precision is a part of the result, written when it is done; what is there already is left
out, so that a run that was cut off goes on. Inputs lie on the device; a call ends when the device is done.
Before anything is timed, each way is compared with the same weights in float64: it may be off by at most 4
times what eager PyTorch itself is off by in the same precision (docs/verification.md). What is not, is
reported and not timed.

The plot is drawn beside the result where matplotlib is installed, or later: --plot-only.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_models import MODELS, Model, make_model
from gpu_runners import GROUPS, Way, Ways, wait
from variator_export.benchmark.speed_table import Macs, Subject, speed_inputs, speed_rows
from variator_export.benchmark.timing import time_in_turns
from variator_export.core.environment import conditions, machine, versions
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.engines.eager import EagerModel
from variator_export.graph.macs import graph_macs
from variator_export.model.macs import analytic_macs
from variator_export.verification.judging.compare import Deviation, deviation
from variator_export.verification.judging.error_budget import MULTIPLE, make_budgets

RATIOS = (1, 2, 4, 8)
PRECISIONS = ("float32", "float16", "bfloat16")
SHAPES = ("1x128", "8x128", "32x128", "64x128", "1x512", "8x512", "64x512")
# Lengths around the ratios, a row with padding, a long one.
_CHECKED = ((1, 7), (2, 8), (3, 37), (2, 128))


def main() -> None:
    """Measure what is missing and write the result after each part."""
    options = _options()
    # PyTorch's own compiler warns of its own code, once for each graph.
    warnings.simplefilter("ignore", FutureWarning)
    if not options.plot_only:
        if options.device == "cuda" and not torch.cuda.is_available():
            sys.exit(f"PyTorch {torch.__version__} sees no GPU here; --device cpu tries the script out.")
        _measure(options)
    _plot(options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minilm", "t5-base"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--runtimes", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--ratios", nargs="+", type=int, default=list(RATIOS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="BxS")
    parser.add_argument("--block-seconds", type=float, default=0.2)
    parser.add_argument("--max-rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="begin no part after so many seconds")
    parser.add_argument("--plot-only", action="store_true", help="draw the plot of a result that is there")
    options = parser.parse_args()
    options.shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    if 1 not in options.ratios:
        parser.error("--ratios needs 1: speed-ups are taken over it")
    return options


def _measure(options: argparse.Namespace) -> None:
    result = {"parts": []}
    if options.output.exists():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    settings = _settings(options)
    others = [part["settings"] for part in result["parts"] if part["settings"] != settings]
    if others:
        sys.exit(f"{options.output} was measured with {others[0]}, not {settings}: choose another --output.")
    done = {(part["model"], part["precision"]) for part in result["parts"]}
    start = time.monotonic()
    for precision in options.precisions:
        for name in options.models:
            if (name, precision) in done:
                print(f"{name} {precision}: there already")
                continue
            if options.seconds is not None and time.monotonic() - start > options.seconds:
                print(f"{name} {precision}: no time left")
                continue
            with tempfile.TemporaryDirectory() as folder:
                part = _part(name, precision, options, Path(folder))
            result["parts"].append(part)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _part(name: str, precision: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    start = time.monotonic()
    print(f"{name} {precision}", flush=True)
    # Compilations count by function, not by model: without this the later parts would run eagerly, unseen.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 8 * len(options.ratios)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model = make_model(name, precision, options.ratios, folder)
    ways = Ways(model, options.device, folder)
    before = conditions()
    expected = {ratio: _reference(model, ways, ratio) for ratio in options.ratios}
    opened, numbers, skipped = _checked_ways(ways, expected, options)
    shapes = [_shape(model, opened, skipped, folder, shape, options) for shape in options.shapes]
    return {
        "model": name,
        "weights": model.weights,
        "precision": precision,
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "machine": machine(),
        "conditions": {"before": before, "after": conditions()},
        "versions": {
            **versions("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
            **versions("tensorrt", "variator-export"),
            "cuda": torch.version.cuda,
        },
        "settings": _settings(options),
        "allowed": MULTIPLE,
        "numbers": numbers,
        "skipped": skipped,
        "shapes": shapes,
        "seconds": round(time.monotonic() - start, 1),
    }


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all parts of a result have in common."""
    names = ("device", "runtimes", "ratios", "shapes", "block_seconds", "max_rounds")
    return json.loads(json.dumps({name: getattr(options, name) for name in names}))


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


def _checked_ways(
    ways: Ways, expected: dict[int, _Expected], options: argparse.Namespace
) -> tuple[list[Subject], dict[str, float | None], dict[str, str]]:
    """What runs here and gives the right numbers; the error of each; why the others are left out."""
    opened: list[Subject] = []
    numbers: dict[str, float | None] = {}
    skipped: dict[str, str] = {}
    for runtime in options.runtimes:
        for ratio, wanted in expected.items():
            variant = f"ratio-{ratio}"
            subject = f"{runtime}/{variant}"
            try:
                way = ways.open(runtime, ratio)
                used = wanted.used(way)
            except Exception as error:  # of seven libraries; the others go on
                skipped[subject] = _words(error)
                continue
            numbers[subject] = None if np.isnan(used) else round(used, 3)
            if used <= MULTIPLE:
                opened.append(Subject(runtime, GROUPS[runtime], ratio, variant, way, baseline=ratio == 1))
            else:
                skipped[subject] = f"wrong numbers: {used:.1f} times eager's own error"
        left_out = [reason for name, reason in skipped.items() if name.startswith(f"{runtime}/")]
        print(f"  {runtime}: {f'skipped: {left_out[0]}' if left_out else 'right numbers'}", flush=True)
    return opened, numbers, skipped


def _shape(
    model: Model,
    opened: list[Subject],
    skipped: dict[str, str],
    folder: Path,
    shape: tuple[int, int],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Everything in turns at one shape."""
    names, config = model.backbone.spec.family.inputs, model.backbone.info.config
    inputs = speed_inputs(names, config.vocab_size, *shape)
    calls = {}
    for subject in opened:
        try:
            calls[subject.key] = subject.runner.prepare(inputs)  # type: ignore[attr-defined]
            calls[subject.key]()  # compiles, where it compiles
        except Exception as error:  # as above: out of memory, say
            calls.pop(subject.key, None)
            skipped[f"{subject.key} at {shape[0]}x{shape[1]}"] = _words(error)
    # A group is compared with its own run without plugins.
    there = [s for s in opened if s.key in calls]
    groups = {s.group for s in there if s.baseline}
    timed = [s for s in there if s.group in groups]
    timings, settled = time_in_turns(
        {s.key: calls[s.key] for s in timed},
        block_seconds=options.block_seconds,
        max_rounds=options.max_rounds,
        window=5,
    )
    macs = {s.key: _macs(model, s, shape, folder) for s in timed}
    rows = speed_rows(timed, timings, macs, shape[0] * shape[1]) if timed else []
    wait(options.device)
    fastest = min(rows, key=lambda row: row["median_ms"], default=None)
    words = (
        f"{fastest['median_ms']:.3f} ms, {fastest['runtime']} {fastest['variant']}" if fastest else "nothing"
    )
    print(f"  {shape[0]}x{shape[1]}: {'' if settled else 'did NOT settle; '}fastest {words}", flush=True)
    return {"batch_size": shape[0], "sequence_length": shape[1], "settled": settled, "rows": rows}


def _macs(model: Model, subject: Subject, shape: tuple[int, int], folder: Path) -> Macs:
    plugin = model.plugins[subject.ratio]
    bottleneck = plugin.config.bottleneck_size if plugin else 0
    graph = folder / f"ratio-{subject.ratio}.onnx"
    counted = (
        graph_macs(graph, *shape, subject.ratio) if subject.group != "torch" and graph.exists() else None
    )
    return Macs(analytic_macs(model.backbone.info.size, *shape, subject.ratio, bottleneck), counted)


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
    draw(json.loads(result.read_text(encoding="utf-8"))["parts"], path)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
