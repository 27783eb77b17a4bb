"""Distances of activations from the quantised values that they were rounded to, in steps of these."""

import numpy as np

from variator_export.core.precision import Precision

# float8 e4m3: 3 bits of mantissa; numbers below 2 ** -6 are evenly spaced.
_MANTISSA_BITS, _LEAST_EXPONENT, _LARGEST_FLOAT8 = 3, -6, 448.0
_INT8 = (-128, 127)


def steps_between(
    exact: np.ndarray, chosen: np.ndarray, precision: Precision, other: np.ndarray | None = None
) -> np.ndarray:
    """The distance of activations from rounded values, or from other activations, in steps.

    Args:
        exact: Activations divided by their scale.
        chosen: The values that they were rounded to, in the same shape. They determine the size of a step.
        precision: The precision.
        other: Activations whose distance from `exact` is asked for. None for the distance from `chosen`.

    Returns:
        The distances. A correctly rounded value is at most 0.5 steps away. Activations beyond a saturating
        type's range count as its ends.
    """
    others = chosen if other is None else other
    if precision.quantization == "dynamic":
        return np.abs(exact - others)
    low, high = _INT8 if precision.onnx == "INT8" else (-_LARGEST_FLOAT8, _LARGEST_FLOAT8)
    distance: np.ndarray = np.abs(np.clip(exact, low, high) - np.clip(others, low, high))
    return distance if precision.onnx == "INT8" else distance / _float8_step(exact, chosen)


def _float8_step(exact: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The spacing of float8 numbers on the side of the chosen value that the activation is on."""
    mantissa, exponent = np.frexp(np.abs(chosen).astype(np.float64))
    # frexp's mantissa is in [0.5, 1). Below a power of two the spacing is half of that above.
    below = (mantissa == 0.5) & (np.abs(exact) < np.abs(chosen))
    found: np.ndarray = 2.0 ** (np.maximum(exponent - 1 - below, _LEAST_EXPONENT) - _MANTISSA_BITS)
    return found
