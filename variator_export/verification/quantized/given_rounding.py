"""Check of a quantised graph with its own rounding decisions.

A quantised model amplifies rounding: an activation near the middle between two integers falls to either side,
and a few layers later two correct computations differ by a few per cent. The other checks have to allow for
that. This check does not: it reads the integers that the graph chose, has eager PyTorch go on from the same
integers, and allows only the rounding of float32. The decisions are checked one by one: each integer must be
the nearest one to the exact activation, up to the error that eager PyTorch itself has there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from variator_export.engines.base import Arrays
from variator_export.engines.eager import EagerModel
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.model.int8 import ZERO_POINT
from variator_export.verification.cases import Case
from variator_export.verification.judging.compare import deviation
from variator_export.verification.judging.error_budget import GIVEN_MULTIPLE, Budget, make_budgets
from variator_export.verification.judging.judge import GIVEN_ROUNDING, Finding, Question, judge
from variator_export.verification.verified_graph import load_for_verification, open_changed

ROUNDING = "rounds to the nearest integer"
_HALF = 0.5
# Larger cases are left out, because every activation is held in float64.
_MOST_TOKENS = 1024


@dataclass(frozen=True)
class _Run:
    """One case run by a graph and, with the graph's integers, by eager PyTorch in float64 and in float32."""

    case: Case
    found: Arrays
    exact: Arrays
    rounded: Arrays
    # Distance from the integers, and eager PyTorch's own error, both in steps of the integers.
    distance: float
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
    """Compare quantised graphs of one variant with eager PyTorch that uses the graphs' own integers.

    Args:
        graphs: Additional inputs of each graph, by file.
        folder: The bundle's folder.
        precision: The graphs' precision.
        exact: The quantised model in float64.
        rounded: The quantised model in float32.
        cases: The cases to run; those of more than 1,024 tokens are left out.
        progress: Called after each graph.
    """
    findings = []
    for file, extra in graphs.items():
        graph = _RecordingGraph(folder / file, extra, precision)
        small = [case for case in cases if np.prod(case.shape) <= _MOST_TOKENS]
        runs = [_run(graph, exact, rounded, case) for case in small]
        findings += _judge_outputs(file, runs, precision)
        findings.append(_judge_decisions(file, runs))
        progress()
    return findings


class _RecordingGraph:
    """A graph that also returns the integers that it rounds activations to."""

    def __init__(self, path: Path, extra: Mapping[str, np.ndarray], precision: str) -> None:
        from variator_export.graph.modules import mark_outputs
        from variator_export.graph.weights import quantized_input, stored_weight

        model = load_for_verification(path, precision)
        # The quantised inputs of each linear layer, in the order of the calls.
        self._values: dict[str, list[str]] = {}
        for node in model.graph:
            if (integers := quantized_input(node)) is not None:
                weight = stored_weight(node)
                assert weight is not None
                self._values.setdefault(str(weight.name), []).append(str(integers.name))
        mark_outputs(model, [value for values in self._values.values() for value in values])
        self._runner: OnnxRuntimeRunner = open_changed(model, path.parent, extra, precision)

    def run(self, inputs: Mapping[str, np.ndarray]) -> tuple[Arrays, dict[str, list[np.ndarray]]]:
        """Return the outputs, and the integers that each linear layer read, by the name of its weight."""
        found = self._runner.run(inputs)
        integers = {
            name: [found[value].astype(np.int16) - ZERO_POINT for value in values]
            for name, values in self._values.items()
        }
        return found, integers


def _run(graph: _RecordingGraph, exact: EagerModel, rounded: EagerModel, case: Case) -> _Run:
    found, integers = graph.run(case.inputs)
    wanted, activations = exact.run_with_integers(case.inputs, integers)
    other, inexact = rounded.run_with_integers(case.inputs, integers)
    distance = error = 0.0
    for name, calls in activations.items():
        for values, near, chosen in zip(calls, inexact[name], integers[name], strict=True):
            distance = max(distance, float(np.abs(values - chosen.reshape(values.shape)).max()))
            error = max(error, float(np.abs(values - near).max()))
    return _Run(case, {name: found[name] for name in wanted}, wanted, other, distance, error)


def _judge_outputs(file: str, runs: Sequence[_Run], precision: str) -> list[Finding]:
    deviations = [
        {
            name: deviation(run.rounded[name][run.case.judged_rows], run.exact[name][run.case.judged_rows])
            for name in run.exact
        }
        for run in runs
    ]
    budgets = make_budgets(deviations, precision)
    return [
        dataclasses.replace(
            judge(
                Question(file, GIVEN_ROUNDING, run.case.name, run.case.shape, name),
                run.found[name],
                run.exact[name],
                budget[name],
                run.case.judged_rows,
            ),
            allowed=GIVEN_MULTIPLE,
        )
        for run, budget in zip(runs, budgets, strict=True)
        for name in run.exact
    ]


def _judge_decisions(file: str, runs: Sequence[_Run]) -> Finding:
    """Judge all rounding decisions of a graph: the largest distance beyond half a step, in eager's errors."""
    base = max(run.error for run in runs)
    worst = max(runs, key=lambda run: run.distance)
    beyond = max(0.0, worst.distance - _HALF)
    used = beyond / base if base else (0.0 if not beyond else None)
    question = Question(file, ROUNDING, worst.case.name, worst.case.shape, "activations")
    problem = None
    if used is None or not used <= GIVEN_MULTIPLE:
        problem = (
            f"an activation is {worst.distance:.4f} steps from the integer it was rounded to; eager "
            f"PyTorch's own error is {base:.1e} steps"
        )
    return Finding(question, Budget(base, base, base), None, used, allowed=GIVEN_MULTIPLE, problem=problem)
