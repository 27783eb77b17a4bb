"""Reports in a bundle: what was measured of it. They are not part of what the manifest hashes."""

import json
from pathlib import Path
from typing import Any

from variator_export.bundle.publishing import writing_to
from variator_export.core.json_file import write_json

# A file that was being written when its process was killed.
PART_SUFFIX = ".part"

SPEED_REPORT = "reports/speed.json"
QUALITY_REPORT = "reports/quality.json"
VERIFICATION_REPORT = "reports/verification.json"
BENCHMARK_REPORT = "reports/benchmark.json"
ENGINES_REPORT = "reports/engines.json"
PAGE = "reports/report.html"


def engine_verification_report(target: str) -> str:
    """Where `verify --target` keeps what it found."""
    return f"reports/verification-{target}.json"


def build_verification_report(variant: str) -> str:
    """Where a build keeps what it found of a variant."""
    return f"reports/verification/{variant}.json"


def store_report(bundle: Path, name: str, content: Any, state: str) -> Path:
    """Write a report beside its place and then over it: a reader never sees half of one.

    Args:
        bundle: The bundle's folder.
        name: The report's place in it.
        content: As JSON.
        state: What is true if it cannot be written, for the message.

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
    """A report; one that is not there, cannot be read or lacks a key is as none."""
    try:
        content = json.loads((bundle / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.keys() >= set(keys) else None
