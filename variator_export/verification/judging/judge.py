"""Comparison of a graph or an engine with its reference, for every case and every output."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from variator_export.core.errors import NumbersDisagreeError
from variator_export.verification.judging.compare import (
    Deviation,
    argmax_agreement,
    deviation,
    rank_correlation,
)
from variator_export.verification.judging.error_budget import MULTIPLE, Budget

REFERENCE = "agrees with eager PyTorch"
GIVEN_ROUNDING = "agrees given its rounding"
ROUNDING_UNIT = "the rounding error of eager PyTorch"
QUANTIZATION_UNIT = "a quarter of what quantisation changes"


@dataclass(frozen=True)
class Question:
    """Question that a check asks about one output of a graph.

    Attributes:
        graph: The file that runs.
        check: The property that must hold.
        case: The case's name.
        input_shape: (batch_size, sequence_length) of the case.
        output: The output's name.
    """

    graph: str
    check: str
    case: str
    input_shape: tuple[int, int]
    output: str

    def __str__(self) -> str:
        return (
            f"{self.graph}, {self.check}, case {self.case}, input shape {self.input_shape}, "
            f"output {self.output}"
        )


@dataclass(frozen=True)
class Finding:
    """Answer to a question.

    Attributes:
        question: The question.
        base_error: The error of eager PyTorch itself in this precision.
        deviation: The deviation from the expected output. None if there was nothing to compare.
        used: The smallest multiple of the base error that would have passed. None if none would.
        allowed: The multiple that is allowed.
        problem: A problem that the numbers do not show, such as a missing output. None if there is none.
        ran: Whether the graph ran at all.
        agreement: For logits, the share of rows with the same class. For sentence embeddings, the rank
            correlation of the cosines of all pairs. None for other outputs.
        unit: What the base error is, in words.
    """

    question: Question
    base_error: Budget
    deviation: Deviation | None
    used: float | None
    allowed: float = MULTIPLE
    problem: str | None = None
    ran: bool = True
    agreement: float | None = None
    unit: str = ROUNDING_UNIT

    @property
    def passed(self) -> bool:
        """Whether the output is within the limit."""
        return self.problem is None and self.used is not None and self.used <= self.allowed

    @property
    def severity(self) -> float:
        """Sort key for finding the worst of several findings."""
        return math.inf if self.used is None else self.used

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as a dictionary for a report."""
        return {
            **asdict(self.question),
            "passed": self.passed,
            "used": self.used,
            "allowed": self.allowed,
            "problem": self.problem,
            **(self.deviation.as_dict() if self.deviation else {}),
            "base_error": asdict(self.base_error),
            "agreement": self.agreement,
        }

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.question}: {self.problem}"
        if self.deviation is None:
            return (
                f"{self.question}: {self.used:.3g} times {self.unit}; the limit is {self.allowed:.3g} times"
            )
        limit = self.allowed * self.base_error.relative_frobenius
        return (
            f"{self.question}: {self.deviation}: {self.used:.3g} times {self.unit}; "
            f"the limit is {self.allowed:g} times (relative Frobenius error {limit:.1e})"
        )


def failure(question: Question, budget: Budget, problem: str) -> Finding:
    """Create the finding for a graph that does not run."""
    return Finding(question, budget, None, None, problem=problem, ran=False)


def judge(
    question: Question,
    found: np.ndarray | None,
    expected: np.ndarray,
    budget: Budget,
    rows: np.ndarray | slice = slice(None),
) -> Finding:
    """Judge one output: it must exist, have the right shape, be finite, and be close enough.

    Args:
        question: The question.
        found: The output. None if it is missing.
        expected: The expected output.
        budget: The base error of the output.
        rows: The rows that must be close enough. The other checks apply to all rows.
    """
    problem = None
    if found is None:
        problem = "the output is missing"
    elif found.shape != expected.shape:
        problem = f"the output has the shape {found.shape}, expected {expected.shape}"
    elif not np.isfinite(found).all():
        problem = "the output holds NaN or infinite values"
    if found is None or problem is not None:
        return Finding(question, budget, None, None, problem=problem)
    values, wanted = found[rows], expected[rows]
    result = deviation(values, wanted)
    agreement = _agreement(question.output, values, wanted)
    return Finding(question, budget, result, budget.used(result), agreement=agreement)


def refuse_failures(findings: Sequence[Finding], variant: str, ratio: int) -> None:
    """End a build whose graphs do not compute what eager PyTorch computes.

    Raises:
        NumbersDisagreeError: A finding is outside its limit. The message describes the worst one.
    """
    failed = [finding for finding in findings if not finding.passed]
    if failed:
        worst = max(failed, key=lambda finding: finding.severity)
        raise NumbersDisagreeError(
            f"{variant} (ratio {ratio}): {worst}. {len(failed)} of {len(findings)} checks failed; nothing "
            "was published.",
            "If the backbone or plugin holds very large values, check them; otherwise this is a fault of the "
            "export: please report it with the recipe.",
        )


def _agreement(output: str, found: np.ndarray, expected: np.ndarray) -> float | None:
    if not len(expected):
        return None
    if output == "logits" and expected.ndim > 1:
        return argmax_agreement(found, expected)
    return rank_correlation(found, expected) if output == "sentence_embedding" else None
