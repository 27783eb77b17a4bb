"""Metrics of a model's outputs at each ratio, against its outputs without plugins and against the targets.

Shapes: N examples or texts, C classes, d hidden size. Each function returns metrics by name, as samples that
can be resampled (`quality.samples`).
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from variator_export.quality.samples import Samples, mean

Metrics = dict[str, Samples]

# Number of nearest neighbours that `retrieval_recall` compares.
NEIGHBOURS = 10
_QUERIES_AT_A_TIME = 1024
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(r"[^\W_]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def classification_metrics(logits: np.ndarray, uncompressed: np.ndarray, labels: Sequence[int]) -> Metrics:
    """Compute accuracy, F1 and agreement with the uncompressed model.

    Args:
        logits: Logits of the variant, (N, C).
        uncompressed: Logits of the model without plugins, (N, C).
        labels: Class indices, (N,).

    Returns:
        `accuracy`; `f1`, of class 1 for two classes and otherwise the mean over the classes; and `agreement`,
        the share of examples with the same arg-max.
    """
    from sklearn.metrics import f1_score

    predicted = logits.argmax(-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"

    def f1(rows: np.ndarray) -> np.ndarray:
        return np.asarray(f1_score(rows[:, 0], rows[:, 1], average=average, zero_division=0.0))

    return {
        "accuracy": mean(predicted == np.asarray(labels)),
        "f1": Samples(np.stack([labels, predicted], axis=-1), f1),
        "agreement": mean(predicted == uncompressed.argmax(-1)),
    }


def multi_label_metrics(predicted: np.ndarray, uncompressed: np.ndarray, labels: np.ndarray) -> Metrics:
    """Compute metrics of any number of classes for each example, from boolean arrays (N, C).

    Returns:
        `f1`, over all decisions (micro); `f1_macro`, its mean over the classes; `accuracy`, the share of
        examples with every class right; and `agreement`, the share of decisions that are the uncompressed
        model's.
    """
    from sklearn.metrics import f1_score

    classes = labels.shape[-1]

    def macro(rows: np.ndarray) -> np.ndarray:
        labelled, found = rows[:, :classes], rows[:, classes:]
        return np.asarray(f1_score(labelled, found, average="macro", zero_division=0.0))

    return {
        "f1": _f1((predicted & labels).sum(-1), predicted.sum(-1), labels.sum(-1)),
        "f1_macro": Samples(np.concatenate([labels, predicted], axis=-1), macro),
        "accuracy": mean((predicted == labels).all(-1)),
        "agreement": mean((predicted == uncompressed).mean(-1)),
    }


def correlation_metrics(scores: np.ndarray, targets: Sequence[float]) -> Metrics:
    """Compute `spearman`, the rank correlation of N scores with N targets, and `pearson`, the linear one.

    A correlation is undefined if all scores or all targets are equal.
    """
    from scipy.stats import rankdata

    values = np.stack([np.asarray(scores, np.float64), np.asarray(targets, np.float64)], axis=-1)
    return {
        "spearman": Samples(values, lambda rows: _correlation(rankdata(rows, axis=-2))),
        "pearson": Samples(values, _correlation),
    }


def similarity_metrics(first: np.ndarray, second: np.ndarray, targets: Sequence[float]) -> Metrics:
    """Compute `correlation_metrics` of the cosines of two arrays of embeddings (N, d)."""
    return correlation_metrics((_normalised(first) * _normalised(second)).sum(-1), targets)


def embedding_metrics(embeddings: np.ndarray, uncompressed: np.ndarray) -> Metrics:
    """Compute how far embeddings (N, d) moved from the uncompressed ones.

    Returns:
        `cosine`, the mean cosine to the uncompressed embedding of the same text; `cosine_p5`, the 5th
        percentile of these cosines; and `recall_at_10`, see `retrieval_recall`, left out for fewer than 11
        texts.
    """
    a, b = _normalised(embeddings), _normalised(uncompressed)
    cosines = mean((a * b).sum(-1))
    found = {"cosine": cosines, "cosine_p5": _fifth_percentile(cosines)}
    recall = retrieval_recall(a, b)
    return found if recall is None else {**found, "recall_at_10": mean(recall)}


def hidden_state_metrics(states: Sequence[np.ndarray], uncompressed: Sequence[np.ndarray]) -> Metrics:
    """Compute how far the hidden states of N texts, (tokens, d) each, moved from the uncompressed ones.

    Returns:
        `cosine`, the mean over a text's tokens of the cosine to the uncompressed vector; `cosine_p5`, the 5th
        percentile of the texts' cosines; and `relative_error`, the norm of a text's difference over the norm
        of its uncompressed states. Both means are over the texts.
    """
    cosines, errors = [], []
    for found, plain in zip(states, uncompressed, strict=True):
        cosines.append(float((_normalised(found) * _normalised(plain)).sum(-1).mean()))
        wide = plain.astype(np.float64)
        errors.append(float(np.linalg.norm(found - wide) / max(float(np.linalg.norm(wide)), 1e-12)))
    of_texts = mean(np.array(cosines))
    return {
        "cosine": of_texts,
        "cosine_p5": _fifth_percentile(of_texts),
        "relative_error": mean(np.array(errors)),
    }


def retrieval_recall(embeddings: np.ndarray, uncompressed: np.ndarray) -> np.ndarray | None:
    """Return the share of each text's 10 nearest neighbours that stay among its 10 nearest, (N,).

    Every text is a query against all others. Queries and index come from the same model. Both arrays are
    (N, d), with rows of norm 1. None if there are at most 10 texts.
    """
    count = len(embeddings)
    if count <= NEIGHBOURS:
        return None
    shared: list[float] = []
    for start in range(0, count, _QUERIES_AT_A_TIME):
        rows = slice(start, min(start + _QUERIES_AT_A_TIME, count))
        near = [_nearest(vectors, rows) for vectors in (embeddings, uncompressed)]
        shared += [len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(*near, strict=True)]
    return np.array(shared)


def entity_metrics(
    predicted: Sequence[Sequence[str]], uncompressed: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]
) -> Metrics:
    """Compute metrics of tagged words, from the tags of N texts.

    Returns:
        `f1`, `precision` and `recall` of entities, which count only with the right words and the right type,
        over all texts, as conlleval has them; `accuracy`, the share of words with the right tag; and
        `agreement`, the share of words with the uncompressed model's tag.
    """
    right, found, there = [], [], []
    same, agreeing, words = [], [], []
    for guess, plain, true in zip(predicted, uncompressed, tags, strict=True):
        spans, expected = entity_spans(guess), entity_spans(true)
        right.append(len(spans & expected))
        found.append(len(spans))
        there.append(len(expected))
        same.append(sum(a == b for a, b in zip(guess, true, strict=True)))
        agreeing.append(sum(a == b for a, b in zip(guess, plain, strict=True)))
        words.append(len(true))
    return {
        "f1": _f1(right, found, there),
        "precision": _share(right, found),
        "recall": _share(right, there),
        "accuracy": _share(same, words),
        "agreement": _share(agreeing, words),
    }


def entity_spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Find the entities in the tags of a text's words: type, first word, and the word after the last.

    Tags are O, or a position (B, I, E, L, S or U) and a type. An I or E without a beginning begins an entity,
    as in conlleval.
    """
    spans: set[tuple[str, int, int]] = set()
    kind, begin = "", 0
    for place, tag in enumerate([*tags, "O"]):
        position, _, name = tag.partition("-")
        if kind and (position in ("O", "B", "S", "U") or name != kind):
            spans.add((kind, begin, place))
            kind = ""
        if position != "O" and not kind:
            kind, begin = name, place
        if kind and position in ("E", "L", "S", "U"):
            spans.add((kind, begin, place + 1))
            kind = ""
    return spans


