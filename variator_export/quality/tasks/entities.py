"""Quality of tags of words: entities, or parts of speech."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.engines.base import Arrays
from variator_export.quality.metrics import Metrics, entity_metrics
from variator_export.quality.tasks.base import (
    Encode,
    EvaluatedModel,
    EvaluationTask,
    Kept,
    Measurement,
    needs_targets,
)
from variator_export.text.predictions import Labels
from variator_export.text.tokenizer import token_row

_OUTSIDE = "O"


class _Tags(Measurement):
    def __init__(
        self,
        encodings: Sequence[Encoding],
        first_tokens: Sequence[Sequence[int | None]],
        labels: Labels,
        tags: Sequence[Sequence[str]],
    ) -> None:
        self.rows = [token_row(encoding) for encoding in encodings]
        self._first = first_tokens
        self._labels = labels
        self._tags = tags
        # Tags without positions, such as parts of speech, are not entities: each word counts.
        positions = {name.partition("-")[0] for name in labels.names if "-" in name}
        self.metric = "f1" if "B" in positions or "I" in positions else "accuracy"
        # Where config.json does not name the outside, the first class is it, as in every released tagger.
        self._outside = _OUTSIDE if _OUTSIDE in labels.names else labels.names[0]

    def keep(self, row: int, outputs: Arrays) -> np.ndarray:
        """Return the logits of each word's first token, (words, C). NaN-free zeros where it was cut off."""
        logits = outputs["logits"]
        found = np.zeros((len(self._first[row]), logits.shape[-1]), np.float32)
        for word, token in enumerate(self._first[row]):
            if token is not None:
                found[word] = logits[token]
        return found

    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        return entity_metrics(self._found(kept), self._found(uncompressed), self._tags)

    def warnings(self, kept: Kept) -> list[str]:
        said = {tag for tags in self._found(kept) for tag in tags}
        there = {tag for tags in self._tags for tag in tags}
        return [f"says {said.pop()} for every word"] if len(said) == 1 and len(there) > 1 else []

    def _found(self, kept: Kept) -> list[list[str]]:
        return [
            [
                self._outside if token is None else self._labels.names[int(values.argmax())]
                for token, values in zip(self._first[row], logits, strict=True)
            ]
            for row, logits in enumerate(kept)
        ]


class TokenClassification(EvaluationTask):
    """A tag for each word, from the word's first token, as transformers' examples measure it."""

    name = "token-classification"

    def unfit_data(self, examples: Examples) -> UserError | None:
        return needs_targets(self.name, examples, "a tag for each word")

    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        labels = Labels.of_config(model.config)
        ids = labels.ids()
        encodings = encode(examples.texts)
        first_tokens, tags = [], []
        for place, text, target, encoding in zip(
            examples.places, examples.texts, examples.label_lists(None), encodings, strict=True
        ):
            words = _words(text)
            if len(words) != len(target):
                raise UserError(
                    f"{place} has {len(words)} words and {len(target)} tags.",
                    "Give a tag for each word; words are separated by spaces.",
                )
            tags.append([labels.names[examples.class_index(tag, ids, place)] for tag in target])
            first_tokens.append(_first_tokens(words, encoding))
        return _Tags(encodings, first_tokens, labels, tags)


TOKEN_CLASSIFICATION = TokenClassification()


def _words(text: str) -> list[tuple[int, int]]:
    """The places of the words of a text: the first character, and the one after the last."""
    places, start = [], 0
    for word in text.split(" "):
        if word:
            places.append((start, start + len(word)))
        start += len(word) + 1
    return places


def _first_tokens(words: Sequence[tuple[int, int]], encoding: Encoding) -> list[int | None]:
    """The first token of each word. None for a word without one, which was cut off."""
    first: list[int | None] = [None] * len(words)
    word = 0
    for token, (start, end) in enumerate(encoding.offsets):
        if encoding.special_tokens_mask[token] or end <= start:
            continue
        # A token may begin with the space before its word, so its last character decides.
        while word < len(words) and words[word][1] < end:
            word += 1
        if word < len(words) and words[word][0] < end and first[word] is None:
            first[word] = token
    return first
