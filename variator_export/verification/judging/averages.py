"""Averages over all cases: a graph's error is as small as eager PyTorch's own, and has no bias.

One case may be off by 4 times eager's own rounding error, because rounding varies. The average over two dozen
cases varies little, so a small fault that no single case shows is visible there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from variator_export.verification.judging.compare import Deviation
from variator_export.verification.judging.error_budget import Budget
from variator_export.verification.judging.judge import Finding, Question

AVERAGE = "agrees on average"
BIAS = "without a bias"
ALL_CASES = "all cases"
# The limits come from correct graphs of 13 models at every ratio (benchmarks/results/averages.json). The
# geometric mean of the multiples of eager's own error may be _MEAN, and 4 of its standard deviations more:
# the logarithm of a multiple has a standard deviation of 0.2 in half of the outputs, and 0.3 in nearly all.
_MEAN = 1.15
_SPREAD = 0.3
# The largest bias, as a share of eager's own error. With few rows a correct graph has one by chance: its
# standard deviation is at most one over the root of the number of rows.
_BIAS = 0.3
_DEVIATIONS = 4.0
# Fewer cases have no average worth judging.
_FEWEST_CASES = 8


@dataclass(frozen=True)
class CaseError:
    """The error of one output in one case.

    Attributes:
        multiple: The relative Frobenius error as a multiple of eager PyTorch's own.
        bias: The mean error, as a share of the root mean square of eager PyTorch's own error.
        rows: Number of rows.
        values: Number of values.
        budget: Eager PyTorch's own error.
    """

    multiple: float
    bias: float
    rows: int
    values: int
    budget: Budget


def case_error(
    found: np.ndarray, expected: np.ndarray, deviation: Deviation, budget: Budget
) -> CaseError | None:
    """Measure one output in one case. None if it has no values or is not finite."""
    wanted = expected.astype(np.float64)
    own = budget.relative_frobenius * math.sqrt(float((wanted**2).mean())) if wanted.size else 0.0
    if not own or not deviation.finite:
        return None
    return CaseError(
        deviation.relative_frobenius / budget.relative_frobenius,
        float((found.astype(np.float64) - wanted).mean()) / own,
        len(wanted),
        wanted.size,
        budget,
    )


def judge_averages(
    graph: str, shape: tuple[int, int], errors: Mapping[str, Sequence[CaseError]]
) -> list[Finding]:
    """Judge the average over all cases, for each output.

    Args:
        graph: The graph's name.
        shape: The shape of the largest case, for the report.
        errors: The errors of all cases, by output.

    Returns:
        Two findings for each output that has enough cases.
    """
    findings = []
    for output, of_cases in errors.items():
        if len(of_cases) < _FEWEST_CASES:
            continue
        # An output may be exact by chance, which has no logarithm.
        mean = math.exp(float(np.mean([math.log(max(error.multiple, 1e-3)) for error in of_cases])))
        weights = np.sqrt([error.values for error in of_cases])
        bias = abs(float(np.average([error.bias for error in of_cases], weights=weights)))
        rows = sum(error.rows for error in of_cases)
        allowed_mean = _MEAN * math.exp(_DEVIATIONS * _SPREAD / math.sqrt(len(of_cases)))
        allowed_bias = max(_BIAS, _DEVIATIONS / math.sqrt(rows))
        budget = max((error.budget for error in of_cases), key=lambda b: b.relative_frobenius)
        for check, used, limit in ((AVERAGE, mean, allowed_mean), (BIAS, bias, allowed_bias)):
            question = Question(graph, check, ALL_CASES, shape, output)
            findings.append(Finding(question, budget, None, used, allowed=limit))
    return findings
