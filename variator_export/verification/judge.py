"""Verification: a graph or an engine against its reference, on every case, every output."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from variator_export.core.errors import NumbersDisagreeError, UserError
from variator_export.engines.base import Runner
from variator_export.verification.compare import Deviation, argmax_agreement, deviation, rank_correlation
from variator_export.verification.error_budget import MULTIPLE, Budget
from variator_export.verification.reference import Expected

REFERENCE = "agrees with eager PyTorch"


@dataclass(frozen=True)
class Question:
    """What is asked of a graph.

    Attributes:
        graph: The file that runs.
        check: What must hold.
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
    """An answer.

    Attributes:
        question: To what.
        base_error: What eager PyTorch itself is off by in this precision.
        deviation: From what was expected; None where there was nothing to compare.
        used: The smallest multiple of the base error that would have passed; None where none would.
        allowed: The multiple that is allowed.
        problem: What is wrong where numbers do not say it.
        ran: Whether the graph ran at all.
        agreement: For logits the share of rows with the same class, for sentence embeddings the rank
            correlation of the cosines of all pairs; None for others.
    """

    question: Question
    base_error: Budget
    deviation: Deviation | None
    used: float | None
    allowed: float = MULTIPLE
    problem: str | None = None
    ran: bool = True
    agreement: float | None = None

    @property
    def passed(self) -> bool:
        """Whether it is within the limit."""
        return self.problem is None and self.used is not None and self.used <= self.allowed

    @property
    def badness(self) -> float:
        """For finding the worst of several."""
        return math.inf if self.used is None else self.used

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
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
        limit = self.allowed * self.base_error.relative_frobenius
        return (
            f"{self.question}: {self.deviation}: {self.used:.3g} times the rounding error of eager PyTorch, "
            f"of which {self.allowed:g} are allowed (relative Frobenius error {limit:.1e})"
        )


def verify_graph(
    graph: str,
    runner: Runner,
    reference: Sequence[Expected],
    progress: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Compare a graph with its reference.

    Args:
        graph: Its name.
        runner: Runs it.
        reference: What is expected.
        progress: Called after each case.

    Returns:
        One finding for each case and output.
    """
    findings: list[Finding] = []
    for expected in reference:
        case, budgets = expected.case, expected.budgets
        questions = {
            output: Question(graph, REFERENCE, case.name, case.shape, output) for output in expected.outputs
        }
        try:
            found = runner.run(case.inputs)
        except UserError as error:
            findings += [failure(q, budgets[output], error.message) for output, q in questions.items()]
        else:
            findings += [
                judge(q, found.get(output), expected.outputs[output], budgets[output], case.judged_rows)
                for output, q in questions.items()
            ]
        progress()
    return findings


def failure(question: Question, budget: Budget, problem: str) -> Finding:
    """The answer where the graph does not run."""
    return Finding(question, budget, None, None, problem=problem, ran=False)


def judge(
    question: Question,
    found: np.ndarray | None,
    expected: np.ndarray,
    budget: Budget,
    rows: np.ndarray | slice = slice(None),
) -> Finding:
    """Judge one output: it must be there, of the right shape, finite, and near enough.

    Args:
        question: What is asked.
        found: The output; None: it is missing.
        expected: What it should be.
        budget: Its base error.
        rows: Of those alone it is asked whether they are near enough.
    """
    problem = None
    if found is None:
        problem = "the output is missing"
    elif found.shape != expected.shape:
        problem = f"the output has the shape {found.shape}; expected is {expected.shape}"
    elif not np.isfinite(found).all():
        problem = "the output holds NaN or infinite values"
    if found is None or problem is not None:
        return Finding(question, budget, None, None, problem=problem)
    values, wanted = found[rows], expected[rows]
    result = deviation(values, wanted)
    agreement = _agreement(question.output, values, wanted)
    return Finding(question, budget, result, budget.used(result), agreement=agreement)


def refuse_failures(findings: Sequence[Finding], variant: str, ratio: int) -> None:
    """End a build whose graphs do not compute what eager computes.

    Raises:
        NumbersDisagreeError: A finding is outside its limit; the message is of the worst.
    """
    failed = [finding for finding in findings if not finding.passed]
    if failed:
        worst = max(failed, key=lambda finding: finding.badness)
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
