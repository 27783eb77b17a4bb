"""Quality results that `evaluate` stored in a bundle, for reports that show quality beside speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from variator_export.bundle.reports import QUALITY_REPORT, read_report

# Embeddings lose neighbours long before they lose Spearman's correlation, and search needs the neighbours.
# These metrics are 1 for the uncompressed model.
_FIDELITY = ("cosine", "recall_at_10")


def quality_of_graphs(bundle: Path, graphs: Mapping[str, str], baseline: str) -> list[dict[str, Any]]:
    """Results that `evaluate` stored for these graphs; a broken report counts as empty.

    A variant's result holds as long as it and the baseline, which it is compared with, compute the same.

    Args:
        bundle: The bundle's folder.
        graphs: The hash of each variant (`BundleFiles.variant_hashes`).
        baseline: The name of the baseline.
    """
    found = []
    try:
        for report in (read_report(bundle, QUALITY_REPORT) or {}).values():
            valid = {name for name, sha256 in report["graphs"].items() if graphs.get(name) == sha256}
            if baseline not in valid:
                continue
            metric = report["metric"]
            rows = {row["variant"]: row for row in report["rows"]}  # the last runtime wins: the graphs
            found.append(
                {
                    "task": report["task"],
                    "data": report["data"]["name"],
                    "columns": report["data"].get("columns", {}),
                    "max_tokens": report["data"].get("max_tokens"),
                    "metric": metric,
                    "examples": report["data"].get("examples"),
                    "warnings": [str(warning) for warning in report["warnings"]],
                    "variants": {
                        name: {
                            "value": _number(row["metrics"][metric]),
                            "interval": _interval(row["interval"]),
                            "lost": _number(row["relative_loss"]),
                            "loss_interval": _interval(row["loss_interval"]),
                            "metrics": {key: _number(value) for key, value in row["metrics"].items()},
                        }
                        for name, row in rows.items()
                        if name in valid
                    },
                }
            )
    except (KeyError, TypeError, AttributeError, ValueError):
        return []
    return found


def counted_metrics(quality: Mapping[str, Any]) -> list[str]:
    """The metrics whose losses decide: the task's main one, and for embeddings also their cosine and recall.

    Args:
        quality: A result as `quality_of_graphs` returns it.
    """
    there = {name for found in quality["variants"].values() for name in found["metrics"]}
    return [quality["metric"], *(n for n in _FIDELITY if n in there and n != quality["metric"])]


def counted_losses(quality: Mapping[str, Any], variant: str, metrics: Sequence[str] = ()) -> dict[str, float]:
    """Return a variant's relative losses on one data set, by metric.

    Args:
        quality: A result as `quality_of_graphs` returns it.
        variant: The variant's name.
        metrics: The metrics to return. Empty for all that count.
    """
    found = quality["variants"].get(variant)
    losses: dict[str, float] = {}
    for name in counted_metrics(quality) if found is not None else ():
        lost = found["lost"] if name == quality["metric"] else _lost_of_one(found["metrics"].get(name))
        if lost is not None and (not metrics or name in metrics):
            losses[name] = float(lost)
    return losses


def between(interval: Sequence[float] | None, form: str) -> str:
    """An interval in brackets, to stand behind its value. Empty if there is none, or no width."""
    if interval is None or interval[0] == interval[1]:  # the uncompressed model loses nothing
        return ""
    return f" ({interval[0]:{form}} to {interval[1]:{form}})"


def _lost_of_one(value: float | None) -> float | None:
    return None if value is None else 1 - value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _interval(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = value
    return float(low), float(high)
