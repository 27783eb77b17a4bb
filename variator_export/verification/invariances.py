"""Invariances that every graph must satisfy, whatever its weights: the rows of a batch are independent.

Wrong answers for batches of more than one row have passed the checks of many tools (NVIDIA/TensorRT#4853,
#4813, #4796), because equal outputs for one dummy batch say nothing about them. These checks compare a graph
with itself. Two runs of a correct graph differ only by rounding, each by up to the limit of
`verification.judging.error_budget` from the exact numbers, and perhaps in opposite directions.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from variator_export.core.axes import token_axis
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays, Runner
from variator_export.verification.judging.error_budget import Budget
from variator_export.verification.judging.expected import Expected, judge_carefully
from variator_export.verification.judging.judge import Finding, Question, failure, judge

EQUAL_ROWS = "equal rows in, equal rows out"
ROW_ORDER = "the rows in another order"
ROW_ALONE = "a row alone"
PADDING = "another amount of padding"
CHECKS = (EQUAL_ROWS, ROW_ORDER, ROW_ALONE, PADDING)

# Pairs of found and expected arrays, each by output.
_Pairs = Iterator[tuple[Arrays, Arrays]]
# Function that returns whether a graph accepts a shape (batch_size, sequence_length).
SupportsShape = Callable[[int, int], bool]
# Bounds of the search for a shape that an engine accepts, and the batch size that replaces a single row.
_MOST_ROWS = 128
_SEVERAL_ROWS = 4
_MOST_TOKENS = 1024
# The base error of two runs of a graph is that of one run for each: by the triangle inequality, two runs that
# are both within the limit differ by no more than twice the limit.
_RUNS = 2


def check_invariances(
    graph: str,
    runner: Runner,
    expected: Expected,
    *,
    ratio: int,
    pad_token_id: int,
    token_outputs: Sequence[str],
    max_length: int | None,
    reads_varying_padding: bool = False,
    supports_shape: SupportsShape = lambda *_: True,
) -> tuple[list[Finding], dict[str, list[str]]]:
    """Run the same rows in other batches, other orders and with other padding, and compare the outputs.

    An engine accepts only the shapes of its profiles. So the rows are repeated, cut or padded to the nearest
    shape that it accepts, and each check runs only the shapes that it accepts.

    Args:
        graph: The graph's name.
        runner: The runner of the graph.
        expected: A case of rows of different length, padded on the right, each with at least one token.
            Of its outputs, only the scale is used.
        ratio: The ratio k.
        pad_token_id: The tokenizer's padding token.
        token_outputs: Names of the outputs with one row per token. They are compared at tokens only.
        max_length: The model's limit in tokens. None if there is none.
        reads_varying_padding: Whether the outputs depend on the amount of padding in eager PyTorch too.
        supports_shape: Function (batch_size, sequence_length) that returns whether the graph accepts a shape.

    Returns:
        The worst finding for each check and output; and for each incomplete check, the shapes that were left
        out or the reason.
    """
    case = expected.case
    shape = _nearest_shape(case.shape, supports_shape, max_length)
    if shape is None:
        return [], {check: ["no shape near the text's shape is within its profiles"] for check in CHECKS}
    rows = _Rows(runner, _in_shape(case.inputs, shape, pad_token_id), tuple(token_outputs), supports_shape)
    checks = {
        EQUAL_ROWS: rows.equal,
        ROW_ORDER: rows.in_other_order,
        ROW_ALONE: rows.alone,
        PADDING: lambda: rows.otherwise_padded(ratio, pad_token_id, max_length),
    }
    findings: list[Finding] = []
    left_out: dict[str, list[str]] = {}
    if reads_varying_padding:
        del checks[PADDING]
        left_out[PADDING] = ["the plugin reads the hidden states of padding, which depend on its amount"]
    for check, run in checks.items():
        if check != PADDING and shape[0] == 1:
            left_out[check] = ["it takes one row at a time"]
            continue
        questions = {n: Question(graph, check, case.name, shape, n) for n in expected.budgets}
        scales = {n: float(np.abs(expected.outputs[n]).max(initial=0.0)) for n in expected.budgets}
        worst: dict[str, Finding] = {}
        try:
            for found, wanted in run():
                for output, question in questions.items():
                    pair = found.get(output), wanted.get(output)
                    judge_with = functools.partial(_judge_pair, question, *pair, scales[output])
                    finding = judge_carefully(expected, output, judge_with)
                    if output not in worst or finding.severity > worst[output].severity:
                        worst[output] = finding
        except UserError as error:
            worst = {
                output: failure(question, expected.budgets[output], error.message)
                for output, question in questions.items()
            }
        findings += worst.values()
        if rows.left_out:
            left_out[check] = [f"{batch}x{length}" for batch, length in sorted(rows.left_out)]
            rows.left_out.clear()
    return findings, left_out


def _judge_pair(
    question: Question, found: np.ndarray | None, wanted: np.ndarray | None, scale: float, budget: Budget
) -> Finding:
    """Judge two outputs that both come from the graph: a broken output on either side is a fault.

    Args:
        question: The question.
        found: One output, of all rows or some.
        wanted: The other one.
        scale: Largest absolute value of all rows.
        budget: The base error of all rows.
    """
    if wanted is None or not np.isfinite(wanted).all():
        return judge(question, wanted, np.empty(0) if wanted is None else wanted, budget)
    part = float(np.abs(wanted).max(initial=0.0))
    return judge(question, found, wanted, budget.of_part(scale, part).times(_RUNS))


def _nearest_shape(
    shape: tuple[int, int], supports_shape: SupportsShape, max_length: int | None
) -> tuple[int, int] | None:
    """Return the nearest shape that a graph accepts, with several rows if possible. None if there is none."""
    batch, length = shape
    if batch == 1:  # a recipe with one text; a single row cannot show that rows are independent
        batch = _SEVERAL_ROWS
    if supports_shape(batch, length):
        return batch, length
    batches = [*sorted(range(2, _MOST_ROWS + 1), key=lambda n: abs(n - batch)), 1]
    lengths = sorted(range(1, (max_length or _MOST_TOKENS) + 1), key=lambda n: abs(n - length))
    return next(((b, n) for b in batches for n in lengths if supports_shape(b, n)), None)


def _in_shape(inputs: Mapping[str, np.ndarray], shape: tuple[int, int], pad_token_id: int) -> Arrays:
    """Fit the rows into a shape, as many as it has room for, spread from the first to the last.

    If the shape has room for more rows, the rows are repeated, each time one token shorter, so that they
    differ.
    """
    batch, length = shape
    count, own_length = inputs["input_ids"].shape
    rows = (
        np.linspace(0, count - 1, batch).round().astype(int) if batch <= count else np.arange(batch) % count
    )
    cut = {name: array[rows, :length] for name, array in inputs.items()}
    tokens = np.maximum(1, cut["attention_mask"].sum(axis=-1) - np.arange(batch) // count)
    keep = np.arange(cut["attention_mask"].shape[1]) < tokens[:, None]
    fill = _padding(inputs, pad_token_id)
    shorter = {name: np.where(keep, array, fill[name]) for name, array in cut.items()}
    return _padded(shorter, max(0, length - own_length), pad_token_id)


def _padding(inputs: Mapping[str, np.ndarray], pad_token_id: int) -> dict[str, int]:
    return {name: pad_token_id if name == "input_ids" else 0 for name in inputs}


def _padded(inputs: Mapping[str, np.ndarray], more: int, pad_token_id: int) -> Arrays:
    fill = _padding(inputs, pad_token_id)
    return {
        name: np.pad(array, ((0, 0), (0, more)), constant_values=fill[name]) for name, array in inputs.items()
    }


class _Rows:
    """Rows of one batch, run together in many ways.

    Attributes:
        left_out: Shapes that the graph does not accept.
    """

    def __init__(
        self,
        runner: Runner,
        inputs: Mapping[str, np.ndarray],
        token_outputs: tuple[str, ...],
        supports_shape: SupportsShape,
    ) -> None:
        self.left_out: set[tuple[int, int]] = set()
        self._supports_shape = supports_shape
        self._runner = runner
        self._inputs = inputs
        self._token_outputs = token_outputs
        self._mask = inputs["attention_mask"] > 0
        self._count, self._length = self._mask.shape

    def equal(self) -> _Pairs:
        """Run a batch of copies of each row: all outputs must equal the first."""
        for row in range(self._count):
            found = self._run(_take(self._inputs, [row] * self._count))
            yield found, {name: np.repeat(values[:1], self._count, axis=0) for name, values in found.items()}

    def in_other_order(self) -> _Pairs:
        """Run the rows in reverse order, and rotated by one."""
        whole = self._run(self._inputs)
        rows = list(range(self._count))
        for order in (rows[::-1], rows[1:] + rows[:1]):
            yield self._run(_take(self._inputs, order)), _take(whole, order)

    def alone(self) -> _Pairs:
        """Run each row in a batch of its own."""
        if not self._can_run(1, self._length):
            return
        whole = self._run(self._inputs)
        for row in range(self._count):
            yield self._run(_take(self._inputs, [row])), _take(whole, [row])

    def otherwise_padded(self, ratio: int, pad_token_id: int, max_length: int | None) -> _Pairs:
        """Run all rows with more padding, and each row without padding."""
        whole = self._run(self._inputs)
        wanted = self._tokens(whole, self._mask)
        for more in sorted({1, ratio - 1, ratio, 3 * ratio + 1} - {0}):
            length = self._length + more
            if (max_length is None or length <= max_length) and self._can_run(self._count, length):
                padded = _padded(self._inputs, more, pad_token_id)
                yield self._tokens(self._run(padded), self._mask), wanted
        for row, tokens in enumerate(self._mask.sum(axis=-1).tolist()):
            if tokens == self._length or not self._can_run(1, tokens):
                continue
            own = self._mask[row : row + 1, :tokens]
            trimmed = {name: array[:, :tokens] for name, array in _take(self._inputs, [row]).items()}
            yield self._tokens(self._run(trimmed), own), self._tokens(_take(whole, [row]), own)

    def _can_run(self, batch_size: int, length: int) -> bool:
        """Return whether the graph accepts a shape. If not, record the shape as left out."""
        taken = self._supports_shape(batch_size, length)
        if not taken:
            self.left_out.add((batch_size, length))
        return taken

    def _run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the graph, and refuse outputs without one row per input row, or per token for token outputs."""
        outputs = {
            name: np.moveaxis(values, token_axis(name), 1) if name in self._token_outputs else values
            for name, values in self._runner.run(inputs).items()
        }
        shape = inputs["input_ids"].shape
        for name, values in outputs.items():
            expected = shape if name in self._token_outputs else shape[:1]
            if values.shape[: len(expected)] != expected:
                raise UserError(f"for inputs of the shape {shape}, {name} has the shape {values.shape}")
        return outputs

    def _tokens(self, outputs: Arrays, mask: np.ndarray) -> Arrays:
        """Select the mask's (B, S) tokens in token outputs, (number of tokens, ...). Keep other outputs."""
        return {
            name: values[:, : mask.shape[1]][mask] if name in self._token_outputs else values
            for name, values in outputs.items()
        }


def _take(arrays: Mapping[str, np.ndarray], rows: Sequence[int]) -> Arrays:
    return {name: array[list(rows)] for name, array in arrays.items()}
