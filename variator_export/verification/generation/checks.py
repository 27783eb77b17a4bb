"""Checks of generated text: scores along given tokens, and the tokens of greedy search.

The decoder's graph runs token by token with its cache; eager PyTorch runs all tokens at once, without one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.engines.base import Arrays
from variator_export.generation.search import StepDecoder, generate
from variator_export.generation.settings import GenerationSettings
from variator_export.verification.cases import REAL_TEXT, Case
from variator_export.verification.generation.decoder import LOGITS, DecoderRun
from variator_export.verification.judging.compare import deviation
from variator_export.verification.judging.error_budget import MULTIPLE, make_budgets
from variator_export.verification.judging.judge import Finding, Question, judge

if TYPE_CHECKING:
    from variator_export.engines.eager import EagerModel

# Real text, and rows with holes: the decoder must not read what the mask leaves out.
_CASES = (REAL_TEXT, "a mask with holes", "padding on the left")
FORCED = "agrees along given tokens"
ALONE = "a row alone, with less padding"
GREEDY = "generates the tokens of eager PyTorch"
_TOKENS = 9
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


def generation_cases(cases: Sequence[Case]) -> list[Case]:
    """The cases that generation is checked on."""
    return [case for case in cases if case.name in _CASES]


def check_generation(
    variant: GeneratingVariant, cases: Sequence[Case], seed: int = 0
) -> tuple[list[Finding], list[Parting]]:
    """Compare the scores along random tokens, and the tokens of greedy search, with eager PyTorch.

    Args:
        variant: The variant.
        cases: Cases whose rows have at least one token each.
        seed: Seed of the random tokens.

    Returns:
        Three findings for each case that the decoder takes, and the rows of greedy search that part from
        eager PyTorch's. Rows may part at two tokens whose scores are equal within rounding.
    """
    rng = np.random.default_rng(seed)
    wanted, deviations, found, alone = [], [], [], []
    cases = [case for case in cases if variant.decoder.supports_shape(*case.shape)]
    if not cases:
        return [], []
    for case in cases:
        # An engine may fail at one length only, so it takes as many tokens as it can.
        count = variant.decoder.most_new_tokens or _TOKENS
        tokens = rng.integers(0, variant.vocab_size, (case.shape[0], count))
        tokens[:, 0] = variant.settings.decoder_start_token_id
        exact = variant.exact.scores(case.inputs, tokens)
        rounded = variant.same_precision.scores(case.inputs, tokens)
        wanted.append(exact)
        deviations.append({LOGITS: deviation(rounded, exact)})
        found.append(_scores(variant, case.inputs, tokens))
        row, inputs = _shortest_row(case, variant.ratio)
        if variant.decoder.supports_shape(*inputs["attention_mask"].shape):
            alone.append((len(found) - 1, row, _scores(variant, inputs, tokens[row : row + 1])))
    budgets = [of_case[LOGITS] for of_case in make_budgets(deviations, variant.precision)]
    findings = [
        judge(Question(variant.decoder.file, FORCED, case.name, case.shape, LOGITS), scores, exact, budget)
        for case, scores, exact, budget in zip(cases, found, wanted, budgets, strict=True)
    ]
    for index, row, scores in alone:
        question = Question(variant.decoder.file, ALONE, cases[index].name, cases[index].shape, LOGITS)
        findings.append(judge(question, scores, wanted[index][row : row + 1], budgets[index]))
    scale = max(of_case[LOGITS].scale for of_case in deviations)
    # Each of two scores may be off by the limit of one.
    tie = 2 * MULTIPLE * scale * max(budget.max_abs for budget in budgets)
    partings: list[Parting] = []
    for case, budget in zip(cases, budgets, strict=True):
        own = _partings(variant, case, tie)
        used = max((MULTIPLE * abs(parting.gap) / tie for parting in own), default=0.0)
        question = Question(variant.decoder.file, GREEDY, case.name, case.shape, LOGITS)
        findings.append(Finding(question, budget, None, used))
        partings += own
    return findings, partings


def _scores(variant: GeneratingVariant, inputs: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Scores along tokens (B, T), step by step with the cache, (B, T, V)."""
    call = variant.decoder.start(dict(inputs))
    return np.stack([call.step(step) for step in tokens.T], axis=1)


def _shortest_row(case: Case, ratio: int) -> tuple[int, Arrays]:
    """The row with the fewest tokens, without the windows that hold only padding on its right."""
    mask = case.inputs["attention_mask"]
    ends = mask.shape[1] - np.argmax(mask[:, ::-1] > 0, axis=1)
    row = int(np.argmin(ends))
    length = min(-(-int(ends[row]) // ratio) * ratio, mask.shape[1])
    return row, {name: values[row : row + 1, :length] for name, values in case.inputs.items()}


def _partings(variant: GeneratingVariant, case: Case, tie: float) -> list[Parting]:
    count = min(_GENERATED, variant.decoder.most_new_tokens or _GENERATED)
    settings = variant.settings.model_copy(
        update={
            **{"num_beams": 1, "num_return_sequences": 1, "do_sample": False},
            **{"max_new_tokens": count, "min_new_tokens": 0},
        }
    )
    mask = case.inputs["attention_mask"]
    call = variant.decoder.start(dict(case.inputs))
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
