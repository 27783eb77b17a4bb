"""Quality of generated text."""

from collections.abc import Sequence

import numpy as np

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.engines.base import Arrays
from variator_export.quality.generating import TOKENS
from variator_export.quality.metrics import Metrics, text_metrics
from variator_export.quality.tasks.base import (
    Encode,
    EvaluatedModel,
    EvaluationTask,
    Kept,
    Measurement,
    needs_targets,
)
from variator_export.text.tokenizer import TextEncoder, TokenRow


class _GeneratedText(Measurement):
    metric = "rouge_l"
    generates = True

    def __init__(
        self, rows: Sequence[TokenRow], references: Sequence[Sequence[str]], encoder: TextEncoder
    ) -> None:
        self.rows = rows
        self._references = references
        self._encoder = encoder

    def keep(self, row: int, outputs: Arrays) -> np.ndarray:
        """Return the generated tokens, (longest,), padded."""
        return outputs[TOKENS]

    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        return text_metrics(self._texts(kept), self._texts(uncompressed), self._references)

    def compared(self, kept: Kept) -> np.ndarray:
        """The texts. The tokens of a row have as many pad tokens as its batch made necessary."""
        return np.array(self._texts(kept), dtype=object)

    def warnings(self, kept: Kept) -> list[str]:
        texts = set(self._texts(kept))
        if len(texts) > 1 or len({tuple(accepted) for accepted in self._references}) < 2:
            return []
        return [f"generates {texts.pop()[:60]!r} for every text"]

    def _texts(self, kept: Kept) -> list[str]:
        return [self._encoder.plain(tokens.tolist()).strip() for tokens in kept]


class TextToText(EvaluationTask):
    """Texts that a model generates, against one or several references."""

    name = "text2text-generation"

    def unfit_data(self, examples: Examples) -> UserError | None:
        if examples.pairs is not None:
            return UserError(
                "Models that generate text read one text, not a pair.",
                "Leave out --pair-column; put both into one text, as the model was trained.",
            )
        return needs_targets(self.name, examples, "the texts that are right")

    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        references = examples.alternatives()
        for place, accepted in zip(examples.places, references, strict=True):
            if not any(text.strip() for text in accepted):
                raise UserError(
                    f"{place} has no reference.", "Remove the line, or add the text that is right."
                )
        return _GeneratedText(encode.rows(examples.texts), references, encode.encoder)


TEXT_TO_TEXT = TextToText()
