"""From the texts of a request to rows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding

from variator_export.serving.http.body import TextInput
from variator_export.serving.http.errors import ApiError
from variator_export.serving.model import ServedModel
from variator_export.text.tokenizer import TokenRow, token_row

# A text is first tokenised up to so many characters for each token of the limit. Few texts need more to reach
# the limit, and the rest of a huge one would only take time.
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Encoded:
    """Texts as tokens.

    Attributes:
        rows: The rows of tokens.
        encodings: Each token's place in its text. Empty for rows that came as token ids.
    """

    rows: Sequence[TokenRow]
    encodings: Sequence[Encoding] = ()

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(len(row.ids) for row in self.rows)


def encode(model: ServedModel, given: TextInput, truncate: bool, prompt_name: str | None = None) -> Encoded:
    """Tokenise texts, or check rows of token ids.

    Raises:
        UserError: A text is not valid Unicode, or too long and may not be truncated; or there is no such
            prompt.
        ApiError: A row of ids is too long, or an id is not in the vocabulary.
    """
    if given.ids:
        return _check_ids(model, given.ids, truncate)
    return encode_pairs(model, given.texts, None, truncate, prompt_name)


def encode_pairs(
    model: ServedModel,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    truncate: bool,
    prompt_name: str | None = None,
) -> Encoded:
    """Tokenise texts, or pairs of texts.

    Raises:
        UserError: A text is not valid Unicode, or too long and may not be truncated; or there is no such
            prompt.
    """
    limit = model.text.encoder.max_length
    if not truncate or limit is None or pairs is not None:
        encodings = model.text.encode(texts, pairs, truncate=truncate, prompt_name=prompt_name)
        return Encoded([token_row(encoding) for encoding in encodings], encodings)
    longest = limit * _CHARACTERS_PER_TOKEN
    encodings = model.text.encode([text[:longest] for text in texts], prompt_name=prompt_name)
    for index, text in enumerate(texts):
        # A text of spaces, or of one endless word, has few tokens for its characters: all of it is read.
        if len(text) > longest and not encodings[index].overflowing:
            encodings[index] = model.text.encode([text], prompt_name=prompt_name)[0]
    return Encoded([token_row(encoding) for encoding in encodings], encodings)


def _check_ids(model: ServedModel, ids: Sequence[Sequence[int]], truncate: bool) -> Encoded:
    """Rows of token ids as they came, special tokens included."""
    encoder = model.text.encoder
    limit, size = encoder.max_length, encoder.vocab_size
    rows = []
    for number, row in enumerate(ids, start=1):
        if limit is not None and len(row) > limit and not truncate:
            raise ApiError(
                400,
                f"Input {number} has {len(row)} tokens; the limit is {limit}.",
                "context_length_exceeded",
                "input",
            )
        kept = row[:limit]
        if not 0 <= min(kept) <= max(kept) < size:
            raise ApiError(
                400,
                f"Input {number} has a token id that is not from 0 to {size - 1}.",
                "invalid_value",
                "input",
            )
        rows.append(TokenRow(list(kept), [0] * len(kept)))
    return Encoded(rows)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., d) of length 1; those of length 0 stay."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