def answer_metrics(
    predicted: Sequence[str], uncompressed: Sequence[str], answers: Sequence[Sequence[str]]
) -> Metrics:
    """Compute the metrics of SQuAD, from N answers and the accepted answers to each question.

    Returns:
        `f1`, the overlap of words with the best accepted answer; `exact_match`; and `agreement`, the share of
        answers that are the uncompressed model's.
    """
    overlaps = [
        max(_overlap(guess, true) for true in accepted)
        for guess, accepted in zip(predicted, answers, strict=True)
    ]
    exact = [
        any(normalise_answer(guess) == normalise_answer(true) for true in accepted)
        for guess, accepted in zip(predicted, answers, strict=True)
    ]
    same = [a == b for a, b in zip(predicted, uncompressed, strict=True)]
    return {
        "f1": mean(np.array(overlaps)),
        "exact_match": mean(np.array(exact)),
        "agreement": mean(np.array(same)),
    }


def normalise_answer(text: str) -> str:
    """Reduce an answer to what SQuAD compares: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def text_metrics(
    predicted: Sequence[str], uncompressed: Sequence[str], references: Sequence[Sequence[str]]
) -> Metrics:
    """Compute metrics of N generated texts, each with one or several references.

    Returns:
        `rouge_l`, see there, with the best reference; `exact_match`, the share of texts that are a reference,
        spaces at the ends aside; and `agreement`, the share of texts that are the uncompressed model's.
    """
    pairs = list(zip(predicted, references, strict=True))
    return {
        "rouge_l": mean(
            np.array([max(rouge_l(text, true) for true in accepted) for text, accepted in pairs])
        ),
        "exact_match": mean(
            np.array([text in [true.strip() for true in accepted] for text, accepted in pairs])
        ),
        "agreement": mean(np.array([a == b for a, b in zip(predicted, uncompressed, strict=True)])),
    }


def rouge_l(text: str, reference: str) -> float:
    """Compute ROUGE-L: F1 of the words in the longest common subsequence (Lin 2004, over the whole text).

    Words are runs of letters and digits, in lower case. Without stemming this is what Google's `rouge_score`
    computes for ASCII text; there, other letters are no words. Two texts without words have 1.
    """
    found, expected = (_WORDS.findall(t.lower()) for t in (text, reference))
    if not found or not expected:
        return float(found == expected)
    # lengths[j]: of the longest common subsequence of the words so far and the reference's first j.
    lengths = [0] * (len(expected) + 1)
    for word in found:
        before = 0
        for j, other in enumerate(expected, start=1):
            here = lengths[j]
            lengths[j] = before + 1 if word == other else max(here, lengths[j - 1])
            before = here
    return 2 * lengths[-1] / (len(found) + len(expected))


def masked_token_metrics(tokens: Sequence[np.ndarray], uncompressed: Sequence[np.ndarray]) -> Metrics:
    """Compute metrics of predicted masked tokens.

    Args:
        tokens: Of each of N texts, a row for each mask: the true token's id, the most probable one's, and the
            natural logarithm of the true one's probability.
        uncompressed: The same of the uncompressed model.

    Returns:
        `accuracy`, `perplexity` and `agreement`, over all masks.
    """
    counts = np.array([len(rows) for rows in tokens])
    right = np.array([(rows[:, 0] == rows[:, 1]).sum() for rows in tokens])
    same = [(a[:, 1] == b[:, 1]).sum() for a, b in zip(tokens, uncompressed, strict=True)]
    logarithms = np.array([rows[:, 2].sum() for rows in tokens])
    return {
        "accuracy": _share(right, counts),
        "perplexity": Samples(
            np.stack([logarithms, counts], axis=-1),
            lambda rows: np.exp(-rows[..., 0].sum(-1) / rows[..., 1].sum(-1)),
        ),
        "agreement": _share(same, counts),
    }


def relative_loss(metrics: Mapping[str, Any], uncompressed: Mapping[str, Any], name: str) -> float | None:
    """Return the lost share of a metric. None if either value is missing or the uncompressed one is 0."""
    whole, left = uncompressed.get(name), metrics.get(name)
    return None if not whole or left is None else 1 - float(left) / float(whole)


def _correlation(rows: np.ndarray) -> np.ndarray:
    """Pearson's correlation of two columns, (..., N, 2). NaN if a column is constant."""
    centred = rows - rows.mean(-2, keepdims=True)
    products = np.einsum("...ni,...nj->...ij", centred, centred)
    scale = np.sqrt(products[..., 0, 0] * products[..., 1, 1])
    constant = (np.ptp(rows, axis=-2) == 0).any(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = np.where(constant, np.nan, products[..., 0, 1] / scale)
    return found


def _f1(right: Any, found: Any, there: Any) -> Samples:
    """F1 over all examples, from counts of each example (N,). 0 if there is nothing to find."""

    def f1(rows: np.ndarray) -> np.ndarray:
        hits, guessed, true = np.moveaxis(rows.sum(-2), -1, 0)
        score: np.ndarray = 2 * hits / np.maximum(guessed + true, 1)
        return score

    return Samples(np.stack([right, found, there], axis=-1).astype(np.float64), f1)


def _share(part: Any, whole: Any) -> Samples:
    """The share of counts over all examples, from counts of each example (N,). 0 of 0 is 0."""
    return Samples(
        np.stack([part, whole], axis=-1).astype(np.float64),
        lambda rows: rows[..., 0].sum(-1) / np.maximum(rows[..., 1].sum(-1), 1),
    )


def _fifth_percentile(samples: Samples) -> Samples:
    return Samples(samples.values, lambda rows: np.percentile(rows[..., 0], 5, axis=-1))


def _overlap(guess: str, true: str) -> float:
    """F1 of the words of two answers; of two empty ones 1."""
    found, expected = normalise_answer(guess).split(), normalise_answer(true).split()
    if not found or not expected:
        return float(found == expected)
    shared = sum(min(found.count(word), expected.count(word)) for word in set(found))
    return 2 * shared / (len(found) + len(expected))


def _nearest(vectors: np.ndarray, rows: slice) -> list[list[int]]:
    similar = vectors[rows] @ vectors.T
    similar[np.arange(similar.shape[0]), np.arange(rows.start, rows.stop)] = -np.inf  # itself
    return np.argpartition(-similar, NEIGHBOURS - 1, axis=-1)[:, :NEIGHBOURS].tolist()


def _normalised(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
