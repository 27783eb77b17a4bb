"""Batches of labelled examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.text.tokenizer import TextEncoder, TokenRow
from variator_export.training.batches import Item, Target
from variator_export.training.settings import Optimisation

# Examples are sorted by length within groups of this many batches, so that a batch has similar lengths.
_GROUP = 50


class InOrder(Dataset[Item]):
    """A map-style data set of examples in their original order."""

    def __init__(self, rows: Sequence[TokenRow], targets: Sequence[Target]) -> None:
        self._rows = rows
        self._targets = targets

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        """Return a row and its target."""
        return self._rows[index], self._targets[index]


class Shuffled(InOrder):
    """A data set that is shuffled anew in each epoch, with texts of similar length in one batch.

    Item i depends only on the seed and i, so that a resumed or distributed run sees the same items.

    Args:
        rows: The examples.
        targets: The target of each example.
        batch_size: Rows per batch, over all processes.
        num_batches: Number of batches.
        seed: Seed of the order.
    """

    def __init__(
        self,
        rows: Sequence[TokenRow],
        targets: Sequence[Target],
        *,
        batch_size: int,
        num_batches: int,
        seed: int,
    ) -> None:
        super().__init__(rows, targets)
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return self._batch_size * self._num_batches

    def __getitem__(self, index: int) -> Item:
        """Return item `index`, counted over all epochs."""
        epoch, place = divmod(index, len(self._rows))
        return super().__getitem__(int(self._order(epoch)[place]))

    def _make_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._rows))
        lengths = np.array([len(row.ids) for row in self._rows])
        size, group = self._batch_size, self._batch_size * _GROUP
        blocks = [order[i : i + group] for i in range(0, len(order), group)]
        sorted_blocks = [block[np.argsort(lengths[block], kind="stable")] for block in blocks]
        batches = [block[i : i + size] for block in sorted_blocks for i in range(0, len(block), size)]
        return np.concatenate([batches[i] for i in rng.permutation(len(batches))])


def task_data(
    train: Examples,
    held_out: Examples,
    encoder: TextEncoder,
    *,
    max_tokens: int,
    targets: Callable[[Examples], Sequence[Target]] | None,
    optimisation: Optimisation,
) -> tuple[Dataset[Item], Dataset[Item]]:
    """Tokenize the examples to train on and the held-out examples.

    Args:
        train: The examples to train on.
        held_out: The examples on which the loss is evaluated.
        encoder: The tokenizer.
        max_tokens: Longer texts are truncated to this number of tokens.
        targets: Function from examples to their targets; None if none are needed.
        optimisation: Settings that define the number and size of the batches.

    Returns:
        The training data set and the held-out data set, both of token rows with targets.
    """

    def encode(examples: Examples) -> tuple[list[TokenRow], Sequence[Target]]:
        rows = encoder.token_rows(examples.texts, max_tokens, pairs=examples.pairs, truncate=True)
        return rows, [None] * len(rows) if targets is None else targets(examples)

    shuffled = Shuffled(
        *encode(train),
        batch_size=optimisation.batch_size,
        num_batches=optimisation.steps,
        seed=optimisation.seed,
    )
    return shuffled, InOrder(*encode(held_out))


def class_targets(label2id: Mapping[str, int]) -> Callable[[Examples], Sequence[Target]]:
    """Return a function from examples to their class indices."""
    return lambda examples: examples.class_indices(label2id)


def text_targets(encoder: TextEncoder, max_tokens: int) -> Callable[[Examples], Sequence[Target]]:
    """Return a function from examples to the tokens of their target texts, which are truncated."""
    return lambda examples: [row.ids for row in encoder.token_rows(examples.labels(), max_tokens, prompt="")]


def divide(
    examples: Examples, held_out: float, seed: int, *, by_class: bool = True
) -> tuple[Examples, Examples]:
    """Hold out a random share of the examples.

    Args:
        examples: The examples.
        held_out: The share.
        seed: Seed of the choice.
        by_class: Whether to hold out this share of each class, if the examples have labels.

    Returns:
        The examples to train on, and the held-out examples.

    Raises:
        UserError: No example would be held out.
    """
    groups: dict[str, list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(examples)).tolist():
        group = examples.targets[index] if examples.targets and by_class else ""
        groups.setdefault(group, []).append(index)
    chosen: set[int] = set()
    for group in groups.values():
        # At least one example of each class stays in the training data.
        chosen.update(group[: min(round(len(group) * held_out), len(group) - 1)])
    if not chosen:
        raise UserError(
            f"{examples.name} has {len(examples)} examples: a share of {held_out:g}"
            f"{' of each class' if by_class else ''} holds out no example.",
            "Give more data, a larger --held-out, or a separate file with --validation.",
        )
    train = [index for index in range(len(examples)) if index not in chosen]
    return examples.select(train), examples.select(sorted(chosen))


def describe_examples(*parts: tuple[str, Examples]) -> list[dict[str, Any]]:
    """Describe the examples that were read and their use, for `plugin_config.json`."""
    return [
        {
            "name": part.name,
            "sha256": part.sha256,
            "columns": asdict(part.columns),
            "used_for": use,
            "examples": len(part),
        }
        for use, part in parts
    ]
