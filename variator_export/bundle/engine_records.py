"""What is known of engines from running them: which GPU verified which engine, when, with what error.

The records lie among the reports of a bundle, because they have dates. Each is of one engine by its sha256,
so it never speaks for another one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENGINE_RECORDS = "reports/engine-verifications.json"
# The name of an engine that runs every ratio, in the place of a variant's.
ANY_RATIO = "any-ratio"
BUILT_ONLY = "built, not verified on a device"


@dataclass(frozen=True)
class EngineRecord:
    """One verification of one engine.

    Attributes:
        sha256: Of the engine.
        gpu: Where it ran, as the driver calls it.
        passed: Whether everything was within its limit.
        worst: The largest multiple of the base error that was found; None: no multiple would have passed.
        allowed: The multiple that is allowed.
        largest: The largest shape that was looked at.
        reference: What it was compared with.
        verified_at: ISO 8601, UTC.
        precision: Shares of its multiply-accumulates by the inspector: `asked`, `other` and `unknown`; None:
            TensorRT does not say.
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
    """All of a bundle; a file that is not there or broken is as none: nothing is verified by it."""
    try:
        content = json.loads((bundle / ENGINE_RECORDS).read_text(encoding="utf-8"))
        return [EngineRecord(**entry) for entry in content["engines"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def records_document(records: Sequence[EngineRecord]) -> dict[str, Any]:
    """As the file holds them: the last of each engine and GPU."""
    latest = {(r.sha256, r.gpu): r for r in sorted(records, key=lambda record: record.verified_at)}
    return {"engines": [asdict(latest[key]) for key in sorted(latest)]}
