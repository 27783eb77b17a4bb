"""Metrics of a model's outputs at each ratio, against its outputs without plugins and against the labels.

Shapes: N examples or texts, C classes, d hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Number of nearest neighbours that `retrieval_recall` compares.
NEIGHBOURS = 10
_QUERIES_AT_A_TIME = 1024


def classification_metrics(
    logits: np.ndarray, uncompressed: np.ndarray, labels: Sequence[int]
) -> dict[str, float]:
    """Compute accuracy, F1 and agreement with the uncompressed model.

    Args:
        logits: Logits of the variant, (N, C).
        uncompressed: Logits of the model without plugins, (N, C).
        labels: Class indices, (N,).

    Returns:
        `accuracy`; `f1`, of class 1 for two classes and otherwise the mean over the classes; and `agreement`,
        the share of examples with the same arg-max.
    """
    from sklearn.metrics import accuracy_score, f1_score

    found = logits.argmax(-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, found)),
        "f1": float(f1_score(labels, found, average=average, zero_division=0.0)),
        "agreement": float(np.mean(found == uncompressed.argmax(-1))),
    }


def embedding_metrics(embeddings: np.ndarray, uncompressed: np.ndarray) -> dict[str, float | None]:
    """Compute how far embeddings (N, d) moved from the uncompressed ones.

    Returns:
        `cosine`, the mean cosine to the uncompressed embedding of the same text; `cosine_p5`, the 5th
        percentile of these cosines; and `recall_at_10`, see `retrieval_recall`, None for fewer than 11 texts.
    """
    a, b = _normalised(embeddings), _normalised(uncompressed)
    cosines = (a * b).sum(-1)
    return {
        "cosine": float(cosines.mean()),
        "cosine_p5": float(np.percentile(cosines, 5)),
        "recall_at_10": retrieval_recall(a, b),
    }


def similarity_metrics(
    first: np.ndarray, second: np.ndarray, scores: Sequence[float]
) -> dict[str, float | None]:
    """Compute Spearman's rank correlation of the cosines of two arrays (N, d) with N scores.

    The correlation is None if all cosines are equal.
    """
    from scipy.stats import spearmanr

    cosines = (_normalised(first) * _normalised(second)).sum(-1)
    if np.ptp(cosines) == 0:
        return {"spearman": None}
    return {"spearman": float(spearmanr(cosines, scores).statistic)}


def retrieval_recall(embeddings: np.ndarray, uncompressed: np.ndarray) -> float | None:
    """Return the mean share of a text's 10 nearest neighbours that stay among its 10 nearest.

    Every text is a query against all others. Queries and index come from the same model. Both arrays are
    (N, d), with rows of norm 1. None if there are at most 10 texts.
    """
    count = len(embeddings)
    if count <= NEIGHBOURS:
        return None
    shared = 0
    for start in range(0, count, _QUERIES_AT_A_TIME):
        rows = slice(start, min(start + _QUERIES_AT_A_TIME, count))
        near = [_nearest(vectors, rows) for vectors in (embeddings, uncompressed)]
        shared += sum(len(set(a) & set(b)) for a, b in zip(*near, strict=True))
    return shared / (count * NEIGHBOURS)


def relative_loss(metrics: Mapping[str, Any], uncompressed: Mapping[str, Any], name: str) -> float | None:
    """Return the lost share of a metric. None if either value is missing or the uncompressed one is 0."""
    whole, left = uncompressed.get(name), metrics.get(name)
    return None if not whole or left is None else 1 - float(left) / float(whole)


def _nearest(vectors: np.ndarray, rows: slice) -> list[list[int]]:
    similar = vectors[rows] @ vectors.T
    similar[np.arange(similar.shape[0]), np.arange(rows.start, rows.stop)] = -np.inf  # itself
    return np.argpartition(-similar, NEIGHBOURS - 1, axis=-1)[:, :NEIGHBOURS].tolist()


def _normalised(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
