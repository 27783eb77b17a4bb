"""What to deploy on a CPU: every precision and ratio of one model, with its speed and its quality.

    variator-export build minilm --target onnxruntime
    variator-export build minilm --precision int8 --target onnxruntime
    python benchmarks/cpu.py artifacts/minilm artifacts/minilm-int8 --data STS-B/dev.tsv \
        --output benchmarks/results/cpu-minilm.json --plot docs/cpu-minilm.png

Beside the graphs of both bundles run what users pick otherwise: PyTorch, the plain export of torch.onnx, and
that export after ONNX Runtime's `quantize_dynamic`. All take turns. Quality is Spearman's correlation on the
pairs of a similarity task (columns sentence1, sentence2, score).
"""

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from common import describe, write_result
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from variator_export import Bundle, Columns, read_examples
from variator_export.benchmark.runtimes import open_subjects
from variator_export.benchmark.speed_table import Subject, speed_inputs
from variator_export.benchmark.timing import Timings, join, speedup, time_in_turns
from variator_export.engines.base import Runner
from variator_export.inference import TextModel
from variator_export.reporting.plots import save
from variator_export.verification.eager_bundle import load_bundle_backbone

SHAPES = ((1, 32), (8, 128), (32, 128), (1, 512))
ALTERNATIVES = {"eager": "PyTorch", "torch.onnx": "torch.onnx", "quantize_dynamic": "quantize_dynamic"}


def main() -> None:
    """Measure speed and quality of both bundles, and write the result and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("float32", type=Path)
    parser.add_argument("int8", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--openings", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    bundles = {"float32": Bundle.load(arguments.float32), "int8": Bundle.load(arguments.int8)}
    with ExitStack() as stack:
        openers = {
            name: stack.enter_context(
                open_subjects(
                    bundle, lambda: load_bundle_backbone(bundles["float32"], None, ""), arguments.threads
                )
            )
            for name, bundle in bundles.items()
        }
        places = [("float32", runtime, bundles["float32"].manifest.baseline.name) for runtime in ALTERNATIVES]
        places += [
            (name, "onnxruntime", variant.name)
            for name, bundle in bundles.items()
            for variant in bundle.manifest.variants
        ]

        def open_place(place: tuple[str, str, str]) -> Subject:
            bundle, runtime, variant = place
            return openers[bundle].open_again(runtime, variant)

        quality = {
            place: score(bundles[place[0]], open_place(place).runner, arguments.data) for place in places
        }
        timed: dict[tuple[int, int], list[Mapping[str, Timings]]] = {shape: [] for shape in SHAPES}
        for opening in range(arguments.openings):
            subjects = {place: open_place(place) for place in places}
            order = np.random.default_rng(opening).permutation(len(places))
            for shape in SHAPES:
                timed[shape].append(
                    time_shape(bundles["float32"], subjects, [places[i] for i in order], shape)
                )
    rows = [
        row_of(place, quality, {shape: join(found) for shape, found in timed.items()}) for place in places
    ]
    write_result(
        arguments.output,
        {
            "question": "What to deploy on a CPU: which precision, which ratio?",
            "data": arguments.data.name,
            "openings": arguments.openings,
            "threads": arguments.threads,
            "rows": rows,
            **describe(),
        },
    )
    if arguments.plot is not None:
        draw(rows, arguments.plot)


def score(bundle: Bundle, runner: Runner, data: Path) -> float:
    """Spearman's correlation of the cosines of pairs with their scores."""
    examples = read_examples(data, Columns("sentence1", "sentence2", "score"))
    model = TextModel(runner.run, bundle.text_encoder(), bundle.manifest.backbone, bundle.config())
    assert examples.pairs is not None
    first, second = model.embed(examples.texts), model.embed(examples.pairs)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(spearmanr((first * second).sum(1) / norms, examples.scores()).statistic)


def time_shape(
    bundle: Bundle,
    subjects: Mapping[tuple[str, str, str], Subject],
    places: list[tuple[str, str, str]],
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
    place: tuple[str, str, str],
    quality: Mapping[tuple[str, str, str], float],
    timed: Mapping[tuple[int, int], Mapping[str, Timings]],
) -> dict[str, Any]:
    """One subject's quality, and its time at every shape with the speed-up over float32 at ratio 1."""
    base = ("float32", "onnxruntime", "ratio-1")
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
        "precision": "int8" if runtime == "quantize_dynamic" else precision,
        "runtime": runtime,
        "variant": variant,
        "spearman": round(quality[place], 4),
        "lost": round(1 - quality[place] / quality[base], 4),
        "shapes": shapes,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each shape: the quality that is left over the speed-up."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(SHAPES), sharey=True)
    colours = {"float32": "#0072B2", "int8": "#D55E00"}
    for place, axes in enumerate(panels):
        shape = rows[0]["shapes"][place]
        axes.set_title(f"{shape['batch_size']} x {shape['sequence_length']} tokens", fontsize=10)
        for precision, colour in colours.items():
            own = [r for r in rows if r["runtime"] == "onnxruntime" and r["precision"] == precision]
            points = [(r["shapes"][place]["speedup"], 100 * (1 - r["lost"])) for r in own]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=precision)
            for row, point in zip(own, points, strict=True):
                axes.annotate(
                    f"k={row['variant'].removeprefix('ratio-')}", point, fontsize=7,
                    xytext=(3, 4), textcoords="offset points",
                )  # fmt: skip
        for row, marker in zip([r for r in rows if r["runtime"] in ALTERNATIVES], "sDX", strict=True):
            axes.plot(
                row["shapes"][place]["speedup"], 100 * (1 - row["lost"]), marker, color="0.45",
                markersize=5, linestyle="none", label=ALTERNATIVES[row["runtime"]],
            )  # fmt: skip
        axes.set_xlabel("speed-up over float32, k=1")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("quality left, % of float32, k=1")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
