"""Cases to verify a graph on: real text, and a grid of shapes that reveals frozen dimensions and padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.text.tokenizer import TextEncoder

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
# In order: empty, blank, one token, invisible, composed of several code points, emoji, right to left,
# compatibility characters, control codes, no letters.
UNUSUAL_TEXTS = (
    "",
    " \t\n ",
    "a",
    "\u200b\u200d\u2060",
    "e\u0301\u0323" * 4,
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 ¯\\_(ツ)_/¯",
    "مرحبا بالعالم، שלום עולם",
    "ａｂｃ ﷽ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﬃ ½ ①",
    "\x01\x02\x7f\ufffd\ufeff",
    "." * 20,
)
REAL_TEXT = "real text"
LONGEST_TEXT = "the longest text"
_PRIMES = (5, 37, 127)
# Longest sequence length of the cases that are stored in the bundle.
_STORED_LENGTH = 37
# The length of the cases with holes and with padding on the left; the share of a mask that is holes; and the
# largest batch that is drawn at random.
_ODD_LENGTH = 29
_HOLES = 0.3
_MOST_DRAWN_ROWS = 6
# Substitute for the limit of a model without one, in tokens.
_UNLIMITED = 512


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        name: Descriptive name for reports and messages.
        inputs: int64 arrays (B, S), by input name.
        stored: Whether the bundle keeps the case with its outputs of eager PyTorch.
    """

    name: str
    inputs: Arrays
    stored: bool = False

    @property
    def judged_rows(self) -> np.ndarray:
        """The rows whose outputs are compared, bool (B,): rows with at least one token.

        Attention over nothing is undefined, so runtimes return arbitrary values for a row of padding alone.
        These values must be finite, and the row must not affect the other rows.
        """
        return np.asarray(self.inputs["attention_mask"].any(axis=-1))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the inputs, (batch_size, sequence_length)."""
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
    """Encode the given texts, or the default texts of the package if there are none, as token ids.

    Raises:
        UserError: A text is longer than the model's limit, or the tokenizer does not belong to the model.
    """
    arrays = encoder.encode(texts or DEFAULT_TEXTS, inputs, max_length, truncate=not texts)
    largest = int(arrays["input_ids"].max())
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer returns the token id {largest}, but the model has only {vocab_size} ids.",
            "Use the backbone's own tokenizer.json.",
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
    shapes: Sequence[tuple[int, int]] = (),
    seed: int = 0,
    drawn: int = 0,
) -> list[Case]:
    """Create the cases of one ratio.

    The cases are real text, unusual text, and a text as long as the model accepts; random tokens of the
    lengths 1, k-1, k, k+1, primes, and one less than the model's limit, in batches of 1 to 4, most with rows
    of different length; a batch with a row that is all padding; masks with holes; and padding on the left.
    Equal arguments create equal cases.

    Args:
        encoder: The backbone's tokenizer.
        inputs: Names of the model's inputs.
        ratio: The ratio k.
        vocab_size: The model's vocabulary size.
        max_length: The model's limit in tokens. None if there is none.
        texts: Real texts. If empty, the default texts of the package.
        shapes: Additional shapes (batch_size, sequence_length). Shapes over the model's limit are skipped.
        seed: Seed of the random tokens.
        drawn: Number of additional shapes to draw at random, every other one with a mask with holes.
    """
    rng = np.random.default_rng([seed, ratio])
    real = encode_texts(encoder, inputs, texts, vocab_size=vocab_size, max_length=max_length)
    unusual = encoder.encode(UNUSUAL_TEXTS, inputs, max_length, truncate=True)
    cases = [Case(REAL_TEXT, real, stored=True), Case("unusual text", unusual, stored=True)]
    limit = max_length if max_length is not None else _UNLIMITED
    longest = " ".join(DEFAULT_TEXTS * (limit // 50 + 1))  # one repetition has more than 50 tokens
    cases.append(Case(LONGEST_TEXT, encoder.encode([longest], inputs, limit, truncate=True)))
    primes = [(3, prime) for prime in _PRIMES]
    grid = [(1, 1), (4, ratio - 1), (1, ratio), (3, ratio + 1), *primes, (2, limit - 1), *shapes]

    def random_case(name: str, keep: np.ndarray) -> Case:
        """Random tokens where the mask (B, S) keeps them, and padding elsewhere."""
        batch, length = keep.shape
        ids = rng.integers(0, vocab_size, (batch, length))
        arrays = {name: np.zeros((batch, length), np.int64) for name in inputs}
        arrays["input_ids"][:] = np.where(keep, ids, encoder.pad_token_id)
        arrays["attention_mask"][:] = keep
        if "token_type_ids" in arrays:
            arrays["token_type_ids"][:] = keep & (np.arange(length) > length // 2)
        return Case(name, arrays, stored=length <= _STORED_LENGTH)

    def up_to(lengths: np.ndarray, length: int) -> np.ndarray:
        """The mask of rows that are padded on the right."""
        return np.asarray(np.arange(length) < lengths[:, None])

    def with_holes(batch: int, length: int) -> np.ndarray:
        """A mask with holes. Each row keeps one token at least."""
        mask = rng.random((batch, length)) > _HOLES
        mask[np.arange(batch), rng.integers(0, length, batch)] = True
        return mask

    for batch, length in dict.fromkeys((b, n) for b, n in grid if 1 <= n <= limit):
        lengths = rng.integers(1, length + 1, batch)
        lengths[0] = length
        cases.append(random_case(f"{batch}x{length}", up_to(lengths, length)))
    length = min(2 * ratio + 1, limit)
    lengths = np.array([length, 0, max(1, length - ratio)])
    cases.append(random_case("a row of padding", up_to(lengths, length)))
    length = min(_ODD_LENGTH, limit)
    cases.append(random_case("a mask with holes", with_holes(3, length)))
    lengths = np.array([length, max(1, length - ratio), max(1, length - ratio - 1), 1])
    cases.append(random_case("padding on the left", up_to(lengths, length)[:, ::-1]))
    for number in range(drawn):
        batch, length = int(rng.integers(1, _MOST_DRAWN_ROWS + 1)), int(rng.integers(1, limit + 1))
        mask = with_holes(batch, length) if number % 2 else up_to(rng.integers(1, length + 1, batch), length)
        cases.append(random_case(f"drawn {number + 1}: {batch}x{length}", mask))
    return cases
