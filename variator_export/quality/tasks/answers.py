"""Quality of answers that are cut out of a context."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.engines.base import Arrays
from variator_export.quality.metrics import Metrics, answer_metrics
from variator_export.quality.tasks.base import (
    Encode,
    EvaluatedModel,
    EvaluationTask,
    Kept,
    Measurement,
    needs_targets,
)
from variator_export.text.predictions import answer
from variator_export.text.tokenizer import token_row


class _Answers(Measurement):
    metric = "f1"

    def __init__(
        self, encodings: Sequence[Encoding], contexts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> None:
        self.rows = [token_row(encoding) for encoding in encodings]
        self._encodings = encodings
        self._contexts = contexts
        self._answers = answers

    def keep(self, row: int, outputs: Arrays) -> np.ndarray:
        """Return the logits of the answer's first and of its last token, (2, tokens)."""
        return np.stack([outputs["start_logits"], outputs["end_logits"]])

    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        return answer_metrics(self._found(kept), self._found(uncompressed), self._answers)

    def warnings(self, kept: Kept) -> list[str]:
        return ["has an empty answer to every question"] if not any(self._found(kept)) else []

    def _found(self, kept: Kept) -> list[str]:
        return [
            str(answer(logits[0], logits[1], encoding, context)["answer"])
            for logits, encoding, context in zip(kept, self._encodings, self._contexts, strict=True)
        ]


class QuestionAnswering(EvaluationTask):
    """An answer from a context, as `predict` gives it: a context beyond the limit is cut."""

    name = "question-answering"

    def unfit_data(self, examples: Examples) -> UserError | None:
        if examples.pairs is None:
            return UserError(
                "The task question-answering needs questions and contexts.",
                "Name their columns: --text-column question --pair-column context",
            )
        return needs_targets(self.name, examples, "the accepted answers")

    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        assert examples.pairs is not None
        answers = examples.alternatives()
        for place, accepted in zip(examples.places, answers, strict=True):
            if not accepted:
                raise UserError(
                    f"{place} has no answer; every prediction is an answer from the context.",
                    "Remove the questions without an answer.",
                )
        encodings = encode(examples.texts, examples.pairs)
        return _Answers(encodings, examples.pairs, answers)


QUESTION_ANSWERING = QuestionAnswering()
