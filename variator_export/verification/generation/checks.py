"""Checks of generated text: scores along given tokens, and the tokens of greedy search.

The decoder's graph runs token by token with its cache; eager PyTorch runs all tokens at once, without one.
"""

import functools
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.generation.search import StepDecoder, generate
from variator_export.generation.settings import GenerationSettings
from variator_export.verification.cases import REAL_TEXT, Case
from variator_export.verification.generation.decoder import LOGITS, DecoderRun
from variator_export.verification.judging.compare import Deviation, deviation
from variator_export.verification.judging.error_budget import MULTIPLE, Budget, make_budgets
from variator_export.verification.judging.expected import Expected, judge_carefully
from variator_export.verification.judging.judge import Finding, Question, failure, judge

if TYPE_CHECKING:
    from variator_export.engines.eager import EagerModel

# Real text, and rows with holes: the decoder must not read what the mask leaves out.
_CASES = (REAL_TEXT, "a mask with holes", "padding on the left")
FORCED = "agrees along given tokens"
ALONE = "a row alone, with less padding"
GREEDY = "generates the tokens of eager PyTorch"
MASK = "attention_mask"
_TOKENS = 9
# Rows times tokens whose scores fit into memory in float64, with a vocabulary of 250,000 tokens.
_AFFORDABLE = 512
_GENERATED = 16


@dataclass(frozen=True)
class Parting:
    """The first step at which a row's tokens part from eager PyTorch's.

    Attributes:
        case: The case's name.
        row: The row, from 0.
        step: The number of new tokens before the step.
        found: The graph's token.
        expected: Eager PyTorch's token.
        gap: The difference of the two tokens' scores in float64.
        tie: The difference that rounding allows.
    """

    case: str
    row: int
    step: int
    found: int
    expected: int
    gap: float
    tie: float

    @property
    def is_tie(self) -> bool:
        """Whether the two tokens are equally good within rounding."""
        return abs(self.gap) <= self.tie

    def __str__(self) -> str:
        judged = "equal within rounding" if self.is_tie else f"rounding allows {self.tie:.2g}"
        return (
            f"case {self.case}, row {self.row + 1}: token {self.step + 1} is {self.found}, not "
            f"{self.expected}; their scores differ by {abs(self.gap):.2g} ({judged})"
        )

    def as_dict(self) -> dict[str, Any]:
        """The parting for a report."""
        return asdict(self) | {"is_tie": self.is_tie}


@dataclass(frozen=True)
class GeneratingVariant:
    """A variant whose generation is checked.

    Attributes:
        decoder: The decoder, with the variant's encoder.
        ratio: The ratio k.
        vocab_size: The number of scores for each token.
        settings: The model's own settings.
        exact: Eager PyTorch in float64.
        same_precision: Eager PyTorch in the precision of the graphs.
        precision: The name of that precision.
    """

    decoder: DecoderRun[StepDecoder]
    ratio: int
    vocab_size: int
    settings: GenerationSettings
    exact: "EagerModel"
    same_precision: "EagerModel"
    precision: str


def generation_cases(cases: Sequence[Case], shapes: Collection[tuple[int, int]] = ()) -> list[Case]:
    """The cases that generation is checked on: a few, and those of shapes that an engine is built for."""
    with_tokens = [case for case in cases if case.judged_rows.all()]
    return [case for case in with_tokens if case.name in _CASES or case.shape in shapes]


@dataclass(frozen=True)
class GenerationFindings:
    """The result of the checks of a variant's generation.

    Attributes:
        findings: The findings.
        partings: The rows of greedy search that part from eager PyTorch's. They may part at two tokens whose
            scores are equal within rounding.
        left_out: Cases that the decoder does not take, by check.
    """

    findings: list[Finding]
    partings: list[Parting]
    left_out: dict[str, list[str]]


