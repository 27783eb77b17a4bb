"""Comparison of a graph or an engine with eager PyTorch: every case, and the average over all cases."""

import functools
import math
from collections.abc import Callable, Sequence

from variator_export.core.errors import UserError
from variator_export.engines.base import Runner
from variator_export.verification.judging.averages import CaseError, case_error, judge_averages
from variator_export.verification.judging.compare import where_expected
from variator_export.verification.judging.expected import Expected, judge_carefully
from variator_export.verification.judging.judge import REFERENCE, Finding, Question, failure, judge


def verify_graph(
    graph: str,
    runner: Runner,
    reference: Sequence[Expected],
    progress: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Compare a graph with its reference.

    Args:
        graph: The graph's name.
        runner: The runner of the graph.
        reference: The cases and the expected outputs.
        progress: Called after each case.

    Returns:
        One finding for each case and output, and two over all cases for each output that passed every case.
    """
    findings: list[Finding] = []
    errors: dict[str, list[CaseError]] = {}
    for expected in reference:
        case, budgets = expected.case, expected.budgets
        questions = {
            output: Question(graph, REFERENCE, case.name, case.shape, output) for output in expected.outputs
        }
        try:
            found = runner.run(case.inputs)
        except UserError as error:
            findings += [failure(q, budgets[output], error.message) for output, q in questions.items()]
            progress()
            continue
        for output, question in questions.items():
            rows = case.judged_rows
            own, wanted = found.get(output), expected.outputs[output]
            if own is not None:
                own, wanted = where_expected(own, wanted)
            finding = judge_carefully(
                expected, output, functools.partial(judge, question, own, wanted, rows=rows)
            )
            findings.append(finding)
            if finding.deviation is not None:
                of_case = case_error(found[output][rows], wanted[rows], finding.deviation, budgets[output])
                errors.setdefault(output, []).extend([] if of_case is None else [of_case])
        progress()
    largest = max((expected.case.shape for expected in reference), key=math.prod)
    # Where a case failed, its average says nothing more.
    failed = {finding.question.output for finding in findings if not finding.passed}
    passed = {output: of_cases for output, of_cases in errors.items() if output not in failed}
    return findings + judge_averages(graph, largest, passed)
