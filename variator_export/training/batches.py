"""Batches of token rows with their targets."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from variator_export.model.backbone import Backbone
from variator_export.text.tokenizer import TokenRow, pad_rows
from variator_export.training.losses import IGNORED
from variator_export.training.trainer import Batch

# A class index, or the tokens of the target text; None without a target.
Target = int | Sequence[int] | None
Item = tuple[TokenRow, Target]


def collate_items(backbone: Backbone) -> Callable[[Sequence[Item]], Batch]:
    """Return a function that collates items into a batch, with `labels` if the items have targets.

    Rows are padded on the right to the longest row. Class indices are `labels` (B,); the
    tokens of target texts are `labels` (B, T), with -100 for padding.
    """
    names, pad = backbone.spec.family.inputs, backbone.pad_token_id

    def collate(items: Sequence[Item]) -> Batch:
        padded = pad_rows([row for row, _ in items], names, pad)
        batch = {name: torch.from_numpy(array) for name, array in padded.items()}
        targets = [target for _, target in items]
        if all(target is not None for target in targets):
            batch["labels"] = _labels(targets)
        return batch

    return collate


def _labels(targets: Sequence[Any]) -> torch.Tensor:
    if isinstance(targets[0], int):
        return torch.tensor(targets)
    rows = [torch.tensor(tokens) for tokens in targets]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
