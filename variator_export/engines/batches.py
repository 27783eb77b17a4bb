"""Running rows of tokens in batches of similar length, so that little of a batch is padding."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from variator_export.engines.base import Arrays
from variator_export.text.tokenizer import TokenRow, pad_rows

BATCH_SIZE = 32
# A batch ends before a row whose length would make more than a quarter of the first row padding. A few tokens
# more do no harm.
_LONGEST_TO_SHORTEST = 1.25
_FREE_TOKENS = 8


def longest_beside(shortest: int) -> float:
    """The length of the longest row that may be in a batch with a row, in tokens."""
    return shortest * _LONGEST_TO_SHORTEST + _FREE_TOKENS


def batches_by_length(rows: Sequence[TokenRow], batch_size: int) -> list[list[int]]:
    """Group rows into batches of similar length, each of at most `batch_size` rows.

    Returns:
        The indices of the rows, by batch, from the shortest rows to the longest.
    """
    batches: list[list[int]] = []
    allowed = 0.0
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].ids)):
        length = len(rows[index].ids)
        if not batches or len(batches[-1]) == batch_size or length > allowed:
            batches.append([])
            allowed = longest_beside(length)
        batches[-1].append(index)
    return batches


def run_rows(
    run: Callable[[Mapping[str, np.ndarray]], Arrays],
    rows: Sequence[TokenRow],
    inputs: Sequence[str],
    *,
    pad_token_id: int,
    token_outputs: Sequence[str] = (),
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[int, Arrays]]:
    """Run rows of tokens in batches by length.

    Args:
        run: Function from inputs by name, (batch_size, sequence_length) each, to outputs by name.
        rows: The rows.
        inputs: Names of the model's inputs.
        pad_token_id: The tokenizer's padding token.
        token_outputs: Names of the outputs with one row per token. Their padding is removed.
        batch_size: The largest number of rows in a batch.

    Yields:
        The index of a row and its outputs by name. Rows of a batch follow one another, shortest batch first.
    """
    for batch in batches_by_length(rows, batch_size):
        outputs = run(pad_rows([rows[index] for index in batch], inputs, pad_token_id))
        for place, index in enumerate(batch):
            tokens = len(rows[index].ids)
            yield (
                index,
                {
                    name: values[place, :tokens] if name in token_outputs else values[place]
                    for name, values in outputs.items()
                },
            )
