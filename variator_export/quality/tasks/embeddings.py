"""Quality of embeddings and of hidden states."""

from collections.abc import Sequence

import numpy as np

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.engines.base import Arrays
from variator_export.quality.metrics import (
    Metrics,
    embedding_metrics,
    hidden_state_metrics,
    similarity_metrics,
)
from variator_export.quality.tasks.base import (
    Encode,
    EvaluatedModel,
    EvaluationTask,
    Kept,
    Measurement,
    needs_output,
    needs_targets,
)
from variator_export.text.tokenizer import TokenRow

_OUTPUT = "sentence_embedding"
_STATES = "last_hidden_state"
_NO_EMBEDDING = "Choose another --task, or add the sentence-transformers files to the folder."
# The number of token vectors that are compared, evenly spaced in each text. It bounds the memory.
_MOST_VECTORS = 25_000
_FEWEST_OF_A_TEXT = 4


class _Embeddings(Measurement):
    """Embeddings of all first texts, then of all second texts of pairs."""

    metric = "cosine"

    def __init__(self, rows: Sequence[TokenRow], texts: Sequence[str]) -> None:
        self.rows = rows
        # Duplicates are removed: a copy of a text would always stay among the text's nearest neighbours.
        first: dict[str, int] = {}
        for row, text in enumerate(texts):
            first.setdefault(text, row)
        self._distinct = list(first.values())

    def keep(self, row: int, outputs: Arrays) -> np.ndarray:
        return outputs[_OUTPUT]

    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        distinct = self._distinct
        return embedding_metrics(np.stack(kept)[distinct], np.stack(uncompressed)[distinct])


class _Similarities(_Embeddings):
    metric = "spearman"

    def __init__(self, rows: Sequence[TokenRow], texts: Sequence[str], scores: Sequence[float]) -> None:
        super().__init__(rows, texts)
        self._scores = scores

    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        count, found = len(self._scores), np.stack(kept)
        correlations = similarity_metrics(found[:count], found[count:], self._scores)
        return {"spearman": correlations["spearman"], **super().measure(kept, uncompressed)}


class _HiddenStates(Measurement):
    metric = "cosine"

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self.rows = rows
        self._most = max(_FEWEST_OF_A_TEXT, _MOST_VECTORS // len(rows))

    def keep(self, row: int, outputs: Arrays) -> np.ndarray:
        """Return the vectors of at most `_most` tokens, (tokens, d)."""
        states = outputs[_STATES]
        if len(states) <= self._most:
            return states
        return states[np.linspace(0, len(states) - 1, self._most).round().astype(int)]

    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        return hidden_state_metrics(kept, uncompressed)


class Embedding(EvaluationTask):
    """Embeddings, without targets."""

    name = "embedding"

    def unfit_model(self, model: EvaluatedModel) -> UserError | None:
        return needs_output(self.name, model, _OUTPUT, _NO_EMBEDDING)

    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        texts = _texts(examples)
        return _Embeddings(encode.rows(texts), texts)


class Similarity(Embedding):
    """Similarity of pairs."""

    name = "similarity"

    def unfit_data(self, examples: Examples) -> UserError | None:
        if examples.pairs is None and examples.targets is not None:
            return UserError(
                "The task similarity needs pairs of texts.", "Name the second column: --pair-column NAME"
            )
        return needs_targets(self.name, examples)

    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        texts = _texts(examples)
        return _Similarities(encode.rows(texts), texts, examples.scores())


class HiddenStates(EvaluationTask):
    """Hidden states of a model without a head, without targets."""

    name = "hidden-states"

    def unfit_model(self, model: EvaluatedModel) -> UserError | None:
        if _STATES in model.outputs:
            return None
        return UserError(
            f"The task hidden-states needs the output {_STATES}; {model.source} returns "
            f"{', '.join(model.outputs)}.",
            "Choose another --task.",
        )

    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        return _HiddenStates(encode.rows(examples.texts, examples.pairs))


SIMILARITY = Similarity()
EMBEDDING = Embedding()
HIDDEN_STATES = HiddenStates()


def _texts(examples: Examples) -> list[str]:
    """First and second texts, each a row of its own."""
    return [*examples.texts, *(examples.pairs or ())]
