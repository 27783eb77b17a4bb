"""Reports in a bundle: the measurements of the bundle. The manifest does not hash them."""

import json
from pathlib import Path
from typing import Any

from variator_export.bundle.publishing import writing_to
from variator_export.core.json_file import write_json

# The suffix of an unfinished file, left behind if the process is killed while writing.
PART_SUFFIX = ".part"

SPEED_REPORT = "reports/speed.json"
QUALITY_REPORT = "reports/quality.json"
VERIFICATION_REPORT = "reports/verification.json"
BENCHMARK_REPORT = "reports/benchmark.json"
# Every run of `bench`, one file each.
BENCHMARKS = "reports/benchmarks"
ENGINES_REPORT = "reports/engines.json"
PAGE = "reports/report.html"


def engine_verification_report(target: str) -> str:
    """The path of the report of `verify --target`."""
    return f"reports/verification-{target}.json"


def build_verification_report(variant: str) -> str:
    """The path of a build's verification report for a variant."""
    return f"reports/verification/{variant}.json"


def store_report(bundle: Path, name: str, content: Any, state: str) -> Path:
    """Write a report to a temporary file and then rename it, so a reader never sees a partial report.

    Args:
        bundle: The bundle's folder.
        name: The report's path within the bundle.
        content: The report, as a JSON value.
        state: The state of the bundle if the write fails, for the message.

    Raises:
        UserError: The bundle cannot be written.
    """
    path = bundle / name
    with writing_to(bundle, state):
        unfinished = path.with_name(path.name + PART_SUFFIX)
        write_json(unfinished, content)
        unfinished.replace(path)
    return path


def read_report(bundle: Path, name: str, *keys: str) -> dict[str, Any] | None:
    """The content of a report; None if the file is missing, is unreadable or lacks one of the keys."""
    try:
        content = json.loads((bundle / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.keys() >= set(keys) else None
