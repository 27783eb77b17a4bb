"""Expected outputs of a case with their base errors, and judgement by more roundings near the limit."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from variator_export.engines.base import Arrays, Runner
from variator_export.verification.cases import Case
from variator_export.verification.judging.compare import deviation, where_expected
from variator_export.verification.judging.error_budget import Budget, widened
from variator_export.verification.judging.judge import Finding

# What is up to so many times the limit is judged again, by so many runs of eager PyTorch.
_NEAR, _RUNS = 8, 8


@dataclass(frozen=True)
class Expected:
    """Expected outputs of one case.

    Attributes:
        case: The case with its inputs.
        outputs: The outputs of eager PyTorch in float64, by name.
        budgets: The base error of each output.
        careful: Base errors of more roundings (`judge_carefully`); empty until they are measured.
        measure: Function that measures them. None if eager PyTorch is not there.
    """

    case: Case
    outputs: Arrays
    budgets: Mapping[str, Budget]
    careful: dict[str, Budget] = field(default_factory=dict)
    measure: Callable[[], Mapping[str, Budget]] | None = None

    def measured_by(self, eager: "Rounds", run: Callable[[Arrays], Arrays]) -> "Expected":
        """The same, with what measures more roundings if they are needed.

        Args:
            eager: Eager PyTorch in the precision.
            run: Function that computes the outputs with it.
        """
        return dataclasses.replace(self, measure=partial(_measure, self, eager, run))


class Rounds(Protocol):
    """What can round in other ways."""

    def rounded_otherwise(self, seed: int) -> AbstractContextManager[None]:
        """Run with weights that differ by about as much as rounding changed them."""
        ...


class RoundingRunner(Runner, Rounds, Protocol):
    """A runner that can round in other ways."""


def judge_carefully(expected: Expected, output: str, judge_with: Callable[[Budget], Finding]) -> Finding:
    """Judge an output, a second time if it is just outside its limit.

    Where few values dominate an error, as the largest ones of MiniLM's hidden states do, the error of one run
    of eager PyTorch is little more than a random number: of two errors with the same normal distribution, one
    is more than 4 times the other in 16 % of all cases (2/pi atan(1/4)). So near the limit, the base error is
    the largest of several runs of eager PyTorch that round differently. A fault stays far outside.

    Args:
        expected: The case.
        output: The output's name.
        judge_with: Function that judges the output by a base error.
    """
    finding = judge_with(expected.budgets[output])
    is_near = finding.used is not None and finding.used <= _NEAR * finding.allowed
    if finding.passed or not is_near:
        return finding
    if not expected.careful and expected.measure is not None:
        expected.careful.update(expected.measure())
    return judge_with(expected.careful[output]) if output in expected.careful else finding


def _measure(expected: Expected, eager: Rounds, run: Callable[[Arrays], Arrays]) -> dict[str, Budget]:
    """The base errors of a case: the largest errors of several runs that round differently."""
    case, budgets = expected.case, dict(expected.budgets)
    for seed in range(_RUNS):
        with eager.rounded_otherwise(seed):
            rounded = run(case.inputs)
        for name, wanted in expected.outputs.items():
            own, wanted = where_expected(rounded[name], wanted)
            found = deviation(own[case.judged_rows], wanted[case.judged_rows])
            budgets[name] = widened(budgets[name], found)
    return budgets
