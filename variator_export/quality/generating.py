"""Models that generate text, as runners that evaluations can run like all others."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.engines.target import GeneratingSession
from variator_export.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from variator_export.engines.eager import EagerModel

# The output of a runner that generates text.
TOKENS = "tokens"


class GeneratingRunner:
    """A runner whose output is the generated tokens, (B, longest), with pad tokens after the end.

    Args:
        generate: Function from inputs to the tokens of each row.
        pad_token_id: The token that stands after the end of a sequence.
    """

    def __init__(
        self, generate: Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]], pad_token_id: int
    ) -> None:
        self._generate = generate
        self._pad = pad_token_id

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Generate the best sequence of each row."""
        rows = self._generate(inputs)
        tokens = np.full((len(rows), max(map(len, rows))), self._pad, np.int64)
        for row, found in zip(tokens, rows, strict=True):
            row[: len(found)] = found
        return {TOKENS: tokens}


def deterministic(settings: GenerationSettings, changes: Mapping[str, Any]) -> GenerationSettings:
    """The settings of an evaluation: the model's own with the caller's changes, and one text for each.

    A model that samples by itself is evaluated without, so that its ratios differ by their plugins alone.

    Raises:
        UserError: A setting does not exist, contradicts another one, or asks for draws.
    """
    asked = settings.changed(changes)
    if changes.get("do_sample"):
        raise UserError(
            "Sampled text differs from run to run, so ratios cannot be compared on it.",
            "Leave out do_sample; use num_beams to search further.",
        )
    return asked.model_copy(update={"do_sample": False, "num_return_sequences": 1})


def session_runner(session: GeneratingSession, ratio: str, settings: GenerationSettings) -> GeneratingRunner:
    """A session at a ratio as a runner."""
    changes = _changes(settings)

    def generate(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [sequences[0] for sequences in session.generate(inputs, ratio, **changes).tokens]

    return GeneratingRunner(generate, settings.pad_token_id)


def eager_runner(model: "EagerModel", settings: GenerationSettings) -> GeneratingRunner:
    """transformers' own `generate` on eager PyTorch as a runner."""
    changes = _changes(settings)

    def generate(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return list(model.generate(inputs, **changes)[:, 1:])

    return GeneratingRunner(generate, settings.pad_token_id)


def _changes(settings: GenerationSettings) -> dict[str, Any]:
    """What an evaluation sets; all else are the model's own settings, which both runtimes read."""
    names = ["max_new_tokens", "min_new_tokens", "num_beams", "do_sample", "num_return_sequences"]
    if settings.num_beams > 1:
        names += ["length_penalty", "early_stopping"]
    return {name: getattr(settings, name) for name in names}
