"""Quality results that `evaluate` stored in a bundle, for reports that show quality beside speed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_export.bundle.reports import QUALITY_REPORT, read_report


def quality_of_graphs(bundle: Path, graphs: Mapping[str, str], baseline: str) -> list[dict[str, Any]]:
    """Results that `evaluate` stored for these graphs; a broken report counts as empty.

    A variant's result holds as long as its graph and the baseline's, which it is compared with, are the same.

    Args:
        bundle: The bundle's folder.
        graphs: The sha256 of each variant's graph.
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
                            "value": row["metrics"][metric],
                            "interval": row["interval"],
                            "lost": row["relative_loss"],
                            "loss_interval": row["loss_interval"],
                            "metrics": row["metrics"],
                        }
                        for name, row in rows.items()
                        if name in valid
                    },
                }
            )
    except (KeyError, TypeError, AttributeError):
        return []
    return found
