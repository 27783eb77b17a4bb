"""What to deploy on a CPU: every precision and ratio of one model, with its speed and its quality.

    variator-export build minilm --target onnxruntime
    variator-export build minilm --precision int8 --target onnxruntime
    variator-export build minilm --precision int8-static --target onnxruntime \
        --calibration STS-B/train.tsv --calibration-column sentence1
    variator-export build minilm --precision bfloat16 --target onnxruntime
    python benchmarks/cpu.py artifacts/minilm{,-int8,-int8-static,-bfloat16} \
        --data STS-B/dev.tsv --text-column sentence1 --pair-column sentence2 --label-column score \
        --calibration STS-B/train.tsv \
        --output benchmarks/results/cpu-minilm.json --plot docs/cpu-minilm.png

Beside the graphs of the bundles runs what users pick otherwise (the extras alternatives and torchao). All
take turns. Quality is Spearman's correlation of embeddings with scores of pairs, or a classifier's accuracy.
"""

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from common import describe, write_result
from variator_export import Bundle, Columns, read_examples
from variator_export.benchmark.runtimes import ALTERNATIVES, LASTING_RUNTIMES, open_subjects
from variator_export.benchmark.speed_table import Subject, speed_inputs
from variator_export.benchmark.timing import Timings, join, speedup, time_in_turns
from variator_export.core.precision import find_precision
from variator_export.data.examples import Examples
from variator_export.engines.base import Runner
from variator_export.engines.target import SessionOptions
from variator_export.inference import TextModel
from variator_export.reporting.plots import TradeOff, save, trade_off_plot
from variator_export.verification.eager_bundle import load_bundle_backbone

SHAPES = ((1, 32), (8, 128), (32, 128), (1, 512))
OTHERS = ("eager", "torch.compile", *ALTERNATIVES)
# Other runtimes of the same float32 numbers, within rounding: they have the quality of our graph.
EXACT = (
    "eager", "torch.compile", "torch.onnx", "onnxruntime-optimizer", "transformers-exporter", "openvino",
    "ctranslate2",
)  # fmt: skip
# Alternatives in int8.
INT8 = ("quantize_dynamic", "openvino-nncf", "torchao", "ctranslate2-int8")
# The curves of the picture.
SERIES = {
    ("float32", "onnxruntime"): "float32",
    ("int8", "onnxruntime"): "int8",
    ("int8-static", "openvino"): "int8-static, OpenVINO",
    ("bfloat16", "openvino"): "bfloat16, OpenVINO",
}
# The alternatives in the picture: what is slower than another of its precision says little there.
DRAWN = ("torch.onnx", "torch.compile", "quantize_dynamic", "openvino-nncf", "torchao", "ctranslate2-int8")
CALIBRATION_TEXTS = 300
Place = tuple[str, str, str]  # bundle's precision, runtime, variant


