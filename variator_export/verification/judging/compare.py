"""Measures of how much two arrays differ."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Deviation:
    """Deviation of an output from its reference, computed in float64.

    Attributes:
        max_abs: Largest absolute difference.
        mean_abs: Mean absolute difference.
        p999_abs: 99.9th percentile of the absolute differences.
        relative_frobenius: Norm of the difference over the norm of the reference (over 1 if that is zero).
        cosine: Cosine of the two arrays as flat vectors. 1 if both are zero.
        scale: Largest absolute value of the reference. 1 if the reference is zero everywhere.
        finite: Whether both arrays hold only finite numbers. If not, all other fields are NaN, which no limit
            allows.
    """

    max_abs: float
    mean_abs: float
    p999_abs: float
    relative_frobenius: float
    cosine: float
    scale: float
    finite: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for a report, with None instead of NaN because JSON has no NaN."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        if not self.finite:
            return "NaN or infinite values"
        return (
            f"relative Frobenius error {self.relative_frobenius:.2e}, max absolute error {self.max_abs:.2e} "
            f"(largest value {self.scale:.2e}), cosine {self.cosine:.9f}"
        )


def deviation(found: np.ndarray, expected: np.ndarray) -> Deviation:
    """Compare two arrays of the same size. Empty arrays do not deviate."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        nan = math.nan
        return Deviation(nan, nan, nan, nan, nan, nan, finite=False)
    difference = np.abs(a - b)
    norm_a, norm_b = math.sqrt(float(a @ a)), math.sqrt(float(b @ b))
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else float(norm_a == norm_b)
    return Deviation(
        max_abs=float(difference.max(initial=0.0)),
        mean_abs=float(difference.mean()) if difference.size else 0.0,
        p999_abs=float(np.quantile(difference, 0.999)) if difference.size else 0.0,
        relative_frobenius=math.sqrt(float(difference @ difference)) / (norm_b or 1.0),
        cosine=min(cosine, 1.0),
        scale=float(np.abs(b).max(initial=0.0)) or 1.0,
        finite=True,
    )


def argmax_agreement(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the share of rows (..., C) whose largest value is at the same index."""
    return float((found.argmax(-1) == expected.argmax(-1)).mean())


def rank_correlation(found: np.ndarray, expected: np.ndarray) -> float | None:
    """Return Spearman's correlation of the cosines of all pairs of rows (B, d). None for fewer than 3 rows.

    A search ranks by these cosines. Tied pairs share their rank.
    """
    if len(expected) < 3:
        return None
    a, b = _ranks(_pair_cosines(found)), _ranks(_pair_cosines(expected))
    same = float(np.array_equal(a, b))
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else same


def _pair_cosines(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit = rows / np.where(norms > 0, norms, 1.0)
    return np.asarray((unit @ unit.T)[np.triu_indices(len(rows), 1)])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks from 0, with ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[inverse])


def where_expected(found: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An output and what is expected of it, with zeros in both where nothing is: NaN in the reference."""
    nothing = np.isnan(wanted)
    if found.shape != wanted.shape or not nothing.any():
        return found, wanted
    return np.where(nothing, 0, found), np.where(nothing, 0, wanted)
