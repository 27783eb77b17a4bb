"""The plot of `gpu.py`: how much faster each ratio is than the fastest run without plugins."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from variator_export.reporting.plots import save

Measured = Mapping[str, Any]
_COLOURS = {"2": "#0072B2", "4": "#E69F00", "8": "#009E73"}


def draw(measured: Measured, path: Path) -> None:
    """One panel for each model and precision: the fastest way at each ratio over the fastest at ratio 1."""
    timed = [key.split("/") for key, found in measured.items() if "times" in found]
    models, precisions, _, shapes = (list(dict.fromkeys(names)) for names in zip(*timed, strict=True))
    figure = Figure(figsize=(3.6 * len(precisions) + 0.8, 3.0 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(precisions), squeeze=False, sharey=True)
    drawn = {}
    for row, model in enumerate(models):
        for column, precision in enumerate(precisions):
            axes = panels[row][column]
            axes.set_title(f"{model}, {precision}", fontsize=10)
            for ratio, colour in _COLOURS.items():
                points = [
                    (place, *found)
                    for place, shape in enumerate(shapes)
                    if (found := _best(measured, (model, precision, shape), ratio))
                ]
                if points:
                    places, gained, allowed = zip(*points, strict=True)
                    (line,) = axes.plot(places, gained, "o-", color=colour, markersize=4)
                    axes.scatter(places, allowed, marker="_", s=120, color=colour, alpha=0.6)
                    drawn[f"ratio {ratio}"] = line
            axes.axhline(1, color="0.5", linewidth=0.8)
            axes.set_xticks(range(len(shapes)), shapes, rotation=45, fontsize=8)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[row][0].set_ylabel("speed-up over the fastest\nrun without plugins")
    title = "dash: what\nMACs allow"
    figure.legend(drawn.values(), drawn, loc="outside right upper", frameon=False, title=title)
    save(figure, path)


def _best(measured: Measured, place: tuple[str, str, str], ratio: str) -> tuple[float, float] | None:
    """The speed-up of the fastest way at a ratio, and what the MACs allow."""
    model, precision, shape = place
    there = [
        found
        for key, found in measured.items()
        if "times" in found and key.startswith(f"{model}/{precision}/") and key.endswith(f"/{shape}")
    ]
    if not there or ratio not in there[0]["times"]:
        return None
    fastest = {
        r: min(found["times"][r].get("warm_ms", found["times"][r]["wall_ms"])["median"] for found in there)
        for r in ("1", ratio)
    }
    macs = there[0]["macs"]
    return fastest["1"] / fastest[ratio], macs["1"] / macs[ratio]
