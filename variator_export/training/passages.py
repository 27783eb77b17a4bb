"""Passages cut from text, on which plugins are pre-trained.

A passage starts at a sentence. Its length is drawn anew for each batch, so that plugins are trained on both
the short and the long texts that they will be used on. Passage i of a run depends only on the seed and i. A
run that is resumed or distributed over processes therefore sees the same passages as an uninterrupted run.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from variator_export.core.errors import UserError
from variator_export.data.texts import TextSource
from variator_export.text.tokenizer import TextEncoder, TokenRow
from variator_export.training.batches import Item
from variator_export.training.settings import PassageSettings

# The mean length of a span that is left out, as in T5's own training.
_SPAN = 3
# A match ends where a sentence starts. It covers the end of the previous sentence, including closing quotes
# and brackets, or an empty line.
_BOUNDARY = re.compile(r"[.!?;:][\"'”’)\]]*\s+|\n\s*\n\s*")


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as token ids, without special tokens.

    Attributes:
        ids: int32 (number of tokens,).
        starts: Indices of the tokens at which sentences start, ascending.
    """

    ids: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Documents whose passages are drawn together.

    Attributes:
        documents: At least one document.
        share: Share of the batches that are drawn from the pool; None for the share that the other pools
            leave.
    """

    documents: tuple[TokenizedDocument, ...]
    share: float | None


def tokenize_documents(
    sources: Sequence[TextSource], encoder: TextEncoder, settings: PassageSettings
) -> tuple[list[Pool], list[Pool]]:
    """Tokenize documents and hold some of the text out.

    A source with many documents has whole documents held out, at regular intervals. A source with few
    documents has the end of each document held out.

    Returns:
        The pools to train on, and the held-out pools. Sources without a share form one pool.

    Raises:
        UserError: The text is shorter than one passage of the greatest length, or too short to hold any out.
    """
    train: dict[int | None, list[TokenizedDocument]] = {}
    held_out: dict[int | None, list[TokenizedDocument]] = {}
    shares: dict[int | None, float | None] = {}
    for source in sources:
        pool = None if source.share is None else source.group
        shares[pool] = source.share
        first, last = _hold_out(source, encoder, settings.held_out)
        train.setdefault(pool, []).extend(first)
        held_out.setdefault(pool, []).extend(last)
    total = sum(len(document.ids) for pool in train.values() for document in pool)
    if total < settings.max_tokens:
        raise UserError(
            f"The text has {total} tokens to train on; a single passage may have {settings.max_tokens}.",
            "Give more text, or shorter passages: --max-tokens",
        )
    if not all(held_out.values()):
        raise UserError(
            "No document is long enough to hold out its end for evaluating the loss.",
            "Give longer documents (several sentences each), more of them, or hold out more: --held-out 0.2",
        )
    return _pools(train, shares), _pools(held_out, shares)


def _pools(
    documents: dict[int | None, list[TokenizedDocument]], shares: dict[int | None, float | None]
) -> list[Pool]:
    return [Pool(tuple(found), shares[pool]) for pool, found in documents.items()]


def _hold_out(
    source: TextSource, encoder: TextEncoder, share: float
) -> tuple[list[TokenizedDocument], list[TokenizedDocument]]:
    """Divide one source into the documents to train on and the held-out documents."""
    found = [
        _document(text, *tokens)
        for text, tokens in zip(source.documents, encoder.encode_plain(source.documents), strict=True)
        if tokens[0]
    ]
    step = max(2, round(1 / share))
    if len(found) >= 2 * step:
        kept = [document for index, document in enumerate(found) if index % step]
        return kept, found[::step]
    train, held_out = [], []
    for document in found:
        cut = int(len(document.starts) * (1 - share))
        if 0 < cut < len(document.starts):
            first, last = _divide(document, cut)
            train.append(first)
            held_out.append(last)
        else:
            train.append(document)
    return train, held_out


def _document(text: str, ids: Sequence[int], places: Sequence[int]) -> TokenizedDocument:
    """Build a document from its tokens. A sentence starts at the first token after a boundary."""
    boundaries = [0, *(match.end() for match in _BOUNDARY.finditer(text))]
    starts = np.unique(np.searchsorted(np.array(places), boundaries, side="left"))
    return TokenizedDocument(np.array(ids, np.int32), starts[starts < len(ids)].astype(np.int64))


def _divide(document: TokenizedDocument, sentence: int) -> tuple[TokenizedDocument, TokenizedDocument]:
    cut = int(document.starts[sentence])
    return (
        TokenizedDocument(document.ids[:cut], document.starts[:sentence]),
        TokenizedDocument(document.ids[cut:], document.starts[sentence:] - cut),
    )


def corrupt(
    ids: np.ndarray, sentinels: Sequence[int], share: float, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Leave out spans of a passage, as T5's own training does (arXiv 1910.10683, 3.1.4).

    Args:
        ids: Token ids of the passage, without special tokens.
        sentinels: The token that stands for the first span, for the second, and so on.
        share: The share of tokens to leave out, in spans of three tokens on average.
        rng: The random generator.

    Returns:
        The passage with a sentinel in place of each span; and the spans, each after its sentinel, with one
        more sentinel at the end.
    """
    count = min(max(round(len(ids) * share), 1), len(ids) - 1)
    if count < 1:  # a passage of one token has nothing to leave out
        return ids.tolist(), [sentinels[0]]
    spans = min(max(round(count / _SPAN), 1), len(sentinels) - 1, len(ids) - count)
    source, target, at = [], [], 0
    lengths = zip(_parts(len(ids) - count, spans, rng), _parts(count, spans, rng), strict=True)
    for sentinel, (kept, left_out) in zip(sentinels, lengths, strict=False):
        source += [*ids[at : at + kept].tolist(), sentinel]
        target += [sentinel, *ids[at + kept : at + kept + left_out].tolist()]
        at += kept + left_out
    return source, [*target, sentinels[spans]]


