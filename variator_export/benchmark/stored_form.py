"""The form of a stored benchmark. A report is not hashed, so anybody may have changed it."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(gt=0)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True)


class _Row(_Form):
    runtime: str
    variant: str
    is_baseline: bool
    median_ms: _Positive
    p50_ms: float
    p90_ms: float
    p99_ms: float
    tokens_per_second: float
    speedup: float
    speedup_low: float
    speedup_high: float
    speedup_allowed: float
    share_of_allowed: float
    macs: float
    graph_macs: float | None


class _Module(_Form):
    module: str
    milliseconds: float
    share: float
    operators: dict[str, float]


class _Shape(_Form):
    batch_size: _Count
    sequence_length: _Count
    settled: bool
    rows: list[_Row]
    profiles: dict[str, list[_Module]]


class _Machine(_Form):
    cpu: str | None
    cpu_cores: int


class _Moment(_Form):
    gpu: list[str] | None


class _Conditions(_Form):
    after: _Moment


class _Run(_Form):
    graphs: dict[str, str]
    settings: dict[str, float | None]
    machine: _Machine
    conditions: _Conditions
    shapes: list[_Shape]
    measured_at: str


# The setting that may be open.
_OPEN = "threads"


def is_run(content: Mapping[str, Any]) -> bool:
    """Whether a report has the form of a run."""
    try:
        run = _Run.model_validate(dict(content))
    except ValidationError:
        return False
    return all(value is not None for name, value in run.settings.items() if name != _OPEN)
