"""Text cut into passages: what plugins are pre-trained on.

A passage starts at a sentence and has a length drawn anew for each batch, so that plugins meet the short
texts and the long ones that they will be used on. Passage i of a run is a function of the seed and i alone:
a run that is resumed, or spread over processes, sees what an unbroken one sees.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from variator_export.core.errors import UserError
from variator_export.data.texts import TextSource
from variator_export.model.tokenizer import TextEncoder, TokenRow
from variator_export.training.settings import PassageSettings

# After the end of a sentence, with what closes a quotation; also a heading or a paragraph.
_BOUNDARY = re.compile(r"(?<=[.!?;:])[\"'”’)\]]*\s+|\s*\n\s*\n\s*")
_SENTENCES_AT_A_TIME = 4096


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as token ids, without special tokens.

    Attributes:
        ids: int32 (number of tokens,).
        starts: Where its sentences start, ascending.
    """

    ids: np.ndarray
    starts: np.ndarray


def tokenize_documents(
    sources: Sequence[TextSource], encoder: TextEncoder, settings: PassageSettings
) -> tuple[list[TokenizedDocument], list[TokenizedDocument]]:
    """Tokenize documents; the end of each is held out.

    Returns:
        What to train on, and what is held out. Documents too short to be divided are only trained on.

    Raises:
        UserError: There is less text than one of the longest passages.
    """
    train, held_out = [], []
    for source in sources:
        for document in source.documents:
            whole = _tokenize(document, encoder)
            if whole is None:
                continue
            cut = int(len(whole.starts) * (1 - settings.held_out))
            if 0 < cut < len(whole.starts):
                first, last = _divide(whole, cut)
                train.append(first)
                held_out.append(last)
            else:
                train.append(whole)
    total = sum(len(document.ids) for document in train)
    if total < settings.max_tokens:
        raise UserError(
            f"The text has {total} tokens to train on; one passage alone may have {settings.max_tokens}.",
            "Give more text, or shorter passages: --max-tokens",
        )
    if not held_out:
        raise UserError(
            "No document is long enough to hold out its end, on which the loss is looked at.",
            "Give longer documents (several sentences each), or hold out more: --held-out 0.2",
        )
    return train, held_out


def _tokenize(document: str, encoder: TextEncoder) -> TokenizedDocument | None:
    sentences = [s for s in _BOUNDARY.split(document) if s and not s.isspace()]
    ids: list[int] = []
    starts: list[int] = []
    for block in range(0, len(sentences), _SENTENCES_AT_A_TIME):
        for sentence in encoder.plain_ids(sentences[block : block + _SENTENCES_AT_A_TIME]):
            if sentence:
                starts.append(len(ids))
                ids.extend(sentence)
    return TokenizedDocument(np.array(ids, np.int32), np.array(starts, np.int64)) if ids else None


def _divide(document: TokenizedDocument, sentence: int) -> tuple[TokenizedDocument, TokenizedDocument]:
    cut = int(document.starts[sentence])
    return (
        TokenizedDocument(document.ids[:cut], document.starts[:sentence]),
        TokenizedDocument(document.ids[cut:], document.starts[sentence:] - cut),
    )


class Passages:
    """A map-style data set of passages, drawn with replacement.

    Args:
        documents: The text.
        encoder: Its tokenizer, for the special tokens around a passage.
        settings: Length and noise of passages.
        batch_size: Passages that share a length.
        num_batches: How many batches there are.
        seed: Of the choice.
    """

    def __init__(
        self,
        documents: Sequence[TokenizedDocument],
        encoder: TextEncoder,
        settings: PassageSettings,
        *,
        batch_size: int,
        num_batches: int,
        seed: int,
    ) -> None:
        self._ids = [document.ids for document in documents]
        # Every sentence is equally likely to start a passage.
        self._document = np.repeat(np.arange(len(documents)), [len(d.starts) for d in documents])
        self._start = np.concatenate([document.starts for document in documents])
        self._before, self._after = encoder.frame()
        self._vocabulary = encoder.word_ids()
        self._settings = settings
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._seed = seed

    def __len__(self) -> int:
        return self._batch_size * self._num_batches

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> TokenRow:
        """Passage `index`, special tokens around it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng([self._seed, 1, index])
        room = max(1, self._length(index // self._batch_size) - len(self._before) - len(self._after))
        sentence = int(rng.integers(len(self._start)))
        start = int(self._start[sentence])
        ids = self._ids[self._document[sentence]][start : start + room]
        if self._settings.noise:
            share = rng.uniform(0, 2 * self._settings.noise)
            strangers = self._vocabulary[rng.integers(len(self._vocabulary), size=len(ids))]
            ids = np.where(rng.random(len(ids)) < share, strangers, ids)
        whole = [*self._before, *cast(list[int], ids.tolist()), *self._after]
        return TokenRow(whole, [0] * len(whole))

    def _length(self, batch: int) -> int:
        """Tokens of the passages of one batch: log-uniform, so that short ones are as frequent as long."""
        low, high = self._settings.min_tokens, self._settings.max_tokens
        rng = np.random.default_rng([self._seed, 0, batch])
        return round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))


def describe_texts(sources: Sequence[TextSource]) -> list[dict[str, Any]]:
    """For `plugin_config.json`: what was read."""
    return [
        {
            "name": source.name,
            "sha256": source.sha256,
            "documents": len(source.documents),
            "characters": source.num_characters,
        }
        for source in sources
    ]
