"""Quality of predicted masked tokens."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax
from tokenizers import Encoding

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.engines.base import Arrays
from variator_export.quality.metrics import Metrics, masked_token_metrics
from variator_export.quality.tasks.base import (
    Encode,
    EvaluatedModel,
    EvaluationTask,
    Kept,
    Measurement,
)
from variator_export.text.tokenizer import token_row

# The share of tokens that are masked, as in BERT's training (arXiv 1810.04805), and the choice's seed.
_SHARE = 0.15
_SEED = 0


class _MaskedTokens(Measurement):
    metric = "accuracy"

    def __init__(self, encodings: Sequence[Encoding], mask_token_id: int) -> None:
        rng = np.random.default_rng(_SEED)
        self.rows, self._masks = [], []
        for encoding in encodings:
            row = token_row(encoding)
            own = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
            count = min(len(own), max(1, round(_SHARE * len(own))))
            places = np.sort(rng.choice(own, count, replace=False))
            ids = np.array(row.ids)
            self._masks.append((places, ids[places]))
            ids[places] = mask_token_id
            self.rows.append(dataclasses.replace(row, ids=ids.tolist()))

    def keep(self, row: int, outputs: Arrays) -> np.ndarray:
        """Return for each mask the true token, the most probable one, and the true one's log-probability."""
        places, true = self._masks[row]
        logarithms = log_softmax(outputs["logits"][places].astype(np.float64), axis=-1)
        of_true = logarithms[np.arange(len(true)), true]
        return np.stack([true, logarithms.argmax(-1), of_true], axis=-1)

    def measure(self, kept: Kept, uncompressed: Kept) -> Metrics:
        return masked_token_metrics(kept, uncompressed)

    def compared(self, kept: Kept) -> np.ndarray:
        """The log-probabilities. The most probable token may change between two equal ones."""
        return np.concatenate([rows[:, 2] for rows in kept])

    def warnings(self, kept: Kept) -> list[str]:
        said = {token for rows in kept for token in rows[:, 1].tolist()}
        there = {token for rows in kept for token in rows[:, 0].tolist()}
        return ["says the same token for every mask"] if len(said) == 1 and len(there) > 1 else []


class FillMask(EvaluationTask):
    """Tokens that are masked at random, without targets."""

    name = "fill-mask"

    def measurement(self, model: EvaluatedModel, examples: Examples, encode: Encode) -> Measurement:
        mask = encode.encoder.mask_token_id
        if mask is None:
            raise UserError(
                f"The tokenizer of {model.source} names no mask token.",
                "Set mask_token in tokenizer_config.json.",
            )
        return _MaskedTokens(encode(examples.texts, examples.pairs), mask)


FILL_MASK = FillMask()
