"""Checks of generated text: scores along given tokens, and the tokens of greedy search.

The decoder's graph runs token by token with its cache; eager PyTorch runs all tokens at once, without one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.core.axes import past_names, present_names
from variator_export.core.encoder_size import DecoderSize
from variator_export.engines.base import Arrays, Runner
from variator_export.generation.search import generate
from variator_export.generation.settings import GenerationSettings
from variator_export.verification.cases import REAL_TEXT, Case
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
LOGITS = "logits"
_TOKENS = 9
_GENERATED = 16


class RunnerDecoder:
    """A call of a decoder's graph, with a cache in numpy (`generation.search.StepDecoder`).

    Args:
        decoder: The runner of the decoder's graph.
        size: The decoder's sizes.
        mask: The encoder's attention mask, int64 (B, S).
        states: The outputs of the encoder's graph, by name.
    """

    def __init__(
        self, decoder: Runner, size: DecoderSize, mask: np.ndarray, states: Mapping[str, np.ndarray]
    ) -> None:
        self._decoder = decoder
        own, cross = (past_names(size.num_layers, stack) for stack in ("decoder", "encoder"))
        pairs = zip(cross, present_names(size.num_layers, "encoder"), strict=True)
        self._fixed = {"encoder_attention_mask": mask} | {past: states[name] for past, name in pairs}
        dtype = states[present_names(1, "encoder")[0]].dtype
        empty = np.zeros((len(mask), size.num_heads, 0, size.head_size), dtype)
        self._past: Arrays = dict.fromkeys(own, empty)
        self._presents = present_names(size.num_layers, "decoder")

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Take the next token of each row, int64 (rows,); returns scores, float32 (rows, V)."""
        found = self._decoder.run({**self._fixed, "input_ids": tokens[:, None], **self._past})
        self._past = {past: found[name] for past, name in zip(self._past, self._presents, strict=True)}
        return found[LOGITS][:, -1]

    def select(self, rows: np.ndarray) -> None:
        """Continue with these rows."""
        self._past = {name: values[rows] for name, values in self._past.items()}


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
        graph: The file of the decoder's graph.
        ratio: The ratio k.
        encoder: The runner of the encoder's graph.
        decoder: The runner of the decoder's graph.
        size: The decoder's sizes.
        settings: The model's own settings.
        exact: Eager PyTorch in float64.
        same_precision: Eager PyTorch in the precision of the graphs.
        precision: The name of that precision.
    """

    graph: str
    ratio: int
    encoder: Runner
    decoder: Runner
    size: DecoderSize
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
        Three findings for each case, and the rows of greedy search that part from eager PyTorch's. Rows may
        part at two tokens whose scores are equal within rounding.
    """
    rng = np.random.default_rng(seed)
    wanted, deviations, found, alone = [], [], [], []
    for case in cases:
        tokens = rng.integers(0, variant.size.vocab_size, (case.shape[0], _TOKENS))
        tokens[:, 0] = variant.settings.decoder_start_token_id
        exact = variant.exact.scores(case.inputs, tokens)
        rounded = variant.same_precision.scores(case.inputs, tokens)
        wanted.append(exact)
        deviations.append({LOGITS: deviation(rounded, exact)})
        found.append(_scores(variant, case.inputs, tokens))
        row, inputs = _shortest_row(case, variant.ratio)
        alone.append((row, _scores(variant, inputs, tokens[row : row + 1])))
    budgets = [of_case[LOGITS] for of_case in make_budgets(deviations, variant.precision)]
    findings = [
        judge(Question(variant.graph, FORCED, case.name, case.shape, LOGITS), scores, exact, budget)
        for case, scores, exact, budget in zip(cases, found, wanted, budgets, strict=True)
    ]
    for case, (row, scores), exact, budget in zip(cases, alone, wanted, budgets, strict=True):
        question = Question(variant.graph, ALONE, case.name, case.shape, LOGITS)
        findings.append(judge(question, scores, exact[row : row + 1], budget))
    scale = max(of_case[LOGITS].scale for of_case in deviations)
    # Each of two scores may be off by the limit of one.
    tie = 2 * MULTIPLE * scale * max(budget.max_abs for budget in budgets)
    partings: list[Parting] = []
    for case, budget in zip(cases, budgets, strict=True):
        own = _partings(variant, case, tie)
        used = max((MULTIPLE * abs(parting.gap) / tie for parting in own), default=0.0)
        question = Question(variant.graph, GREEDY, case.name, case.shape, LOGITS)
        findings.append(Finding(question, budget, None, used))
        partings += own
    return findings, partings


def _scores(variant: GeneratingVariant, inputs: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Scores along tokens (B, T), step by step with the cache, (B, T, V)."""
    states = variant.encoder.run(inputs)
    call = RunnerDecoder(variant.decoder, variant.size, inputs["attention_mask"], states)
    return np.stack([call.step(step) for step in tokens.T], axis=1)


def _shortest_row(case: Case, ratio: int) -> tuple[int, Arrays]:
    """The row with the fewest tokens, without the windows that hold only padding on its right."""
    mask = case.inputs["attention_mask"]
    ends = mask.shape[1] - np.argmax(mask[:, ::-1] > 0, axis=1)
    row = int(np.argmin(ends))
    length = min(-(-int(ends[row]) // ratio) * ratio, mask.shape[1])
    return row, {name: values[row : row + 1, :length] for name, values in case.inputs.items()}


def _partings(variant: GeneratingVariant, case: Case, tie: float) -> list[Parting]:
    settings = variant.settings.model_copy(
        update={
            **{"num_beams": 1, "num_return_sequences": 1, "do_sample": False},
            **{"max_new_tokens": _GENERATED, "min_new_tokens": 0},
        }
    )
    mask = case.inputs["attention_mask"]
    call = RunnerDecoder(variant.decoder, variant.size, mask, variant.encoder.run(case.inputs))
    sources = [row[kept > 0] for row, kept in zip(case.inputs["input_ids"], mask, strict=True)]
    found = generate(call, sources, settings).tokens
    expected = variant.same_precision.generate(
        case.inputs, num_beams=1, do_sample=False, max_new_tokens=_GENERATED, min_new_tokens=0, min_length=0
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
