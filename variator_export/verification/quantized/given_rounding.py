"""Check of a quantised graph with its own rounding decisions.

A quantised model amplifies rounding: an activation near the middle between two integers falls to either side,
and a few layers later two correct computations differ by a few per cent. The other checks have to allow for
that. This check does not: it reads the values that the graph rounded to, has eager PyTorch go on from the
same values, and allows only the rounding of the floating-point type. The decisions are checked one by one:
each value must be the nearest one to the exact activation, up to the error that eager PyTorch itself has.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from variator_export.core.precision import find_precision
from variator_export.engines.base import Arrays
from variator_export.engines.eager import EagerModel
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.model.quantization.dynamic import ZERO_POINT
from variator_export.model.quantization.spacing import beyond_half_a_step, in_range
from variator_export.verification.cases import Case
from variator_export.verification.judging.compare import deviation
from variator_export.verification.judging.error_budget import GIVEN_MULTIPLE, Budget, make_budgets
from variator_export.verification.judging.expected import Expected, judge_carefully
from variator_export.verification.judging.judge import GIVEN_ROUNDING, Finding, Question, judge
from variator_export.verification.verified_graph import load_for_verification, open_changed

if TYPE_CHECKING:
    import onnx_ir as ir

ROUNDING = "rounds to the nearest value"
# Larger cases are left out, because every activation is held in float64.
_MOST_TOKENS = 1024


@dataclass(frozen=True)
class _Run:
    """One case run by a graph and, with the graph's rounding, by eager PyTorch in float64 and in its type."""

    case: Case
    found: Arrays
    exact: Arrays
    rounded: Arrays
    # Distance from the rounded values beyond half a step, and eager PyTorch's own error, both in the unit of
    # the rounded values.
    beyond: float
    error: float


