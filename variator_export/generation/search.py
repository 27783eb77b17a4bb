"""Greedy search, sampling and beam search over a decoder that is called once for each token.

Arrays: tokens int64; scores float32; B inputs, n beams, V vocabulary, L tokens at most with the start token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from variator_export.core.errors import UserError
from variator_export.generation.rules import Rules, Tokens, log_softmax
from variator_export.generation.sampling import Sampler, best
from variator_export.generation.settings import GenerationSettings

# The score of what must not be chosen, as in transformers: low, but finite, so that sums stay comparable.
_NEVER = np.float32(-1e9)


class StepDecoder(Protocol):
    """A decoder with its cache, for a number of rows."""

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Take the next token of each row, int64 (rows,); returns scores, float32 (rows, V)."""
        ...

    def select(self, rows: np.ndarray) -> None:
        """Continue with these rows, int64 (rows,). Each row stays within its input's."""
        ...


@dataclass(frozen=True)
class Sequences:
    """Generated sequences.

    Attributes:
        tokens: For each input, its sequences, best first: int64 (tokens,), with the end token if any.
        scores: For each input, the scores of its sequences; empty without beams.
    """

    tokens: tuple[tuple[np.ndarray, ...], ...]
    scores: tuple[tuple[float, ...], ...]


def rows_per_input(settings: GenerationSettings) -> int:
    """The number of rows that a decoder needs for each input."""
    return settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences


def generate(decoder: StepDecoder, sources: Sequence[Tokens], settings: GenerationSettings) -> Sequences:
    """Generate sequences.

    Args:
        decoder: A decoder at its start, with `rows_per_input` neighbouring rows for each input.
        sources: The tokens of each input.
        settings: The settings.

    Raises:
        UserError: The decoder returned values that are not numbers.
    """
    if settings.num_beams > 1:
        return _beam_search(decoder, sources, settings)
    steps = np.stack(list(stream(decoder, sources, settings)), axis=1)
    count = settings.num_return_sequences
    rows = [_until_end(row, settings) for row in steps]
    return Sequences(
        tuple(tuple(rows[i : i + count]) for i in range(0, len(rows), count)), tuple(() for _ in sources)
    )


def stream(
    decoder: StepDecoder, sources: Sequence[Tokens], settings: GenerationSettings
) -> Iterator[np.ndarray]:
    """Generate tokens one after the other, by greedy search or sampling.

    Yields:
        The next token of each row, int64 (rows,), and `pad_token_id` for rows that ended.

    Raises:
        UserError: The settings ask for beams, or the decoder returned values that are not numbers.
    """
    if settings.num_beams > 1:
        raise UserError(
            "Beam search has no tokens to stream: it knows its best sequence only at the end.",
            "Use num_beams=1, or generate without streaming.",
        )
    return _steps(decoder, sources, settings)


def _steps(
    decoder: StepDecoder, sources: Sequence[Tokens], settings: GenerationSettings
) -> Iterator[np.ndarray]:
    copies = rows_per_input(settings)
    rules = Rules(settings, [source for source in sources for _ in range(copies)])
    sampler = Sampler(settings) if settings.do_sample else None
    tokens = np.full((len(sources) * copies, 1), settings.decoder_start_token_id, np.int64)
    running = np.ones(len(tokens), bool)
    for _ in range(settings.max_new_tokens):
        scores = rules.apply(tokens, _checked(decoder.step(tokens[:, -1])))
        chosen = scores.argmax(axis=-1) if sampler is None else sampler.draw(sampler.narrow(scores))[:, 0]
        following = np.where(running, chosen, settings.pad_token_id)
        yield following
        running &= ~np.isin(following, settings.eos_token_id)
        if not running.any():
            return
        tokens = np.concatenate([tokens, following[:, None]], axis=1)


def _until_end(row: np.ndarray, settings: GenerationSettings) -> np.ndarray:
    """The tokens of a row up to its end token."""
    ends = np.flatnonzero(np.isin(row, settings.eos_token_id))
    return row[: ends[0] + 1] if len(ends) else row


class _Beams:
    """B x n sequences with their scores, best first.

    Attributes:
        tokens: (B, n, L).
        scores: (B, n).
        lengths: The number of new tokens of each sequence, (B, n).
    """

    def __init__(self, tokens: np.ndarray, scores: np.ndarray, lengths: np.ndarray) -> None:
        self.tokens, self.scores, self.lengths = tokens, scores, lengths

    def take(self, chosen: np.ndarray) -> "_Beams":
        """Some of the sequences of each input, by their index (B, m)."""
        rows = np.arange(len(chosen))[:, None]
        return _Beams(self.tokens[rows, chosen], self.scores[rows, chosen], self.lengths[rows, chosen])

    def with_scores(self, scores: np.ndarray) -> "_Beams":
        """The same sequences with other scores."""
        return _Beams(self.tokens, scores, self.lengths)

    def joined(self, other: "_Beams") -> "_Beams":
        """These sequences and those of another set."""
        pairs = ((self.tokens, other.tokens), (self.scores, other.scores), (self.lengths, other.lengths))
        return _Beams(*(np.concatenate(pair, axis=1) for pair in pairs))


