"""Metrics as functions of samples, with intervals from resampling the samples."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# The interval holds this share of the resampled values.
CONFIDENCE = 0.95
_RESAMPLES = 1000
_SEED = 0
# Resamples are drawn in groups of at most this many values, to bound the memory.
_VALUES_AT_A_TIME = 4_000_000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Samples:
    """What one metric is computed from.

    Attributes:
        values: One row for each example, (N, m).
        reduce: Function from values (..., N, m) to the metric (...). NaN where it is undefined.
    """

    values: np.ndarray
    reduce: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float | None:
        """The metric. None if it is undefined."""
        found = float(self.reduce(self.values))
        return found if np.isfinite(found) else None


def mean(values: np.ndarray) -> Samples:
    """The mean of one value for each example, (N,)."""
    return Samples(np.asarray(values, np.float64)[:, None], lambda rows: rows[..., 0].mean(-1))


def interval(samples: Samples) -> Interval | None:
    """Compute the 95 % interval of a metric: the percentile bootstrap with 1,000 resamples of the examples.

    None if the metric is undefined on some resamples.
    """
    return _percentiles(samples.reduce, samples.values)


def loss_interval(samples: Samples, uncompressed: Samples) -> Interval | None:
    """Compute the 95 % interval of the relative loss of a metric, both on the same resampled examples."""
    split = samples.values.shape[-1]

    def loss(rows: np.ndarray) -> np.ndarray:
        whole = uncompressed.reduce(rows[..., split:])
        with np.errstate(divide="ignore", invalid="ignore"):
            lost: np.ndarray = 1 - samples.reduce(rows[..., :split]) / whole
        return lost

    return _percentiles(loss, np.concatenate([samples.values, uncompressed.values], axis=-1))


def _percentiles(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> Interval | None:
    rng = np.random.default_rng(_SEED)
    count = len(values)
    group = max(1, min(_RESAMPLES, _VALUES_AT_A_TIME // max(1, values.size)))
    found: list[np.ndarray] = []
    for start in range(0, _RESAMPLES, group):
        drawn = rng.integers(0, count, (min(group, _RESAMPLES - start), count))
        found.append(np.atleast_1d(function(values[drawn])))
    all_found = np.concatenate(found)
    if not np.isfinite(all_found).all():
        return None
    outside = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(all_found, [outside, 100 - outside])
    return float(low), float(high)