@dataclass(frozen=True)
class _Along:
    """A case along random tokens.

    Attributes:
        case: The case.
        tokens: int64 (B, T).
        copies: Rows of the decoder for each row of the case.
        exact: Eager PyTorch's scores in float64, (B, T, V).
        deviation: What they lose in the precision of the graphs.
    """

    case: Case
    tokens: np.ndarray
    copies: int
    exact: np.ndarray
    deviation: Deviation


def check_generation(variant: GeneratingVariant, cases: Sequence[Case], seed: int = 0) -> GenerationFindings:
    """Compare the scores along random tokens, and the tokens of greedy search, with eager PyTorch.

    Cases of an engine's shapes run with as many rows as its decoder takes, along all tokens that it takes, or
    a few where the batch is large. The others run along all tokens, also one row alone, and in greedy search.

    Args:
        variant: The variant.
        cases: Cases whose rows have at least one token each.
        seed: Seed of the random tokens.
    """
    decoder = variant.decoder
    result = GenerationFindings([], [], {})
    taken = []
    for case in cases:
        if (most := decoder.most_new_tokens(case.shape, _TOKENS)) == 0:
            for check in _checks(case):
                result.left_out.setdefault(check, []).append(case.name)
            continue
        is_small = case.name in _CASES
        count = most if is_small or case.shape[0] * most <= _AFFORDABLE else min(most, _TOKENS)
        tokens = _random_tokens(variant, case, count, seed)
        exact = variant.exact.scores(case.inputs, tokens)
        rounded = variant.same_precision.scores(case.inputs, tokens)
        copies = 1 if is_small else decoder.most_copies(case.shape, tokens.shape[1])
        taken.append(_Along(case, tokens, copies, exact, deviation(rounded, exact)))
    if not taken:
        return result
    budgets = [b[LOGITS] for b in make_budgets([{LOGITS: t.deviation} for t in taken], variant.precision)]
    scale = max(along.deviation.scale for along in taken)
    # Each of two scores may be off by the limit of one.
    tie = 2 * MULTIPLE * scale * max(budget.max_abs for budget in budgets)
    for along, budget in zip(taken, budgets, strict=True):
        eager = variant.same_precision
        expected = Expected(along.case, {LOGITS: along.exact}, {LOGITS: budget}).measured_by(
            eager, functools.partial(_scores_by_name, eager, along.tokens)
        )
        finding = _judge_along(variant, along, expected)
        result.findings.append(finding)
        if along.case.name not in _CASES:
            continue
        row, inputs = _shortest_row(along.case, variant.ratio)
        if decoder.most_new_tokens(inputs[MASK].shape, along.tokens.shape[1]) < along.tokens.shape[1]:
            result.left_out.setdefault(ALONE, []).append(along.case.name)
        else:
            alone = _Along(
                along.case, along.tokens[row : row + 1], 1, along.exact[row : row + 1], along.deviation
            )
            result.findings.append(_judge_along(variant, alone, expected, ALONE, inputs))
        if finding.deviation is not None and finding.deviation.finite:  # else there is nothing to search
            result.findings.append(_judge_greedy(variant, along.case, budget, tie, result.partings))
    return result


def _checks(case: Case) -> tuple[str, ...]:
    return (FORCED, ALONE, GREEDY) if case.name in _CASES else (FORCED,)


def _random_tokens(variant: GeneratingVariant, case: Case, count: int, seed: int) -> np.ndarray:
    """Tokens (B, count), the start token first. A case has the same ones whatever else is checked."""
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode())])
    tokens = rng.integers(0, variant.vocab_size, (case.shape[0], count))
    tokens[:, 0] = variant.settings.decoder_start_token_id
    return tokens


def _scores_by_name(eager: "EagerModel", tokens: np.ndarray, inputs: Arrays) -> Arrays:
    return {LOGITS: eager.scores(inputs, tokens)}


