"""The plot of `curve.py`: what plugins, modules, both, and layers left out lose, over their speed.

python benchmarks/curve_plot.py benchmarks/results/curve-cpu.json docs/curve-minilm.png
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHAPE = "8x128"
KINDS = {
    "plugins": ("#1d4ed8", "o"),
    "modules": ("#0e9f8a", "s"),
    "both": ("#d9a404", "^"),
    "layers left out": ("#db5c1f", "v"),
}
METRICS = {"STS-B": "spearman", "SST-2": "accuracy", "AG News": "accuracy"}


@dataclass(frozen=True)
class Point:
    """A model: its kind, the assembly or ratio, its speed over the original in float32, and what it loses."""

    kind: str
    variant: str
    precision: str
    speedup: float
    quality: float
    lost: float


def points(result: Mapping[str, Any], task: str, shape: str = SHAPE) -> Iterator[Point]:
    """Yield every model of a task; losses are shares of the original's metric in float32."""
    metric, ways = METRICS[task], result["tasks"][task]["ways"]
    original = ways["plugins and modules"]["float32"]["ratio-1"]["metrics"][metric]
    for way, precisions in ways.items():
        for precision, variants in precisions.items():
            speeds = result["speed"][shape][precision]
            for variant, measured in variants.items():
                name = variant
                if way.startswith("left out"):
                    name = way_variant(way)
                    # On STS-B it is an assembly beside the original; elsewhere a model of its own.
                    if variant != (name if task == "STS-B" else "ratio-1"):
                        continue
                if name not in speeds:
                    continue
                value = measured["metrics"][metric]
                yield Point(
                    kind_of(way, name),
                    name,
                    precision,
                    speeds[name]["speedup"]["value"],
                    value,
                    1 - value / original,
                )


def measured_tasks(result: Mapping[str, Any]) -> list[str]:
    """The tasks of a result, in order."""
    return [task for task in METRICS if task in result["tasks"]]


def way_variant(way: str) -> str:
    """The variant with the same layers as a way that leaves layers out: `left out enc=2x3`."""
    return way.removeprefix("left out ").replace("=", "-")


def kind_of(way: str, variant: str) -> str:
    """The kind of a model."""
    if way.startswith("left out"):
        return "layers left out"
    if variant.startswith("enc-"):
        return "both" if "_ratio-" in variant else "modules"
    return "plugins"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw one panel for each task."""
    tasks = measured_tasks(result)
    size = 4 * len(tasks), 4.2
    figure, axes = plt.subplots(1, len(tasks), figsize=size, constrained_layout=True, squeeze=False)
    panels = list(axes[0])
    for panel, task in zip(panels, tasks, strict=True):
        for point in points(result, task):
            colour, marker = KINDS[point.kind]
            panel.plot(
                point.speedup,
                100 * point.lost,
                marker,
                color=colour,
                markerfacecolor=colour if point.precision == "float32" else "white",
                markersize=7,
            )
        panel.set_title(f"{task} ({METRICS[task]})")
        panel.set_xlabel("times faster than the original in float32")
        panel.axhline(0, color="#94a3b8", linewidth=0.8)
        panel.grid(color="#e2e8f0", linewidth=0.6)
    panels[0].set_ylabel("% lost of the original's metric")
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle="", label=kind)
        for kind, (colour, marker) in KINDS.items()
    ]
    handles += [
        plt.Line2D([], [], color="#475569", marker="o", linestyle="", label="float32"),
        plt.Line2D([], [], color="#475569", marker="o", markerfacecolor="white", linestyle="", label="int8"),
    ]
    panels[0].legend(handles=handles, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    plot(json.loads(options.result.read_text(encoding="utf-8")), options.output)


if __name__ == "__main__":
    main()
