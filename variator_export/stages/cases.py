"""What a graph is verified on: real text, and a grid of shapes that shows frozen dimensions and padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.model.tokenizer import TextEncoder

DEFAULT_TEXTS = (
    "Yes.",
    "The ferry to the island leaves at seven and returns before dark.",
    "How do I change the oil in a small petrol lawn mower?",
    "Prices rose 3.4 % in May, twice as fast as a year before, the statistics office said on Tuesday.",
    "She had kept every letter he wrote, tied with a blue ribbon, in the drawer beneath the window, and now, "
    "with the rain against the glass, she read them again from the first to the last.",
    "def mean(values): return sum(values) / len(values)  # fails on an empty list",
    "Ça coûte 12,50 € – naïve façade, Zürich, 東京, здравствуйте!",
)
# Stands in for the limit of a model that has none.
_UNLIMITED = 512


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        name: Says what it is, for reports and messages.
        inputs: int64 arrays (B, S).
        stored: Whether it is kept in the bundle with its eager outputs.
    """

    name: str
    inputs: Arrays
    stored: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(batch_size, sequence_length)."""
        batch, length = self.inputs["input_ids"].shape
        return batch, length


def encode_texts(
    encoder: TextEncoder,
    inputs: Sequence[str],
    texts: Sequence[str],
    *,
    vocab_size: int,
    max_length: int | None,
) -> Arrays:
    """The texts to verify on, or those that come with the package, as token ids.

    Raises:
        UserError: A text is longer than the model's limit, or the tokenizer is not the model's.
    """
    arrays = encoder.encode(texts or DEFAULT_TEXTS, inputs, max_length, truncate=not texts)
    largest = int(arrays["input_ids"].max())
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer gives the token id {largest}; the model knows {vocab_size} ids.",
            "Give the backbone its own tokenizer.json.",
        )
    return arrays


def make_cases(
    encoder: TextEncoder,
    inputs: Sequence[str],
    *,
    ratio: int,
    vocab_size: int,
    max_length: int | None,
    texts: Sequence[str] = (),
    seed: int = 0,
) -> list[Case]:
    """The cases of one ratio.

    Lengths are 1, k-1, k, k+1, a prime, the model's limit and one less; batches are 1 to 4, most with rows of
    different length. Equal arguments give equal cases.
    """
    rng = np.random.default_rng([seed, ratio])
    cases = [
        Case(
            "real text",
            encode_texts(encoder, inputs, texts, vocab_size=vocab_size, max_length=max_length),
            stored=True,
        ),
    ]
    limit = max_length if max_length is not None else _UNLIMITED
    grid = [(1, 1), (4, ratio - 1), (1, ratio), (3, ratio + 1), (3, 37), (2, limit - 1), (1, limit)]
    for batch, length in dict.fromkeys((b, n) for b, n in grid if 1 <= n <= limit):
        lengths = rng.integers(1, length + 1, batch)
        lengths[0] = length
        ids = rng.integers(0, vocab_size, (batch, length))
        keep = np.arange(length) < lengths[:, None]
        arrays = {name: np.zeros((batch, length), np.int64) for name in inputs}
        arrays["input_ids"][:] = np.where(keep, ids, encoder.pad_token_id)
        arrays["attention_mask"][:] = keep
        if "token_type_ids" in arrays:
            arrays["token_type_ids"][:] = keep & (np.arange(length) > length // 2)
        cases.append(Case(f"{batch}x{length}", arrays, stored=length <= 37))
    return cases
