"""Verification: a graph against eager PyTorch, on every case, every output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from variator_export.core.errors import NumbersDisagreeError, UserError
from variator_export.core.tolerances import TOLERANCES
from variator_export.engines.base import Arrays, Runner
from variator_export.stages.cases import Case
from variator_export.stages.compare import Deviation, deviation


@dataclass(frozen=True)
class Finding:
    """The deviation of one output in one case."""

    graph: str
    case: str
    output: str
    shape: tuple[int, ...]
    deviation: Deviation

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {
            "graph": self.graph,
            "case": self.case,
            "output": self.output,
            "shape": list(self.shape),
            **self.deviation.as_dict(),
        }


def eager_outputs(
    reference: Runner, cases: Sequence[Case], progress: Callable[[], None] = lambda: None
) -> list[Arrays]:
    """What eager PyTorch gives in every case.

    Raises:
        UserError: It gives NaN or infinite values.
    """
    outputs = []
    for case in cases:
        found = reference.run(case.inputs)
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise UserError(
                    f"Eager PyTorch itself gives NaN or infinite values in {name}, case {case.name}, input "
                    f"shape {case.shape}: there is nothing to compare a graph with.",
                    "Check the weights of the backbone and of the plugin.",
                )
        outputs.append(found)
        progress()
    return outputs


def verify_graph(
    name: str,
    graph: Runner,
    cases: Sequence[Case],
    expected: Sequence[Arrays],
    *,
    ratio: int,
    precision: str,
    progress: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Compare a graph with its reference.

    Args:
        name: The graph's file name.
        graph: Runs it.
        cases: The inputs.
        expected: The reference's outputs, one for each case.
        ratio: For messages.
        precision: Chooses the tolerance.

    Returns:
        One finding for each case and output.

    Raises:
        NumbersDisagreeError: An output is missing, has another shape, or misses its tolerance.
    """
    findings = []
    for case, reference in zip(cases, expected, strict=True):
        found = graph.run(case.inputs)
        for output, values in reference.items():
            where = f"{name} (ratio {ratio}), case {case.name}, input shape {case.shape}, output {output}"
            if output not in found or found[output].shape != values.shape:
                shape = found[output].shape if output in found else "missing"
                raise NumbersDisagreeError(
                    f"{where}: the graph gives shape {shape}, eager PyTorch {values.shape}. "
                    "It was not published.",
                    "This is a fault of the export: please report it with the recipe.",
                )
            result = Finding(name, case.name, output, values.shape, deviation(found[output], values))
            if not result.deviation.within(TOLERANCES[precision]):
                limit = TOLERANCES[precision]
                raise NumbersDisagreeError(
                    f"{where}: {result.deviation}. Allowed in {precision}: relative Frobenius error "
                    f"{limit.relative_frobenius:.0e}, max absolute error {limit.max_abs_over_scale:.0e} of "
                    "the largest value. It was not published.",
                    "If the backbone or plugin holds very large values, check them; otherwise this is a "
                    "fault of the export: please report it with the recipe.",
                )
            findings.append(result)
        progress()
    return findings


def save_reference(cases: Sequence[Case], expected: Sequence[Arrays], path: Path) -> None:
    """Store the small cases with their eager outputs, so that a machine without torch can verify."""
    tensors: dict[str, np.ndarray] = {}
    for case, outputs in zip(cases, expected, strict=True):
        if not case.stored:
            continue
        tensors |= {f"{case.name}/inputs/{name}": array for name, array in case.inputs.items()}
        tensors |= {f"{case.name}/outputs/{name}": array for name, array in outputs.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}))
