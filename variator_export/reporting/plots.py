"""The plots of a report, as SVG for the page and as files."""

import io
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

# The salt is fixed, so that equal numbers give equal bytes. Text is kept as text: it is small and searchable,
# and the page sets its colour.
_STYLE: Any = {
    "svg.hashsalt": "variator-export",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    # Okabe and Ito's colours, which colour-blind readers can tell apart on light and dark backgrounds.
    "axes.prop_cycle": cycler(color=["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]),
}

Row = Mapping[str, Any]


def latency_plot(shapes: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the median latency of every runtime and variant over the tokens per call, both logarithmic."""
    figure, axes = _figure("tokens per call", "median latency in ms")
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for shape in sorted(shapes, key=_tokens):
        for row in shape["rows"]:
            series.setdefault((row["runtime"], row["variant"]), []).append((_tokens(shape), row["median_ms"]))
    plain = {row["variant"] for shape in shapes for row in shape["rows"] if row["is_baseline"]}
    runtimes, variants = ([*dict.fromkeys(key[i] for key in series)] for i in (0, 1))
    for (runtime, variant), points in series.items():
        place = variants.index(variant)
        axes.plot(
            *zip(*points, strict=True),
            color=f"C{runtimes.index(runtime)}",
            linestyle="--" if variant in plain else "-",
            marker="os^Dv"[place % 5],
            markersize=4,
            label=f"{variant}, {runtime}",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xticks(sorted({_tokens(shape) for shape in shapes}))
    _legend_beside(axes)
    return figure


def speedup_plot(shapes: Sequence[Mapping[str, Any]], runtime: str) -> Figure:
    """Plot each variant's speed-up and its interval at every shape, and the limit set by the saved MACs."""
    figure, axes = _figure("", f"speed-up on {runtime}")
    names = [f"{shape['batch_size']}x{shape['sequence_length']}" for shape in shapes]
    variants = _compressed(shapes, runtime)
    for index, variant in enumerate(variants):
        offset = (index - (len(variants) - 1) / 2) * 0.8 / max(1, len(variants))
        # A shape that was timed with other variants or runtimes has no row.
        there = [(i, row) for i, s in enumerate(shapes) if (row := _find(s, runtime, variant)) is not None]
        places, rows = [place + offset for place, _ in there], [row for _, row in there]
        values = [row["speedup"] for row in rows]
        below = [max(0.0, row["speedup"] - row["speedup_low"]) for row in rows]
        above = [max(0.0, row["speedup_high"] - row["speedup"]) for row in rows]
        axes.errorbar(places, values, yerr=[below, above], fmt="o", capsize=3, label=variant)
        allowed = [row["speedup_allowed"] for row in rows]
        axes.scatter(places, allowed, marker="_", s=160, color=axes.lines[-1].get_color(), alpha=0.6)
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    _legend_beside(axes, "dash: limit set by MACs")
    return figure


def error_plot(worst: Mapping[str, float], allowed: float) -> Figure:
    """Plot the worst deviation of each variant as a multiple of eager PyTorch's own rounding error.

    An infinite deviation, because of NaN or because the graph did not run, is a labelled bar of full height.
    """
    figure, axes = _figure("", "times eager's rounding error")
    top = max([allowed, *filter(math.isfinite, worst.values())]) * 1.1
    colors = ["C0" if math.isfinite(value) else "#D55E00" for value in worst.values()]
    axes.bar(list(worst), [min(value, top) for value in worst.values()], width=0.5, color=colors)
    for place, value in enumerate(worst.values()):
        if not math.isfinite(value):
            axes.text(place, top / 2, "no number", rotation=90, ha="center", va="center")
    axes.axhline(allowed, color="#D55E00", linestyle="--", label=f"allowed: {allowed:g}")
    axes.set_ylim(0, top)
    if len(worst) > 4:
        axes.tick_params(axis="x", rotation=20)
    _legend_beside(axes)
    return figure


@dataclass(frozen=True)
class TradeOff:
    """Speed and quality at one shape.

    Attributes:
        title: The shape.
        series: (label, speed-up, share of quality lost) of each variant, in order of the ratio, by series.
        alone: (speed-up, share lost) of what is shown for comparison, by name.
        dominated: Labels of points that are slower and worse than another.
    """

    title: str
    series: Mapping[str, Sequence[tuple[str, float, float]]]
    alone: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    dominated: Collection[str] = ()


def trade_off_plot(panels: Sequence[TradeOff], quality: str) -> Figure:
    """Plot the quality that is left over the speed-up, in a panel for each shape.

    Args:
        panels: The shapes.
        quality: Name of the quality metric.
    """
    with matplotlib.rc_context(_STYLE):
        width = 7.2 if len(panels) == 1 else 1.6 + 2.4 * len(panels)
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(axes_of, panels, strict=True):
            _draw_trade_off(axes, panel)
        axes_of[0].set_ylabel(f"{quality} left in %")
        handles, labels = axes_of[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _draw_trade_off(axes: Axes, panel: TradeOff) -> None:
    for name, points in panel.series.items():
        places = [(speedup, 100 * (1 - lost)) for _, speedup, lost in points]
        (line,) = axes.plot(*zip(*places, strict=True), label=name)
        for (label, *_), place in zip(points, places, strict=True):
            face = "none" if label in panel.dominated else line.get_color()
            axes.plot(*place, "o", markersize=5, color=line.get_color(), markerfacecolor=face)
            axes.annotate(label, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    for (name, (speedup, lost)), marker in zip(
        panel.alone.items(), itertools.cycle("sDX^vPh*<>"), strict=False
    ):
        place = (speedup, 100 * (1 - lost))
        axes.plot(*place, marker, color="0.45", markersize=5, linestyle="none", label=name)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("speed-up")
    axes.margins(0.15)


def as_svg(figure: Figure) -> str:
    """Render a figure as an SVG element for a page, without XML header. The page sets its size."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, depending on the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    return figure, axes


def _legend_beside(axes: Axes, title: str | None = None) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title=title, fontsize=9)


def _tokens(shape: Mapping[str, Any]) -> int:
    return int(shape["batch_size"] * shape["sequence_length"])


def _compressed(shapes: Sequence[Mapping[str, Any]], runtime: str) -> list[str]:
    rows = [row for shape in shapes for row in shape["rows"]]
    return list(dict.fromkeys(r["variant"] for r in rows if r["runtime"] == runtime and not r["is_baseline"]))


def _find(shape: Mapping[str, Any], runtime: str, variant: str) -> Row | None:
    rows: Sequence[Row] = shape["rows"]
    return next((row for row in rows if (row["runtime"], row["variant"]) == (runtime, variant)), None)
