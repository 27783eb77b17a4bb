"""How far an exported graph may be from eager PyTorch, per precision, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Limits for one output.

    Attributes:
        relative_frobenius: For the norm of the difference over the norm of the reference.
        max_abs_over_scale: For the largest absolute difference, as a share of the largest absolute value of
            the reference (or of 1, if that is larger).
        cosine: The cosine may fall short of 1 by this much.
    """

    relative_frobenius: float
    max_abs_over_scale: float
    cosine: float


TOLERANCES = {
    # A float32 result has a relative error of 6e-8 for each rounding. Through six to twelve layers eager
    # float32 itself is off from float64 by about 1e-6 in norm, and at its worst value by 3e-5 (MiniLM); a
    # correct graph sums in another order and is off by as much again. Faults are orders larger: a wrong
    # padding or a transposed window is off by 1e-2 and more.
    "float32": Tolerance(relative_frobenius=1e-5, max_abs_over_scale=1e-4, cosine=1e-9),
}
