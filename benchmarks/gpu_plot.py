"""The plot of `gpu.py`: how much faster each ratio is than the fastest run without plugins."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from variator_export.reporting.plots import save

Part = Mapping[str, Any]
_COLOURS = {2: "#0072B2", 4: "#E69F00", 8: "#009E73"}


def draw(parts: Sequence[Part], path: Path) -> None:
    """One panel for each model and precision: the fastest way at each ratio over the fastest at ratio 1."""
    models = list(dict.fromkeys(part["model"] for part in parts))
    precisions = list(dict.fromkeys(part["precision"] for part in parts))
    figure = Figure(figsize=(3.6 * len(precisions) + 0.8, 3.0 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(precisions), squeeze=False, sharey=True)
    for axes in panels.flat:
        axes.set_visible(False)  # where nothing was measured
    for part in parts:
        axes = panels[models.index(part["model"])][precisions.index(part["precision"])]
        axes.set_visible(True)
        axes.set_title(f"{part['model']}, {part['precision']}", fontsize=10)
        names = [f"{shape['batch_size']}x{shape['sequence_length']}" for shape in part["shapes"]]
        for ratio, colour in _COLOURS.items():
            points = [
                (place, *found)
                for place, shape in enumerate(part["shapes"])
                if (found := _best(shape, ratio))
            ]
            if points:
                places, gained, allowed = zip(*points, strict=True)
                axes.plot(places, gained, "o-", color=colour, markersize=4, label=f"ratio {ratio}")
                axes.scatter(places, allowed, marker="_", s=120, color=colour, alpha=0.6)
        axes.axhline(1, color="0.5", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, rotation=45, fontsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for row in panels:
        row[0].set_ylabel("speed-up over the fastest\nrun without plugins")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, title="dash: what\nMACs allow")
    save(figure, path)


def _best(shape: Part, ratio: int) -> tuple[float, float] | None:
    """The speed-up of the fastest way at a ratio, of any runtime, and what the MACs allow."""
    plain = [row for row in shape["rows"] if row["is_baseline"]]
    there = [row for row in shape["rows"] if row["ratio"] == ratio]
    if not plain or not there:
        return None
    fastest = min(row["median_ms"] for row in there)
    return min(row["median_ms"] for row in plain) / fastest, there[0]["speedup_allowed"]
