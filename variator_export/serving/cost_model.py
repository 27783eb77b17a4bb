"""How long a batch takes: measured at start, corrected while it runs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# How much of the last batch's surprise is believed. The machine's speed changes for all variants at once; the
# formula is a little wrong for each of them in its own way.
_COMMON_SHARE = 0.1
_OWN_SHARE = 0.03
# One batch may have waited for another process. It is not believed beyond this factor, nor are many.
_LARGEST_SURPRISE = 2.0
_LARGEST_CORRECTION = 16.0


@dataclass(frozen=True)
class Measurement:
    """The time of one batch.

    Attributes:
        variant: The variant that ran.
        rows: The number of rows, B.
        length: The padded length of the rows in tokens, S.
        ms: The duration in milliseconds.
    """

    variant: str
    rows: int
    length: int
    ms: float


@dataclass(frozen=True)
class Terms:
    """The time of a batch (B, S) of one variant: call + token * B * S + pair * B * S**2, in milliseconds.

    Projections and feed-forward networks grow with the tokens, attention with the pairs of tokens in a row.
    """

    call: float
    token: float
    pair: float

    def ms(self, calls: float, tokens: float, pairs: float) -> float:
        """The time of so many calls, padded tokens and pairs of tokens."""
        return self.call * calls + self.token * tokens + self.pair * pairs


class CostModel:
    """Milliseconds of a batch, by variant, rows and padded length."""

    def __init__(self, terms: Mapping[str, Terms]) -> None:
        self._terms = dict(terms)
        self._common = 0.0
        self._own = dict.fromkeys(terms, 0.0)

    @classmethod
    def fit(cls, measurements: Sequence[Measurement]) -> "CostModel":
        """Fit the terms of each variant to measurements.

        The squared relative error is least over terms that are not negative.

        Raises:
            ValueError: There is no measurement.
        """
        if not measurements:
            raise ValueError("there must be a measurement")
        by_variant: dict[str, list[Measurement]] = {}
        for found in measurements:
            by_variant.setdefault(found.variant, []).append(found)
        return cls({variant: _fit(found) for variant, found in by_variant.items()})

    def batch_ms(self, variant: str, rows: int, length: int) -> float:
        """The expected duration of a batch in milliseconds.

        Args:
            variant: The variant's name.
            rows: The number of rows.
            length: The padded length in tokens.
        """
        return self.work_ms(variant, 1, rows * length, rows * length * length)

    def work_ms(self, variant: str, calls: float, tokens: float, pairs: float) -> float:
        """The expected duration of several batches in milliseconds.

        Args:
            variant: The variant's name.
            calls: The number of batches.
            tokens: Their padded tokens.
            pairs: The sum over their rows of the squared padded length.
        """
        return self._terms[variant].ms(calls, tokens, pairs) * self._correction(variant)

    def observe(self, measurement: Measurement) -> None:
        """Correct the model by a batch that ran."""
        variant = measurement.variant
        expected = self.batch_ms(variant, measurement.rows, measurement.length)
        if not (expected > 0 and measurement.ms > 0):
            return
        bound = math.log(_LARGEST_SURPRISE)
        surprise = min(max(math.log(measurement.ms / expected), -bound), bound)
        limit = math.log(_LARGEST_CORRECTION)
        self._common = min(max(self._common + _COMMON_SHARE * surprise, -limit), limit)
        self._own[variant] = min(max(self._own[variant] + _OWN_SHARE * surprise, -limit), limit)

    def _correction(self, variant: str) -> float:
        return math.exp(self._common + self._own[variant])


def _fit(found: Sequence[Measurement]) -> Terms:
    """Least squares over terms that are not negative: the best of the fits with each subset of the terms."""
    columns = np.array([[1.0, m.rows * m.length, m.rows * m.length**2] for m in found])
    relative = columns / np.array([[m.ms] for m in found])
    ones = np.ones(len(found))
    best, best_error = np.zeros(3), math.inf
    for size in (3, 2, 1):
        for used in itertools.combinations(range(3), size):
            part, *_ = np.linalg.lstsq(relative[:, used], ones, rcond=None)
            if (part < 0).any():
                continue
            terms = np.zeros(3)
            terms[list(used)] = part
            error = float(((relative @ terms - ones) ** 2).sum())
            if error < best_error * (1 - 1e-9):
                best, best_error = terms, error
    return Terms(*(float(value) for value in best))