def _parts(total: int, count: int, rng: np.random.Generator) -> list[int]:
    """Divide a number into positive parts, each division as likely as any other."""
    cuts = (np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1).tolist() if count > 1 else []
    return [int(part) for part in np.diff([0, *cuts, total])]


class _Drawer:
    """Draws passages from the documents of one pool. Every sentence is equally likely to start a passage."""

    def __init__(self, pool: Pool) -> None:
        self._ids = [document.ids for document in pool.documents]
        counts = [len(document.starts) for document in pool.documents]
        self._document = np.repeat(np.arange(len(counts)), counts)
        self._start = np.concatenate([document.starts for document in pool.documents])

    def draw(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Draw a passage of at most `length` token ids."""
        sentence = int(rng.integers(len(self._start)))
        start = int(self._start[sentence])
        return self._ids[self._document[sentence]][start : start + length]


class Passages:
    """A map-style data set of passages, drawn with replacement.

    The items are token rows with their targets: None, or with `settings.corruption` the tokens that were left
    out.

    Args:
        pools: The text. Each batch is drawn from one pool.
        encoder: The tokenizer, which also provides the special tokens around a passage.
        settings: Length and noise of passages.
        batch_size: Passages in a batch. All of them have the same length.
        num_batches: Number of batches.
        seed: Seed of the random choices.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        encoder: TextEncoder,
        settings: PassageSettings,
        *,
        batch_size: int,
        num_batches: int,
        seed: int,
    ) -> None:
        self._drawers = [_Drawer(pool) for pool in pools]
        left = 1 - sum(pool.share or 0 for pool in pools)
        self._shares = np.cumsum([left if pool.share is None else pool.share for pool in pools])
        self._before, self._after = encoder.special_tokens_around_text()
        self._vocabulary = encoder.word_ids()
        self._sentinels = encoder.sentinel_ids() if settings.corruption else []
        self._settings = settings
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._seed = seed

    def __len__(self) -> int:
        return self._batch_size * self._num_batches

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Item:
        """Return passage `index`, with special tokens around it, and its target."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        length, drawer = self._batch(index // self._batch_size)
        rng = np.random.default_rng([self._seed, 1, index])
        ids = drawer.draw(rng, max(1, length - len(self._before) - len(self._after)))
        if self._settings.noise:
            share = rng.uniform(0, 2 * self._settings.noise)
            strangers = self._vocabulary[rng.integers(len(self._vocabulary), size=len(ids))]
            ids = np.where(rng.random(len(ids)) < share, strangers, ids)
        tokens, target = cast(list[int], ids.tolist()), None
        if self._sentinels:
            tokens, left_out = corrupt(ids, self._sentinels, self._settings.corruption, rng)
            target = [*self._before, *left_out, *self._after]
        whole = [*self._before, *tokens, *self._after]
        return TokenRow(whole, [0] * len(whole)), target

    def _batch(self, batch: int) -> tuple[int, _Drawer]:
        """Draw the number of tokens of the passages in a batch, and the pool that they come from.

        The length is drawn log-uniformly, so that short passages are as frequent as long ones.
        """
        low, high = self._settings.min_tokens, self._settings.max_tokens
        rng = np.random.default_rng([self._seed, 0, batch])
        length = round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))
        pool = min(int(np.searchsorted(self._shares, rng.random(), side="right")), len(self._drawers) - 1)
        return length, self._drawers[pool]


def describe_texts(sources: Sequence[TextSource]) -> list[dict[str, Any]]:
    """Describe the texts that were read, for `plugin_config.json`."""
    return [
        {
            "name": source.name,
            "sha256": source.sha256,
            "share": source.share,
            "documents": len(source.documents),
            "characters": source.num_characters,
        }
        for source in sources
    ]