def main() -> None:
    """Measure speed and quality of the bundles, and write the result and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", help="one for each precision, float32 among them")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text-column", required=True)
    parser.add_argument("--pair-column")
    parser.add_argument("--label-column", required=True)
    parser.add_argument("--calibration", type=Path, help="texts for quantisations that need examples")
    parser.add_argument("--openings", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    columns = Columns(arguments.text_column, arguments.pair_column, arguments.label_column)
    examples = read_examples(arguments.data, columns)
    texts: tuple[str, ...] = ()
    if arguments.calibration is not None:
        texts = tuple(read_examples(arguments.calibration, columns).texts[:CALIBRATION_TEXTS])
    loaded = [Bundle.load(path) for path in arguments.bundles]
    bundles = {bundle.manifest.precision: bundle for bundle in loaded}
    torch._dynamo.config.recompile_limit = 64
    with ExitStack() as stack:
        openers = {
            name: stack.enter_context(
                open_subjects(
                    bundle,
                    lambda bundle=bundle: load_bundle_backbone(  # type: ignore[misc]
                        bundle, None, "", find_precision(bundle.manifest.precision).unquantized
                    ),
                    SessionOptions(arguments.threads),
                    texts,
                )
            )
            for name, bundle in bundles.items()
        }

        def open_place(place: Place) -> Subject:
            bundle, runtime, variant = place
            return openers[bundle].open_again(runtime, variant)

        places, subjects = open_everything(bundles, open_place)
        base = ("float32", "onnxruntime", bundles["float32"].manifest.baseline.name)
        quality: dict[Place, float] = {}
        for place in places:
            same = (place[0], "onnxruntime", place[2])
            exact = place[0] == "float32" and place[1] in EXACT and same in quality
            quality[place] = (
                quality[same] if exact else score(bundles[place[0]], subjects[place].runner, examples)
            )
            print(place, round(quality[place], 4), flush=True)
        timed: dict[tuple[int, int], list[Mapping[str, Timings]]] = {shape: [] for shape in SHAPES}
        for opening in range(arguments.openings):
            if opening:
                lasting = {p: s for p, s in subjects.items() if p[1] in LASTING_RUNTIMES}
                subjects = {p: lasting[p] if p in lasting else open_place(p) for p in places}
            order = np.random.default_rng(opening).permutation(len(places))
            for shape in SHAPES:
                timed[shape].append(
                    time_shape(bundles["float32"], subjects, [places[i] for i in order], shape)
                )
                print(opening, shape, flush=True)
    rows = [
        row_of(place, base, quality, {shape: join(found) for shape, found in timed.items()})
        for place in places
    ]
    metric = "spearman" if bundles["float32"].manifest.backbone.task != "text-classification" else "accuracy"
    write_result(
        arguments.output,
        {
            "question": "What to deploy on a CPU: which precision, which ratio?",
            "data": f"{arguments.data.parent.name}/{arguments.data.name}",
            "metric": metric,
            "examples": len(examples.texts),
            "calibration": len(texts),
            "openings": arguments.openings,
            "threads": arguments.threads,
            "rows": rows,
            **describe("openvino", "nncf", "torchao", "ctranslate2"),
        },
    )
    if arguments.plot is not None:
        draw(rows, metric, arguments.plot)


def open_everything(
    bundles: Mapping[str, Bundle], open_place: Callable[[Place], Subject]
) -> tuple[list[Place], dict[Place, Subject]]:
    """Open every graph of the bundles and every alternative that runs here."""
    manifests = {name: bundle.manifest for name, bundle in bundles.items()}
    names = {name: [variant.name for variant in manifest.variants] for name, manifest in manifests.items()}
    # In int8-static ONNX Runtime computes the products in float32.
    on_onnxruntime = {name: of for name, of in names.items() if name != "int8-static"}
    wanted = [(name, "onnxruntime", variant) for name, of in on_onnxruntime.items() for variant in of]
    wanted += [(name, "openvino", variant) for name, of in names.items() for variant in of]
    wanted += [("float32", runtime, manifests["float32"].baseline.name) for runtime in OTHERS]
    if "bfloat16" in names:
        wanted += [("bfloat16", runtime, manifests["bfloat16"].baseline.name) for runtime in OTHERS[:2]]
    subjects: dict[Place, Subject] = {}
    for place in wanted:
        try:
            subject = open_place(place)
            subject.runner.run(speed_inputs(bundles["float32"].manifest.backbone.inputs, 30522, 1, 32))
        except Exception as error:
            print(f"{place} is left out: {error}")
        else:
            subjects[place] = subject
    return list(subjects), subjects


def score(bundle: Bundle, runner: Runner, examples: Examples) -> float:
    """Spearman's correlation of the cosines of pairs with their scores, or a classifier's accuracy."""
    run = lambda inputs, _: runner.run(inputs)  # noqa: E731
    model = TextModel(run, bundle.text_encoder(), bundle.manifest.backbone, bundle.config())
    with torch.compiler.set_stance("force_eager"):  # instead of compiling for every shape of the data
        return _score(model, bundle, examples)


def _score(model: TextModel, bundle: Bundle, examples: Examples) -> float:
    if examples.pairs is not None:
        first, second = model.embed(examples.texts), model.embed(examples.pairs)
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        return float(spearmanr((first * second).sum(1) / norms, examples.scores()).statistic)
    found = [found["label"] for found in model.predict(examples.texts)]
    names = bundle.config()["id2label"]
    wanted = [names.get(str(target), str(target)) for target in examples.targets or ()]
    return float(np.mean([one == other for one, other in zip(found, wanted, strict=True)]))


def time_shape(
    bundle: Bundle,
    subjects: Mapping[Place, Subject],
    places: list[Place],
    shape: tuple[int, int],
) -> Mapping[str, Timings]:
    """Time all subjects at one shape, in turns."""
    inputs = speed_inputs(bundle.manifest.backbone.inputs, 30522, *shape)
    calls: dict[str, Callable[[], object]] = {
        " ".join(place): lambda place=place: subjects[place].runner.run(inputs)  # type: ignore[misc]
        for place in places
    }
    return time_in_turns(calls, block_seconds=0.3, window=3, max_rounds=7)[0]


def row_of(
    place: Place,
    base: Place,
    quality: Mapping[Place, float],
    timed: Mapping[tuple[int, int], Mapping[str, Timings]],
) -> dict[str, Any]:
    """One subject's quality, and its time at every shape with the speed-up over float32 at ratio 1."""
    precision, runtime, variant = place
    shapes = []
    for (batch_size, length), timings in timed.items():
        found = speedup(timings[" ".join(base)], timings[" ".join(place)])
        shapes.append(
            {
                "batch_size": batch_size,
                "sequence_length": length,
                "median_ms": round(timings[" ".join(place)].median_ms, 3),
                "speedup": round(found.value, 3),
                "speedup_low": round(found.low, 3),
                "speedup_high": round(found.high, 3),
            }
        )
    return {
        "precision": "int8" if runtime in INT8 else precision,
        "runtime": runtime,
        "variant": variant,
        "quality": round(quality[place], 4),
        "lost": round(1 - quality[place] / quality[base], 4),
        "shapes": shapes,
    }


def draw(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """A panel for each shape: the quality that is left over the speed-up."""
    panels = []
    for place, shape in enumerate(rows[0]["shapes"]):
        series: dict[str, list[tuple[str, float, float]]] = {}
        alone: dict[str, tuple[float, float]] = {}
        for row in rows:
            point = (row["shapes"][place]["speedup"], row["lost"])
            if (name := SERIES.get((row["precision"], row["runtime"]))) is not None:
                series.setdefault(name, []).append((f"k={row['variant'].removeprefix('ratio-')}", *point))
            elif row["runtime"] in DRAWN:
                name = row["runtime"] + (f", {row['precision']}" if row["precision"] == "bfloat16" else "")
                alone[name] = point
        title = f"{shape['batch_size']} x {shape['sequence_length']}"
        panels.append(TradeOff(title, series, alone))
    save(trade_off_plot(panels, metric), path)


if __name__ == "__main__":
    main()
