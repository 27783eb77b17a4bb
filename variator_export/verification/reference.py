"""Reference for verifying graphs and engines: cases, the outputs of eager PyTorch, and their base errors.

The reference is computed with eager PyTorch, or read from the bundle on a machine that has neither torch nor
the backbone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from variator_export.core.axes import is_key_or_value
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays, Runner
from variator_export.verification.cases import REAL_TEXT, Case
from variator_export.verification.judging.compare import deviation, where_expected
from variator_export.verification.judging.error_budget import Budget, make_budgets, scaled, widened
from variator_export.verification.judging.judge import Finding

ReferenceKind = Literal["eager", "stored"]
EAGER = "eager PyTorch, float64, CPU"
# What is up to so many times the limit is judged again, by so many runs of eager PyTorch.
_NEAR, _RUNS = 8, 8


@dataclass(frozen=True)
class Expected:
    """Expected outputs of one case.

    Attributes:
        case: The case with its inputs.
        outputs: The outputs of eager PyTorch in float64, by name.
        budgets: The base error of each output.
        measure_again: Function that measures the base errors with more care (`judge_carefully`). None if
            eager PyTorch is not there.
    """

    case: Case
    outputs: Arrays
    budgets: dict[str, Budget]
    measure_again: Callable[[], Mapping[str, Budget]] | None = None

    def measured_again_by(self, runner: "RoundingRunner") -> "Expected":
        """The same, with a runner that measures the base errors again if that is needed."""
        return dataclasses.replace(self, measure_again=functools.cache(partial(_measure, self, runner)))


class RoundingRunner(Runner, Protocol):
    """A runner that can round in other ways."""

    def rounded_otherwise(self, seed: int) -> AbstractContextManager[None]:
        """Run with weights that differ by about as much as rounding changed them."""
        ...


def judge_carefully(expected: Expected, output: str, judge_with: Callable[[Budget], Finding]) -> Finding:
    """Judge an output, a second time if it is just outside its limit.

    Where few values dominate an error, as the largest ones of MiniLM's hidden states do, the error of one run
    of eager PyTorch is little more than a random number: of two errors with the same normal distribution, one
    is more than 4 times the other in 16 % of all cases (2/pi atan(1/4)). So near the limit, the base error is
    the largest of several runs of eager PyTorch that round differently. A fault stays far outside.

    Args:
        expected: The case. Its base errors are replaced if they were measured again.
        output: The output's name.
        judge_with: Function that judges the output by a base error.
    """
    finding = judge_with(expected.budgets[output])
    is_near = finding.used is not None and finding.used <= _NEAR * finding.allowed
    if finding.passed or not is_near or expected.measure_again is None:
        return finding
    expected.budgets.update(expected.measure_again())
    return judge_with(expected.budgets[output])


def eager_reference(
    exact: Runner,
    same_precision: RoundingRunner,
    cases: Sequence[Case],
    precision: str,
    progress: Callable[[], None] = lambda: None,
    *,
    share: float | None = None,
) -> list[Expected]:
    """Run eager PyTorch on every case.

    Args:
        exact: Eager PyTorch in float64.
        same_precision: Eager PyTorch in the precision of the graphs to be verified. For a quantised model,
            eager PyTorch without the quantisation, if the precision has a share of its change.
        cases: The cases to run.
        precision: The name of that precision.
        progress: Called after each case.
        share: The share of the deviation between the two that is the base error
            (`error_budget.quantization_share`). None for all of it.

    Raises:
        UserError: Eager PyTorch returns NaN or infinite values.
    """
    outputs, deviations = [], []
    for case in cases:
        wanted, rounded = exact.run(case.inputs), same_precision.run(case.inputs)
        for found in (wanted, rounded):
            _refuse_not_finite(case, found)
        outputs.append({name: _where_finite(values, rounded[name]) for name, values in wanted.items()})
        deviations.append(
            {
                name: deviation(rounded[name][case.judged_rows], wanted[name][case.judged_rows])
                for name in wanted
            }
        )
        progress()
    budgets = [scaled(of_case, share or 1.0) for of_case in make_budgets(deviations, precision)]
    reference = [Expected(*item) for item in zip(cases, outputs, budgets, strict=True)]
    if share is not None:  # the base error is no rounding
        return reference
    return [each.measured_again_by(same_precision) for each in reference]


def _measure(expected: Expected, runner: RoundingRunner) -> dict[str, Budget]:
    """The base errors of a case: the largest errors of several runs that round differently."""
    case, budgets = expected.case, dict(expected.budgets)
    for seed in range(_RUNS):
        with runner.rounded_otherwise(seed):
            rounded = runner.run(case.inputs)
        for name, wanted in expected.outputs.items():
            own, wanted = where_expected(rounded[name], wanted)
            found = deviation(own[case.judged_rows], wanted[case.judged_rows])
            budgets[name] = widened(budgets[name], found)
    return budgets


def _where_finite(exact: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """The expected values, with NaN for rows of which eager PyTorch in the precision has no finite values.

    These are rows of padding alone in float16: its lowest number masks a score, and the sum of both overflows
    (T5). So nothing is expected there, and any value is right.
    """
    broken = ~np.isfinite(rounded.reshape(len(rounded), -1)).all(axis=1)
    if not broken.any():
        return exact
    expected = exact.copy()
    expected[broken] = np.nan
    return expected


def _refuse_not_finite(case: Case, outputs: Arrays) -> None:
    for name, values in outputs.items():
        if not np.isfinite(values[case.judged_rows]).all():
            raise UserError(
                f"Eager PyTorch itself returns NaN or infinite values in {name}, case {case.name}, input "
                f"shape {case.shape}: there is nothing to compare a graph with.",
                "Check the weights of the backbone and of the plugin.",
            )


def save_reference(reference: Sequence[Expected], path: Path) -> None:
    """Store the small cases, so that a machine without torch can verify.

    Without keys and values for a decoder: they are products of the last hidden states, and would be most of
    the bundle.

    The tensors are CASE/inputs/NAME, int64 (B, S); CASE/outputs/NAME, float32 (half the bytes of float64; the
    rounding is an eighth of the smallest limit); and CASE/base_error/NAME, float64 (3,), the fields of
    `Budget`.
    """
    tensors: dict[str, np.ndarray] = {}
    for expected in reference:
        name = expected.case.name
        if not expected.case.stored:
            continue
        tensors |= {f"{name}/inputs/{key}": array for key, array in expected.case.inputs.items()}
        tensors |= {
            f"{name}/outputs/{key}": expected.outputs[key].astype(np.float32)
            for key in stored_outputs(expected.outputs)
        }
        tensors |= {
            f"{name}/base_error/{key}": np.array(astuple(expected.budgets[key]))
            for key in stored_outputs(expected.budgets)
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}))


def stored_outputs(outputs: Iterable[str]) -> list[str]:
    """The outputs that a stored reference has, of all outputs of a graph."""
    return [name for name in outputs if not is_key_or_value(name)]


def load_reference(path: Path, outputs: Sequence[str] | None = None) -> list[Expected]:
    """Read a reference that `save_reference` wrote.

    Args:
        path: The file.
        outputs: Names of the graph's outputs. None means that they are not checked.

    Raises:
        UserError: The file is not a stored reference, or lacks an output or the real text.
    """
    try:
        parts: dict[str, dict[str, Arrays]] = {}
        for key, array in load_file(path).items():
            case, part, name = key.split("/")
            parts.setdefault(case, {}).setdefault(part, {})[name] = array
        if REAL_TEXT not in parts:
            raise ValueError(f"it lacks the case {REAL_TEXT!r}")
        for case, part in parts.items():
            if outputs is not None and part["outputs"].keys() != set(stored_outputs(outputs)):
                raise ValueError(f"the case {case!r} has the outputs {', '.join(sorted(part['outputs']))}")
            for name, array in (*part["outputs"].items(), *part["base_error"].items()):
                if array.dtype.kind != "f":
                    raise TypeError(f"{name} of the case {case!r} has the type {array.dtype}")
        return [
            Expected(
                Case(case, part["inputs"], stored=True),
                part["outputs"],
                {name: Budget(*part["base_error"][name].tolist()) for name in part["outputs"]},
            )
            for case, part in parts.items()
        ]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a stored reference of this version: {error}.",
            "Build the bundle again, or verify with --reference eager.",
        ) from error