def _judge_along(
    variant: GeneratingVariant,
    along: _Along,
    expected: Expected,
    check: str = FORCED,
    inputs: Arrays | None = None,
) -> Finding:
    case, copies = along.case, along.copies
    question = Question(variant.decoder.file, check, case.name, case.shape, LOGITS)
    try:
        scores = _scores(variant, inputs or case.inputs, np.repeat(along.tokens, copies, axis=0), copies)
    except UserError as error:
        return failure(question, expected.budgets[LOGITS], error.message)
    wanted = np.repeat(along.exact, copies, axis=0)
    return judge_carefully(expected, LOGITS, functools.partial(judge, question, scores, wanted))


def _judge_greedy(
    variant: GeneratingVariant, case: Case, budget: Budget, tie: float, partings: list[Parting]
) -> Finding:
    question = Question(variant.decoder.file, GREEDY, case.name, case.shape, LOGITS)
    try:
        own = _partings(variant, case, tie)
    except UserError as error:
        return failure(question, budget, error.message)
    partings += own
    return Finding(question, budget, None, max((MULTIPLE * abs(p.gap) / tie for p in own), default=0.0))


def worst_step(variant: GeneratingVariant, case: Case, seed: int) -> np.ndarray:
    """Tokens up to the step at which a decoder is furthest from eager PyTorch, int64 (B, T), T at least 2."""
    most = variant.decoder.most_new_tokens(case.shape, _TOKENS)
    tokens = _random_tokens(variant, case, max(most, 2), seed)
    try:
        found = _scores(variant, case.inputs, tokens[:, :most])
    except UserError:
        return tokens[:, :2]
    error = np.abs(found - variant.exact.scores(case.inputs, tokens[:, :most])).max(axis=(0, 2))
    return tokens[:, : max(2, 1 + int(np.argmax(np.nan_to_num(error, nan=np.inf))))]


def _scores(
    variant: GeneratingVariant, inputs: Mapping[str, np.ndarray], tokens: np.ndarray, copies: int = 1
) -> np.ndarray:
    """Scores along tokens (rows, T), step by step with the cache, (rows, T, V)."""
    call = variant.decoder.start(dict(inputs), copies)
    return np.stack([call.step(step) for step in tokens.T], axis=1)


def _shortest_row(case: Case, ratio: int) -> tuple[int, Arrays]:
    """The row with the fewest tokens, without the windows that hold only padding on its right."""
    mask = case.inputs[MASK]
    ends = mask.shape[1] - np.argmax(mask[:, ::-1] > 0, axis=1)
    row = int(np.argmin(ends))
    length = min(-(-int(ends[row]) // ratio) * ratio, mask.shape[1])
    return row, {name: values[row : row + 1, :length] for name, values in case.inputs.items()}


def _partings(variant: GeneratingVariant, case: Case, tie: float) -> list[Parting]:
    count = min(_GENERATED, variant.decoder.most_new_tokens(case.shape, _GENERATED))
    settings = variant.settings.model_copy(
        update={
            **{"num_beams": 1, "num_return_sequences": 1, "do_sample": False},
            **{"max_new_tokens": count, "min_new_tokens": 0},
        }
    )
    mask = case.inputs[MASK]
    call = variant.decoder.start(dict(case.inputs), 1)
    sources = [row[kept > 0] for row, kept in zip(case.inputs["input_ids"], mask, strict=True)]
    found = generate(call, sources, settings).tokens
    expected = variant.same_precision.generate(
        case.inputs, num_beams=1, do_sample=False, max_new_tokens=count, min_new_tokens=0, min_length=0
    )
    partings = []
    for row, (sequences, other) in enumerate(zip(found, expected, strict=True)):
        own, other = sequences[0], other[1:]
        length = min(len(own), len(other))
        differs = np.flatnonzero(own[:length] != other[:length])
        if not len(differs):
            continue
        step = int(differs[0])
        prefix = np.concatenate([[settings.decoder_start_token_id], own[:step]])[None].astype(np.int64)
        inputs = {name: values[row : row + 1] for name, values in case.inputs.items()}
        scores = variant.exact.scores(inputs, prefix)[0, -1]
        gap = float(scores[other[step]] - scores[own[step]])
        partings.append(Parting(case.name, row, step, int(own[step]), int(other[step]), gap, tie))
    return partings
