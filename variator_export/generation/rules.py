"""Rules that change the scores of the next token, in the order in which transformers applies them.

Arrays: tokens int64 (rows, tokens so far, the start token included); scores float32 (rows, vocabulary).
"""

from collections.abc import Sequence

import numpy as np

from variator_export.generation.settings import GenerationSettings

# The tokens of one input.
Tokens = Sequence[int] | np.ndarray
_LOWEST = np.float32(-np.inf)


class Rules:
    """The rules of one call.

    Args:
        settings: The settings.
        sources: The input tokens of each row, for `encoder_no_repeat_ngram_size`.
    """

    def __init__(self, settings: GenerationSettings, sources: Sequence[Tokens]) -> None:
        self._settings = settings
        self._eos = list(settings.eos_token_id)
        self._sources = [np.asarray(source, np.int64) for source in sources]
        self._bad = [
            word for word in settings.bad_words_ids if word and word not in [(e,) for e in self._eos]
        ]
        # A forced first token makes the second one the first that can be chosen.
        self._begin = 1 if settings.forced_bos_token_id is None else 2
        self._change = any(
            (
                settings.repetition_penalty != 1,
                settings.no_repeat_ngram_size,
                settings.encoder_no_repeat_ngram_size,
                self._bad,
                settings.min_new_tokens and self._eos,
                settings.forced_bos_token_id is not None,
                settings.forced_eos_token_id,
                settings.suppress_tokens,
                settings.begin_suppress_tokens,
                settings.renormalize_logits,
            )
        )

    def apply(self, tokens: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """The scores after the rules; the given ones are not changed."""
        if not self._change:
            return scores
        settings, length = self._settings, tokens.shape[1]
        scores = scores.copy()
        if settings.repetition_penalty != 1:
            _penalise(tokens, scores, np.float32(settings.repetition_penalty))
        if settings.no_repeat_ngram_size:
            _ban_repeated(tokens, tokens, scores, settings.no_repeat_ngram_size)
        if settings.encoder_no_repeat_ngram_size:
            _ban_repeated(self._sources, tokens, scores, settings.encoder_no_repeat_ngram_size)
        for *start, last in self._bad:
            if len(start) <= length:
                scores[(tokens[:, length - len(start) :] == start).all(axis=1), last] = _LOWEST
        if length - 1 < settings.min_new_tokens:
            scores[:, self._eos] = _LOWEST
        if settings.forced_bos_token_id is not None and length == 1:
            _force(scores, [settings.forced_bos_token_id])
        if settings.forced_eos_token_id and length == settings.max_new_tokens:
            _force(scores, settings.forced_eos_token_id)
        scores[:, list(settings.suppress_tokens)] = _LOWEST
        if length == self._begin:
            scores[:, list(settings.begin_suppress_tokens)] = _LOWEST
        return log_softmax(scores) if settings.renormalize_logits else scores


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log probabilities of each row, float32."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _penalise(tokens: np.ndarray, scores: np.ndarray, penalty: np.float32) -> None:
    """Make the scores of tokens that occurred worse (arXiv 1909.05858)."""
    there = np.take_along_axis(scores, tokens, axis=1)
    np.put_along_axis(scores, tokens, np.where(there < 0, there * penalty, there / penalty), axis=1)


def _ban_repeated(
    sources: np.ndarray | Sequence[np.ndarray], tokens: np.ndarray, scores: np.ndarray, size: int
) -> None:
    """Ban tokens that would complete an n-gram of a row's source."""
    if tokens.shape[1] < size - 1:
        return
    for row, source in enumerate(sources):
        if len(source) < size:
            continue
        grams = np.lib.stride_tricks.sliding_window_view(source, size)
        begun = tokens[row, tokens.shape[1] - (size - 1) :]
        scores[row, grams[(grams[:, :-1] == begun).all(axis=1), -1]] = _LOWEST


def _force(scores: np.ndarray, allowed: Sequence[int]) -> None:
    scores[:] = _LOWEST
    scores[:, list(allowed)] = 0
