"""How far one array is from another, and whether that is within a tolerance."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from variator_export.core.tolerances import Tolerance


@dataclass(frozen=True)
class Deviation:
    """The deviation of an output from its reference, computed in float64.

    Attributes:
        max_abs: Largest absolute difference.
        max_abs_over_scale: The same over the largest absolute value of the reference, or 1 if that is larger.
        relative_frobenius: Norm of the difference over the norm of the reference (over 1 if that is zero).
        cosine: Between the two, as flat vectors; 1 if both are zero.
        finite: Whether both hold only finite numbers. If not, the others are None: NaN never passes.
    """

    max_abs: float | None
    max_abs_over_scale: float | None
    relative_frobenius: float | None
    cosine: float | None
    finite: bool

    def within(self, tolerance: Tolerance) -> bool:
        """Whether it is allowed."""
        if self.max_abs_over_scale is None or self.relative_frobenius is None or self.cosine is None:
            return False
        return (
            self.relative_frobenius <= tolerance.relative_frobenius
            and self.max_abs_over_scale <= tolerance.max_abs_over_scale
            and self.cosine >= 1 - tolerance.cosine
        )

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.finite:
            return "NaN or infinite values"
        return (
            f"relative Frobenius error {self.relative_frobenius:.2e}, max absolute error {self.max_abs:.2e}, "
            f"cosine {self.cosine:.9f}"
        )


def deviation(found: np.ndarray, expected: np.ndarray) -> Deviation:
    """Compare two arrays of one shape."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Deviation(None, None, None, None, finite=False)
    max_abs = float(np.abs(a - b).max(initial=0.0))
    norm_a, norm_b = math.sqrt(float(a @ a)), math.sqrt(float(b @ b))
    difference = math.sqrt(float((a - b) @ (a - b)))
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else float(norm_a == norm_b)
    return Deviation(
        max_abs=max_abs,
        max_abs_over_scale=max_abs / max(1.0, float(np.abs(b).max(initial=0.0))),
        relative_frobenius=difference / (norm_b or 1.0),
        cosine=min(cosine, 1.0),
        finite=True,
    )
