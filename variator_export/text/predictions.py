"""Predictions from a model's outputs, named as in transformers: labels, entities, answers and tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding

from variator_export.core.errors import UserError

Prediction = dict[str, Any]
# The tasks that have predictions. Feature extraction has embeddings instead.
TASKS = ("text-classification", "token-classification", "question-answering", "fill-mask")
# The tasks whose result is of the whole text. Entities, answers and masks are places in the text as it was
# given, which a prompt would move.
_OF_WHOLE_TEXTS = ("feature-extraction", "text-classification", "text2text-generation")
# The label of tokens outside any entity, in the BIO scheme.
_OUTSIDE = "O"
# The number of classes of a config.json that does not say it, as transformers has it.
_NUM_LABELS = 2
# Longest answer in tokens, and the number of tokens to fill a mask with, as transformers has them.
_LONGEST_ANSWER = 15
_MOST_TOKENS = 5


def takes_prompt(task: str | None) -> bool:
    """Whether a model's prompt is put before texts."""
    return task in _OF_WHOLE_TEXTS


@dataclass(frozen=True)
class Labels:
    """The classes of a classifier, as its config.json declares them.

    Attributes:
        names: Class names, by index.
        activation: What turns logits into scores: `softmax` over classes that exclude each other, `sigmoid`
            for each class by itself, or `none` for the score of a regression.
    """

    names: tuple[str, ...]
    activation: str

    @classmethod
    def read(cls, config: Mapping[str, Any], num_labels: int) -> "Labels":
        """Read the classes from the content of a config.json.

        The activation is that of transformers' text-classification pipeline, or the one that a cross-encoder
        of sentence-transformers names.

        Raises:
            UserError: The labels do not fit the model's number of classes, or the activation is unknown.
        """
        named = config.get("id2label") or {f"{index}": f"LABEL_{index}" for index in range(num_labels)}
        try:
            names = {int(key): str(value) for key, value in named.items()}
        except (AttributeError, ValueError) as error:
            raise UserError("config.json has an id2label that is not labels by index.", _RESTORE) from error
        if set(names) != set(range(num_labels)):
            raise UserError(
                f"config.json has labels for the classes {sorted(names)}; the model has {num_labels}.",
                _RESTORE,
            )
        return cls(tuple(names[index] for index in range(num_labels)), _activation(config, num_labels))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "Labels":
        """Read the classes from the content of a config.json, which also says how many there are.

        Raises:
            UserError: The labels are not labels by index, or the activation is unknown.
        """
        named = config.get("id2label")
        return cls.read(config, len(named) if named else int(config.get("num_labels") or _NUM_LABELS))

    def ids(self) -> dict[str, int]:
        """Class indices by name."""
        return {name: index for index, name in enumerate(self.names)}

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Scores of logits (..., C), float64 (..., C)."""
        exact = logits.astype(np.float64)
        if self.activation == "softmax":
            return _softmax(exact)
        return 1 / (1 + np.exp(-exact)) if self.activation == "sigmoid" else exact


_RESTORE = "Restore config.json from the model's source, and build again."


def _activation(config: Mapping[str, Any], num_labels: int) -> str:
    own = config.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, Mapping) else None
    named = named or config.get("sbert_ce_default_activation_function")
    if named is not None:
        found = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}.get(
            str(named).rpartition(".")[2]
        )
        if found is None:
            raise UserError(
                f"config.json names the activation {named}, which is not supported.",
                "Supported are Identity, Sigmoid and Softmax of torch.nn.",
            )
        return found
    if config.get("problem_type") == "regression":
        return "none"
    several = config.get("problem_type") == "multi_label_classification"
    return "sigmoid" if several or num_labels == 1 else "softmax"


def classify(logits: np.ndarray, labels: Labels) -> Prediction:
    """The best class of logits (C,), with the scores of all classes.

    Returns:
        `label`, `score`, and `scores` by label. Label and score are None if a logit is not finite.
    """
    scores = labels.scores(logits)
    if not np.isfinite(scores).all():
        return {"label": None, "score": None, "scores": dict.fromkeys(labels.names)}
    best = int(scores.argmax())
    return {
        "label": labels.names[best],
        "score": float(scores[best]),
        "scores": {name: float(score) for name, score in zip(labels.names, scores, strict=True)},
    }


def entities(logits: np.ndarray, labels: Labels, encoding: Encoding, text: str) -> list[Prediction]:
    """Entities in a text, from its tokens' logits (N, C).

    Neighbouring tokens of one entity are merged by their B- and I- tags (`aggregation_strategy="simple"` in
    transformers). The score is the mean over the tokens.
    """
    scores = _softmax(logits.astype(np.float64))
    found: list[tuple[str, list[int]]] = []
    previous: str | None = None
    for token, special in enumerate(encoding.special_tokens_mask):
        if special:
            continue
        prefix, name = _tag(labels.names[int(scores[token].argmax())])
        if name == previous and prefix != "B" and found:
            found[-1][1].append(token)
        else:
            found.append((name, [token]))
        previous = name
    result = []
    for name, tokens in found:
        if name == _OUTSIDE:
            continue
        start, end = encoding.offsets[tokens[0]][0], encoding.offsets[tokens[-1]][1]
        score = float(np.mean([scores[token].max() for token in tokens]))
        result.append(
            {"entity_group": name, "score": score, "word": text[start:end], "start": start, "end": end}
        )
    return result


def _tag(label: str) -> tuple[str, str]:
    """Split a label into its position in the entity and the entity's name. Without a prefix, it continues."""
    return (label[0], label[2:]) if label.startswith(("B-", "I-")) else ("I", label)


def answer(start: np.ndarray, end: np.ndarray, encoding: Encoding, context: str) -> Prediction:
    """The best answer in a context, from the logits (N,) of its first and of its last token.

    The score is the product of both tokens' probabilities among the tokens of the context, of which an answer
    has at most 15.
    """
    inside = np.array([place == 1 for place in encoding.sequence_ids])
    if not inside.any():
        return {"answer": "", "score": 0.0, "start": 0, "end": 0}
    chances = [_softmax(np.where(inside, values.astype(np.float64), -np.inf)) for values in (start, end)]
    spans = np.outer(*chances)
    spans = np.triu(spans) - np.triu(spans, _LONGEST_ANSWER)
    first, last = np.unravel_index(int(spans.argmax()), spans.shape)
    begins, ends = encoding.offsets[int(first)][0], encoding.offsets[int(last)][1]
    return {
        "answer": context[begins:ends],
        "score": float(spans[first, last]),
        "start": begins,
        "end": ends,
    }


def fill(logits: np.ndarray, mask: int) -> list[tuple[int, float]]:
    """The most probable tokens at a position of logits (N, V): ids and probabilities, best first."""
    chances = _softmax(logits[mask].astype(np.float64))
    best = np.argsort(-chances, kind="stable")[:_MOST_TOKENS]
    return [(int(token), float(chances[token])) for token in best]


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return result
