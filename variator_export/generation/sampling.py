"""Drawing the next token.

Arrays: scores float32 (rows, vocabulary), of which -inf is never drawn.
"""

import numpy as np

from variator_export.generation.rules import log_softmax
from variator_export.generation.settings import GenerationSettings

# Scores whose best one is looked at first.
_BLOCK = 64


class Sampler:
    """The draws of one call.

    Args:
        settings: The settings.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)
        # Beams that all ended could not be continued.
        self._least = 1 if settings.num_beams == 1 else len(settings.eos_token_id) + 1

    def narrow(self, scores: np.ndarray) -> np.ndarray:
        """Scores of the tokens to draw from, and -inf for the others.

        Temperature first, then top-k, top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082).
        """
        settings = self._settings
        scores = scores / np.float32(settings.temperature) if settings.temperature != 1 else scores.copy()
        size = scores.shape[-1]
        if settings.top_k:
            kept = min(max(settings.top_k, self._least), size)
            scores[scores < np.partition(scores, size - kept, axis=-1)[:, size - kept, None]] = -np.inf
        if settings.top_p < 1:
            order = np.argsort(scores, axis=-1, kind="stable")
            below = np.cumsum(np.exp(log_softmax(np.take_along_axis(scores, order, axis=-1))), axis=-1)
            removed = below <= np.float32(1 - settings.top_p)
            removed[:, size - self._least :] = False
            mask = np.empty_like(removed)
            np.put_along_axis(mask, order, removed, axis=-1)
            scores[mask] = -np.inf
        if settings.min_p is not None:
            highest = scores.max(axis=-1, keepdims=True)
            removed = np.exp(scores - highest) < np.float32(settings.min_p)
            np.put_along_axis(removed, best(scores, self._least), values=False, axis=-1)
            scores[removed] = -np.inf
        return scores

    def draw(self, scores: np.ndarray, count: int = 1) -> np.ndarray:
        """Draw tokens without replacement, by the softmax of their scores.

        Returns:
            int64 (rows, count), in the order of the draws.
        """
        # The best of scores with Gumbel noise are distributed like successive draws (arXiv 1903.06059).
        return best(scores + self._random.gumbel(size=scores.shape).astype(np.float32), count)


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of each row's best scores, best first, int64 (rows, count)."""
    if count == 1:
        return scores.argmax(axis=-1, keepdims=True)
    return np.stack([_best(row, min(count, len(row))) for row in scores])


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of the best scores of one row.

    The best scores of blocks bound the scores to look at, which is six times faster than a partition of
    128,000 scores.
    """
    candidates = np.arange(len(scores))
    blocks = len(scores) // _BLOCK
    if blocks > count:
        tops = scores[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=-1)
        candidates = np.flatnonzero(scores >= np.partition(tops, blocks - count)[blocks - count])
    found = candidates[
        np.argpartition(scores[candidates], len(candidates) - count)[len(candidates) - count :]
    ]
    return np.asarray(found[np.argsort(-scores[found], kind="stable")])
