"""Verification records of engines: which GPU verified which engine, when, and with what error.

The records are stored with a bundle's reports, because they contain dates. Each record identifies its engine
by sha256, so it never applies to another engine.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENGINE_RECORDS = "reports/engine-verifications.json"
# The name of an engine that runs every ratio, used in place of a variant's name.
ANY_RATIO = "any-ratio"
BUILT_ONLY = "built, not verified on a device"


@dataclass(frozen=True)
class EngineRecord:
    """One verification of one engine.

    Attributes:
        sha256: Hash of the engine file.
        gpu: GPU that ran the engine, as named by the driver.
        passed: Whether all errors were within their limits.
        worst: Largest multiple of the base error that was found. None if no multiple would have passed.
        allowed: Largest multiple of the base error that is allowed.
        largest: Largest shape that was verified.
        reference: Reference that the engine was compared with.
        verified_at: Time of the verification, ISO 8601 in UTC.
        precision: Shares of the engine's multiply-accumulates according to the engine inspector: `asked`,
            `other` and `unknown`. None if TensorRT does not report them.
    """

    sha256: str
    gpu: str
    passed: bool
    worst: float | None
    allowed: float
    largest: str
    reference: str
    verified_at: str
    precision: Mapping[str, float] | None = None

    def __str__(self) -> str:
        if not self.passed:
            return f"FAILED its verification on {self.gpu} ({self.verified_at})"
        return (
            f"verified on {self.gpu} ({self.verified_at}) up to {self.largest}, off by {self.worst:.2f} "
            f"times the error of eager PyTorch, allowed {self.allowed:g}"
        )


def read_records(bundle: Path) -> list[EngineRecord]:
    """All records of a bundle; a missing or broken file counts as empty, because it verifies nothing."""
    try:
        content = json.loads((bundle / ENGINE_RECORDS).read_text(encoding="utf-8"))
        return [EngineRecord(**entry) for entry in content["engines"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def records_document(records: Sequence[EngineRecord]) -> dict[str, Any]:
    """Content of the record file: the latest record of each engine and GPU."""
    latest = {(r.sha256, r.gpu): r for r in sorted(records, key=lambda record: record.verified_at)}
    return {"engines": [asdict(latest[key]) for key in sorted(latest)]}
