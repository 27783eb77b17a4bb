"""From texts to embeddings and predictions, for one function that runs a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding

from variator_export.bundle.manifest import BackboneEntry
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.engines.batches import BATCH_SIZE, run_rows
from variator_export.text.predictions import (
    TASKS,
    Labels,
    Prediction,
    answer,
    classify,
    entities,
    fill,
    takes_prompt,
)
from variator_export.text.tokenizer import TextEncoder, TokenRow, token_row

# A text, or a pair: a question and its context, a query and a passage.
TextOrPair = str | Sequence[str]
EMBEDDING = "sentence_embedding"
# From inputs by name, (batch_size, sequence_length) each, and the names of outputs (None: all) to outputs.
Run = Callable[[Mapping[str, np.ndarray], Sequence[str] | None], Arrays]


@dataclass(frozen=True)
class TextModel:
    """A model from text to result.

    Attributes:
        run: Runs the model once.
        encoder: The model's tokenizer.
        backbone: The model's inputs, outputs and task.
        config: The content of the model's config.json.
    """

    run: Run
    encoder: TextEncoder
    backbone: BackboneEntry
    config: Mapping[str, Any]

    def embed(
        self,
        texts: Iterable[str],
        *,
        batch_size: int = BATCH_SIZE,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> np.ndarray:
        """Sentence embeddings of texts, float32 (number of texts, hidden size).

        Raises:
            UserError: The model has no sentence embeddings, or a text cannot be encoded.
        """
        self.check_embeds()
        encodings = self.encode(texts, prompt_name=prompt_name, prompt=prompt)
        return self.embed_rows([token_row(encoding) for encoding in encodings], batch_size)

    def check_embeds(self) -> None:
        """Check that the model has sentence embeddings.

        Raises:
            UserError: It has none.
        """
        if EMBEDDING not in self.backbone.outputs:
            raise UserError(
                f"The model has no sentence embeddings: its outputs are {', '.join(self.backbone.outputs)}.",
                "Use predict, or build from a folder with the sentence-transformers files (modules.json).",
            )

    def embed_rows(self, rows: Sequence[TokenRow], batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Sentence embeddings of rows of tokens, float32 (number of rows, hidden size), in their order."""
        # Only the embeddings are kept: the outputs of every token would fill the memory.
        found = {
            index: outputs[EMBEDDING] for index, outputs in self._run_rows(rows, batch_size, [EMBEDDING])
        }
        return np.stack([found[index] for index in range(len(rows))])

    def predict(
        self,
        texts: Iterable[TextOrPair],
        *,
        batch_size: int = BATCH_SIZE,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> list[Any]:
        """Predictions for texts, or for pairs of texts, by the model's task.

        Raises:
            UserError: The task has no predictions, or a text cannot be encoded.
        """
        first, second = split_pairs(texts)
        if (missing := self.no_predictions(pairs=second is not None)) is not None:
            raise missing
        encodings = self.encode(first, second, prompt_name=prompt_name, prompt=prompt)
        outputs = self.outputs([token_row(encoding) for encoding in encodings], batch_size)
        return self.predictions(encodings, outputs, first, second)

    def no_predictions(self, *, pairs: bool) -> UserError | None:
        """The reason why there are no predictions for texts, or for pairs of texts; None if there are."""
        task = self.backbone.task
        if task not in TASKS:
            return UserError(
                f"The model's task is {task}, which has no predictions.",
                "Use embed for sentence embeddings, or session().run for the outputs themselves.",
            )
        if task == "question-answering" and not pairs:
            return UserError("Question answering needs pairs of texts.", "Give [(question, context), …].")
        return None

    def encode(
        self,
        texts: Iterable[str],
        pairs: Iterable[str] | None = None,
        *,
        truncate: bool = True,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> list[Encoding]:
        """Encode texts as `TextEncoder.encodings` does, with a prompt only if the task takes one."""
        if not takes_prompt(self.backbone.task):
            prompt_name, prompt = None, ""
        return self.encoder.encodings(
            texts, pairs=pairs, truncate=truncate, prompt_name=prompt_name, prompt=prompt
        )

    def predictions(
        self,
        encodings: Sequence[Encoding],
        outputs: Sequence[Arrays],
        first: Sequence[str],
        second: Sequence[str] | None,
    ) -> list[Any]:
        """Predictions from the outputs of encoded texts, in the order of the texts."""
        task = self.backbone.task
        if task == "question-answering":
            assert second is not None
            return [
                answer(row["start_logits"], row["end_logits"], encoding, context)
                for row, encoding, context in zip(outputs, encodings, second, strict=True)
            ]
        logits = [row["logits"] for row in outputs]
        if task == "fill-mask":
            return [
                self._filled(values, encoding.ids) for values, encoding in zip(logits, encodings, strict=True)
            ]
        labels = Labels.read(self.config, logits[0].shape[-1])
        if task == "text-classification":
            return [classify(values, labels) for values in logits]
        return [
            entities(values, labels, encoding, text)
            for values, encoding, text in zip(logits, encodings, first, strict=True)
        ]

    def outputs(
        self, rows: Sequence[TokenRow], batch_size: int = BATCH_SIZE, names: Sequence[str] | None = None
    ) -> list[Arrays]:
        """Outputs by name for each row of tokens, in the order of the rows; those of `names`, or all."""
        found = dict(self._run_rows(rows, batch_size, names))
        return [found[index] for index in range(len(rows))]

    def _run_rows(
        self, rows: Sequence[TokenRow], batch_size: int, outputs: Sequence[str] | None = None
    ) -> Iterator[tuple[int, Arrays]]:
        if batch_size < 1:
            raise UserError(f"The batch size is {batch_size}.", "Give at least 1.")
        return run_rows(
            lambda inputs: self.run(inputs, outputs),
            rows,
            self.backbone.inputs,
            pad_token_id=self.encoder.pad_token_id,
            token_outputs=self.backbone.token_outputs,
            batch_size=batch_size,
        )

    def _filled(self, logits: np.ndarray, ids: Sequence[int]) -> list[list[Prediction]]:
        """Tokens for each mask of a text, best first."""
        return [
            [
                {"token": token, "token_str": self.encoder.decode([token]), "score": score}
                for token, score in fill(logits, place)
            ]
            for place, token_id in enumerate(ids)
            if token_id == self.encoder.mask_token_id
        ]


def split_pairs(texts: Iterable[TextOrPair]) -> tuple[list[str], list[str] | None]:
    """Split pairs into first and second texts. Single texts have no second ones.

    Raises:
        UserError: Some rows are pairs and some are not. The message names the row.
    """
    if isinstance(texts, str):
        raise UserError("One text was given where several are expected.", "Give a list: [text].")
    items = list(texts)
    if not items or all(not isinstance(item, list | tuple) for item in items):
        return items, None  # type: ignore[return-value]  # the tokenizer refuses what is not text
    for row, item in enumerate(items):
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise UserError(
                f"Row {row + 1} is {item!r}, not a pair of texts as other rows are.",
                "Give only texts, or only pairs: [(first, second), …].",
            )
    first, second = zip(*items, strict=True)
    return list(first), list(second)