def check_given_rounding(
    graphs: Mapping[str, Mapping[str, np.ndarray]],
    folder: Path,
    precision: str,
    exact: EagerModel,
    rounded: EagerModel,
    cases: Sequence[Case],
    progress: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Compare quantised graphs of one variant with eager PyTorch that uses the graphs' own rounding.

    Args:
        graphs: Additional inputs of each graph, by file.
        folder: The bundle's folder.
        precision: The graphs' precision.
        exact: The quantised model in float64.
        rounded: The quantised model in the precision's floating-point type.
        cases: The cases to run; those of more than 1,024 tokens are left out.
        progress: Called after each graph.
    """
    findings = []
    for file, extra in graphs.items():
        graph = _RecordingGraph(folder / file, extra, precision)
        small = [case for case in cases if np.prod(case.shape) <= _MOST_TOKENS]
        runs = [_run(graph, exact, rounded, case, precision) for case in small]
        findings += _judge_outputs(file, runs, graph, rounded, precision)
        findings.append(_judge_decisions(file, runs))
        progress()
    return findings


class _RecordingGraph:
    """A graph that also returns the values that it rounds activations to."""

    def __init__(self, path: Path, extra: Mapping[str, np.ndarray], precision: str) -> None:
        from variator_export.graph.modules import mark_outputs
        from variator_export.graph.weights import quantized_input, stored_weight

        model = load_for_verification(path, precision)
        # The quantised inputs of each linear layer, in the order of the calls.
        self._values: dict[str, list[str]] = {}
        for node in list(model.graph):
            if (values := quantized_input(node)) is not None:
                weight = stored_weight(node)
                assert weight is not None
                self._values.setdefault(str(weight.name), []).append(_readable(model.graph, values))
        mark_outputs(model, [value for values in self._values.values() for value in values])
        self._runner: OnnxRuntimeRunner = open_changed(model, path.parent, extra, precision)

    def run(self, inputs: Mapping[str, np.ndarray]) -> tuple[Arrays, dict[str, list[np.ndarray]]]:
        """Return the outputs, and the values that each linear layer read, by the name of its weight."""
        found = self._runner.run(inputs)
        # Query, key and value read one value.
        signed = {name: _signed(found[name]) for values in self._values.values() for name in values}
        return found, {name: [signed[value] for value in values] for name, values in self._values.items()}


def _readable(graph: "ir.Graph", value: "ir.Value") -> str:
    """The name of a quantised value, as float32 if numpy does not have its type."""
    import onnx_ir as ir

    if value.dtype in (ir.DataType.UINT8, ir.DataType.INT8):
        return str(value.name)
    name = f"{value.name}.readable"
    if not any(node.outputs[0].name == name for node in value.consumers()):
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, num_outputs=1)
        cast.outputs[0].name, cast.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        cast.outputs[0].shape = value.shape
        graph.append(cast)
    return name


def _finite(value: float) -> float:
    """The value; infinity for NaN, which no comparison would find."""
    return float(value) if np.isfinite(value) else float("inf")


def _signed(values: np.ndarray) -> np.ndarray:
    """Quantised values as they are multiplied: without the zero point."""
    return values.astype(np.int16) - ZERO_POINT if values.dtype == np.uint8 else values


def _run(graph: _RecordingGraph, exact: EagerModel, rounded: EagerModel, case: Case, precision: str) -> _Run:
    found, chosen = graph.run(case.inputs)
    wanted, activations = exact.run_with_rounding(case.inputs, chosen)
    other, inexact = rounded.run_with_rounding(case.inputs, chosen)
    beyond = error = 0.0
    kind = find_precision(precision)
    for name, calls in activations.items():
        for values, near, nearest in zip(calls, inexact[name], chosen[name], strict=True):
            # Attention over nothing is undefined, so a row of padding alone holds arbitrary values.
            rows = case.judged_rows if len(values) == len(case.judged_rows) else slice(None)
            values, near, nearest = values[rows], near[rows], nearest.reshape(values.shape)[rows]
            beyond = max(beyond, _finite(beyond_half_a_step(values, nearest, kind).max()))
            error = max(error, float(np.abs(in_range(values, kind) - in_range(near, kind)).max()))
    return _Run(case, {name: found[name] for name in wanted}, wanted, other, beyond, error)


def _judge_outputs(
    file: str, runs: Sequence[_Run], graph: _RecordingGraph, rounded: EagerModel, precision: str
) -> list[Finding]:
    deviations = [
        {
            name: deviation(run.rounded[name][run.case.judged_rows], run.exact[name][run.case.judged_rows])
            for name in run.exact
        }
        for run in runs
    ]
    budgets = make_budgets(deviations, precision)

    def run_given(inputs: Arrays) -> Arrays:
        _, chosen = graph.run(inputs)  # again, because what all cases chose is large
        return rounded.run_with_rounding(inputs, chosen)[0]

    reference = [
        Expected(run.case, run.exact, of_case).measured_by(rounded, run_given)
        for run, of_case in zip(runs, budgets, strict=True)
    ]

    def judged(run: _Run, name: str, budget: Budget) -> Finding:
        question = Question(file, GIVEN_ROUNDING, run.case.name, run.case.shape, name)
        finding = judge(question, run.found[name], run.exact[name], budget, run.case.judged_rows)
        return dataclasses.replace(finding, allowed=GIVEN_MULTIPLE)

    return [
        judge_carefully(expected, name, functools.partial(judged, run, name))
        for run, expected in zip(runs, reference, strict=True)
        for name in run.exact
    ]


def _judge_decisions(file: str, runs: Sequence[_Run]) -> Finding:
    """Judge all rounding decisions of a graph: the largest distance beyond half a step, in eager's errors."""
    base = max(run.error for run in runs)
    worst = max(runs, key=lambda run: run.beyond)
    beyond = max(0.0, worst.beyond)
    used = beyond / base if base else (0.0 if not beyond else None)
    question = Question(file, ROUNDING, worst.case.name, worst.case.shape, "activations")
    problem = None
    if used is None or not used <= GIVEN_MULTIPLE:
        problem = (
            f"an activation is {beyond:.2g} further than half a step from the value it was rounded to; eager "
            f"PyTorch's own error is {base:.1e}, in the same unit"
        )
    return Finding(question, Budget(base, base, base), None, used, allowed=GIVEN_MULTIPLE, problem=problem)
