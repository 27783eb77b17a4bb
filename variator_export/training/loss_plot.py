"""A plot of the losses of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from variator_export.training.checkpoints import History

# The salt is fixed, so that equal losses give equal bytes. Keeping text as text keeps the file small.
_STYLE: Any = {"svg.hashsalt": "variator-export", "svg.fonttype": "none"}


def save_loss_plot(history: History, names: Sequence[str], path: Path) -> None:
    """Plot the held-out loss of each metric in `names` over the steps, and save the plot as SVG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        steps = [point.step for point in history.held_out]
        for name in names:
            axes.plot(steps, [point.metrics[name] for point in history.held_out], label=name, marker=".")
        axes.axvline(history.best_step, color="0.6", linewidth=0.8, linestyle="--")
        axes.set_xlabel("step (dashed: the one that was kept)")
        axes.set_ylabel("held-out loss")
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})
