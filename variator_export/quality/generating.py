"""Models that generate text, as runners that evaluations can run like all others."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.engines.target import GeneratingSession
from variator_export.generation.settings import GenerationSettings, read_settings

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
    if changes.get("do_sample"):
        raise UserError(
            "Sampled text differs from run to run, so ratios cannot be compared on it.",
            "Leave out do_sample; use num_beams to search further.",
        )
    if changes.get("num_return_sequences", 1) != 1:
        raise UserError("An evaluation compares one text for each input.", "Leave out num_return_sequences.")
    plain = settings.model_copy(update={"do_sample": False, "num_return_sequences": 1})
    return plain.changed(changes)


def session_runner(session: GeneratingSession, ratio: str, settings: GenerationSettings) -> GeneratingRunner:
    """A session at a ratio as a runner."""
    changes = _changes(settings, session.settings)

    def generate(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [sequences[0] for sequences in session.generate(inputs, ratio, **changes).tokens]

    return GeneratingRunner(generate, settings.pad_token_id)


def eager_runner(model: "EagerModel", settings: GenerationSettings, folder: Path) -> GeneratingRunner:
    """transformers' own `generate` on eager PyTorch as a runner; the folder has the model's own settings."""
    changes = _changes(settings, read_settings(folder))

    changes = {name: _lists(value) for name, value in changes.items()}

    def generate(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return list(model.generate(inputs, **changes)[:, 1:])

    return GeneratingRunner(generate, settings.pad_token_id)


def _lists(value: Any) -> Any:
    """A setting as transformers takes it, with lists where this package has tuples."""
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _changes(settings: GenerationSettings, own: GenerationSettings) -> dict[str, Any]:
    """What an evaluation changes; all else are the model's own settings, which both runtimes read."""
    fixed = {"max_new_tokens", "min_new_tokens", "num_beams", "do_sample", "num_return_sequences"}
    return {name: value for name, value in settings if name in fixed or value != getattr(own, name)}
