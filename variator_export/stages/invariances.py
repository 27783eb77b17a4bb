"""What must hold of a graph whatever its weights: rows of a batch do not know of each other.

Wrong answers for batches of more than one row have passed the checks of many tools (NVIDIA/TensorRT#4853,
#4813, #4796): equal outputs for one dummy batch say nothing about them. A graph is compared with itself here;
two runs of a correct one differ by rounding only, so the limit is that of `stages.budget`.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays, Runner
from variator_export.stages.reference import Expected
from variator_export.stages.verify import Finding, Question, failure, judge

EQUAL_ROWS = "equal rows in, equal rows out"
ROW_ORDER = "the rows in another order"
ROW_ALONE = "a row alone"
PADDING = "another amount of padding"

# What was found and what it should be, each by output.
_Pairs = Iterator[tuple[Arrays, Arrays]]


def check_invariances(
    graph: str,
    runner: Runner,
    expected: Expected,
    *,
    ratio: int,
    pad_token_id: int,
    token_outputs: Sequence[str],
    max_length: int | None,
) -> list[Finding]:
    """Run rows in other surroundings.

    Args:
        graph: Its name.
        runner: Runs it.
        expected: A case of rows of different length, padded on the right, each with at least one token. Of it
            only inputs and budgets are used.
        ratio: k.
        pad_token_id: Of the tokenizer.
        token_outputs: Outputs with one row per token: they are compared where there is a token.
        max_length: The model's limit in tokens; None: there is none.

    Returns:
        For each check and output the worst finding.
    """
    rows = _Rows(runner, expected.case.inputs, tuple(token_outputs))
    checks = {
        EQUAL_ROWS: rows.equal(),
        ROW_ORDER: rows.in_other_order(),
        ROW_ALONE: rows.alone(),
        PADDING: rows.otherwise_padded(ratio, pad_token_id, max_length),
    }
    findings: list[Finding] = []
    for check, pairs in checks.items():
        case = expected.case
        questions = {n: Question(graph, check, case.name, case.shape, n) for n in expected.budgets}
        worst: dict[str, Finding] = {}
        try:
            for found, wanted in pairs:
                for output, question in questions.items():
                    budget = expected.budgets[output]
                    finding = judge(question, found.get(output), wanted[output], budget)
                    if output not in worst or finding.badness > worst[output].badness:
                        worst[output] = finding
        except UserError as error:
            worst = {
                output: failure(question, expected.budgets[output], error.message)
                for output, question in questions.items()
            }
        findings += worst.values()
    return findings


class _Rows:
    """The rows of one batch, run together in many ways."""

    def __init__(
        self, runner: Runner, inputs: Mapping[str, np.ndarray], token_outputs: tuple[str, ...]
    ) -> None:
        self._runner = runner
        self._inputs = inputs
        self._token_outputs = token_outputs
        self._mask = inputs["attention_mask"] > 0
        self._count, self._length = self._mask.shape

    def equal(self) -> _Pairs:
        """Each row several times: all like the first."""
        for row in range(self._count):
            found = self._run(_take(self._inputs, [row] * self._count))
            yield found, {name: np.repeat(values[:1], self._count, axis=0) for name, values in found.items()}

    def in_other_order(self) -> _Pairs:
        """Backwards, and moved by one."""
        whole = self._run(self._inputs)
        rows = list(range(self._count))
        for order in (rows[::-1], rows[1:] + rows[:1]):
            yield self._run(_take(self._inputs, order)), _take(whole, order)

    def alone(self) -> _Pairs:
        """Each row in a batch of its own."""
        whole = self._run(self._inputs)
        for row in range(self._count):
            yield self._run(_take(self._inputs, [row])), _take(whole, [row])

    def otherwise_padded(self, ratio: int, pad_token_id: int, max_length: int | None) -> _Pairs:
        """More padding for all rows, and none at all for each."""
        whole = self._run(self._inputs)
        wanted = self._tokens(whole, self._mask)
        for more in sorted({1, ratio - 1, ratio, 3 * ratio + 1} - {0}):
            if max_length is None or self._length + more <= max_length:
                fill = {name: pad_token_id if name == "input_ids" else 0 for name in self._inputs}
                padded = {
                    name: np.pad(array, ((0, 0), (0, more)), constant_values=fill[name])
                    for name, array in self._inputs.items()
                }
                yield self._tokens(self._run(padded), self._mask), wanted
        for row, tokens in enumerate(self._mask.sum(axis=-1).tolist()):
            own = self._mask[row : row + 1, :tokens]
            trimmed = {name: array[:, :tokens] for name, array in _take(self._inputs, [row]).items()}
            yield self._tokens(self._run(trimmed), own), self._tokens(_take(whole, [row]), own)

    def _run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run, and refuse outputs that do not have a row for each row and token."""
        outputs = self._runner.run(inputs)
        shape = inputs["input_ids"].shape
        for name, values in outputs.items():
            expected = shape if name in self._token_outputs else shape[:1]
            if values.shape[: len(expected)] != expected:
                raise UserError(f"for inputs of the shape {shape}, {name} has the shape {values.shape}")
        return outputs

    def _tokens(self, outputs: Arrays, mask: np.ndarray) -> Arrays:
        """Token outputs where the mask (B, S) has a token, (number of tokens, ...); the others whole."""
        return {
            name: values[:, : mask.shape[1]][mask] if name in self._token_outputs else values
            for name, values in outputs.items()
        }


def _take(arrays: Mapping[str, np.ndarray], rows: Sequence[int]) -> Arrays:
    return {name: array[list(rows)] for name, array in arrays.items()}