def _beam_search(decoder: StepDecoder, sources: Sequence[Tokens], settings: GenerationSettings) -> Sequences:
    """Beam search with the stopping rules of transformers 5.

    Each step takes more candidates than there are beams, so that enough are left to continue when the best of
    them end. A finished sequence competes with its log probability over its length to the power of
    `length_penalty`, and with the finished ones before it only.
    """
    inputs, beams, longest = len(sources), settings.num_beams, settings.max_new_tokens
    penalty, eager = settings.length_penalty, settings.early_stopping is True
    kept = max(2, 1 + len(settings.eos_token_id)) * beams
    rules = Rules(settings, [source for source in sources for _ in range(beams)])
    sampler = Sampler(settings) if settings.do_sample else None
    tokens = np.full((inputs, beams, 1 + longest), settings.pad_token_id, np.int64)
    tokens[:, :, 0] = settings.decoder_start_token_id
    none = np.zeros((inputs, beams), np.int64)
    # Only the first beam counts at first: the others would have the same tokens.
    first = np.where(np.arange(beams) == 0, np.float32(0), _NEVER)
    running = _Beams(tokens, np.tile(first, (inputs, 1)), none)
    finished = _Beams(tokens, np.full((inputs, beams), _NEVER), none)
    is_finished = np.zeros((inputs, beams), bool)
    can_improve = np.ones((inputs, 1), bool)
    offsets = np.arange(inputs)[:, None] * beams
    for length in range(1, longest + 1):
        so_far = running.tokens[:, :, :length].reshape(inputs * beams, length)
        scores = rules.apply(so_far, log_softmax(_checked(decoder.step(so_far[:, -1]))))
        if sampler is not None:
            scores = sampler.narrow(scores)
        vocabulary = scores.shape[-1]
        totals = (scores.reshape(inputs, beams, vocabulary) + running.scores[:, :, None]).reshape(inputs, -1)
        found = best(totals, kept) if sampler is None else sampler.draw(totals, kept)
        parents, following = np.divmod(found, vocabulary)
        candidates = running.take(parents).with_scores(np.take_along_axis(totals, found, axis=1))
        candidates.tokens[:, :, length] = following
        candidates.lengths[:] = length
        ended = np.isin(following, settings.eos_token_id) | (length == longest)

        still = candidates.with_scores(candidates.scores + _unless(~ended))
        chosen = best(still.scores, beams)
        running = still.take(chosen)

        # Only the best candidates may finish: the others are there to be continued.
        finishes = ended & (np.arange(kept) < beams)
        closed = is_finished.all(axis=1, keepdims=True) & eager
        final = candidates.scores / np.float32(length**penalty)
        for allowed in (~closed, can_improve, finishes):
            final = final + _unless(allowed)
        merged = finished.joined(candidates.with_scores(final))
        ranks = best(merged.scores, beams)
        finished = merged.take(ranks)
        is_finished = np.take_along_axis(np.concatenate([is_finished, finishes], axis=1), ranks, axis=1)

        reached = longest if settings.early_stopping == "never" and penalty > 0 else length
        possible = running.scores[:, :1] / np.float32(reached**penalty)
        worst = np.where(is_finished, finished.scores.min(axis=1, keepdims=True), _NEVER)
        can_improve &= (possible > worst).any(axis=1, keepdims=True)
        if not can_improve.any() or (eager and is_finished.all()) or ended.all():
            break
        decoder.select((np.take_along_axis(parents, chosen, axis=1) + offsets).reshape(-1))
    count = settings.num_return_sequences
    return Sequences(
        tuple(
            tuple(row[1 : 1 + size] for row, size in zip(rows[:count], sizes[:count], strict=True))
            for rows, sizes in zip(finished.tokens, finished.lengths, strict=True)
        ),
        tuple(tuple(map(float, row[:count])) for row in finished.scores),
    )


def _unless(allowed: Any) -> np.ndarray:
    """What to add to scores: nothing where they are allowed."""
    return np.where(allowed, np.float32(0), _NEVER)


def _checked(scores: np.ndarray) -> np.ndarray:
    """Refuse scores that are not numbers, from which any token could follow."""
    if np.isnan(scores.max()):
        raise UserError(
            "The decoder returned values that are not numbers (NaN).",
            "The model overflows in this precision: build it with --precision bfloat16 or float32.",
        )
    return scores
