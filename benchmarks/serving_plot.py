"""The plot of `serving.py`: the load that is carried within the goal, over the quality lost.

python benchmarks/serving_plot.py benchmarks/results/serving-cpu.json docs/serving-minilm.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_STYLES = {
    "k=1": ("#1d4ed8", "o"),
    "k=2": ("#0e9f8a", "s"),
    "k=4": ("#d9a404", "^"),
    "k=8": ("#db5c1f", "v"),
    "slack": ("#64748b", "D"),
    "backlog": ("#a21caf", "*"),
}


def carried(runs: list[dict[str, Any]], policy: str, share: float) -> tuple[float, float] | None:
    """The largest load of which a share is answered within the goal, and what is lost there.

    Between two measured loads the share is taken to be a line. None if no measured load was carried.
    """
    of_policy = sorted((run for run in runs if run["policy"] == policy), key=lambda run: run["load"])
    best = None
    for index, run in enumerate(of_policy):
        if run["within_goal"] < share:
            break
        best = (run["load"], run["lost"])
        following = of_policy[index + 1] if index + 1 < len(of_policy) else None
        if following is not None and following["within_goal"] < share:
            part = (run["within_goal"] - share) / (run["within_goal"] - following["within_goal"])
            best = tuple(run[key] + part * (following[key] - run[key]) for key in ("load", "lost"))
    return best


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the load carried over the quality lost, and the share within the goal over the load."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    runs = result["traces"]["conv"]["runs"]
    for policy, (colour, marker) in _STYLES.items():
        of_policy = sorted((run for run in runs if run["policy"] == policy), key=lambda run: run["load"])
        if not of_policy:
            continue
        size = 13 if policy == "backlog" else 7
        loads = [100 * run["load"] for run in of_policy]
        left.plot(
            loads, [100 * run["within_goal"] for run in of_policy], color=colour, marker=marker, label=policy
        )
        point = carried(runs, policy, 0.99)
        if point is not None:
            right.plot(
                100 * point[1], 100 * point[0], color=colour, marker=marker, markersize=size, linestyle=""
            )
            right.annotate(
                policy,
                (100 * point[1], 100 * point[0]),
                # `slack` lies where k=1 does.
                xytext=(9, -12 if policy == "slack" else 5),
                textcoords="offset points",
                color=colour,
            )
    left.set_xlabel("load, % of what ratio 1 carries at most")
    left.set_ylabel(f"% within {result['goal_ms']:.0f} ms")
    left.set_ylim(50, 102)
    left.legend(fontsize=8)
    right.set_xlabel("Spearman lost, %")
    right.set_ylabel("load with 99 % within the goal, %")
    right.set_xlim(-0.08, 1.7)
    right.set_ylim(0, 105)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Draw, and print the load that each policy carries."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("plot", type=Path)
    options = parser.parse_args()
    result = json.loads(options.result.read_text(encoding="utf-8"))
    plot(result, options.plot)
    for name, trace in result["traces"].items():
        for policy in _STYLES:
            print(name, policy, carried(trace["runs"], policy, 0.99))


if __name__ == "__main__":
    main()
