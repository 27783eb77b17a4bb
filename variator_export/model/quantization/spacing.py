"""How far activations are from the quantised values that they were rounded to."""

import numpy as np

from variator_export.core.precision import Precision
from variator_export.model.quantization.static import FLOAT8, format_of

# float8 e4m3: 3 bits of mantissa; numbers below 2 ** -6 are evenly spaced.
_MANTISSA_BITS, _LEAST_EXPONENT = 3, -6
_HALF = 0.5


def in_range(scaled: np.ndarray, precision: Precision) -> np.ndarray:
    """Activations divided by their scale; those beyond a saturating type's range become its ends."""
    if precision.quantization == "dynamic":
        return scaled
    kind = format_of(precision)
    return np.clip(scaled, kind.smallest, kind.largest)


def beyond_half_a_step(scaled: np.ndarray, chosen: np.ndarray, precision: Precision) -> np.ndarray:
    """How much further than half a step activations are from the values that they were rounded to.

    Args:
        scaled: Activations divided by their scale.
        chosen: The values that they were rounded to, in the same shape.
        precision: The precision.

    Returns:
        The distances, in the unit of both. Not above 0 where the value is the nearest one.
    """
    step = _float8_step(scaled, chosen) if format_of(precision) is FLOAT8 else 1.0
    found: np.ndarray = np.abs(in_range(scaled, precision) - chosen) - _HALF * step
    return found


def _float8_step(scaled: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The spacing of float8 numbers on the side of the chosen value that the activation is on."""
    magnitude = np.maximum(np.abs(chosen).astype(np.float64), 2.0**_LEAST_EXPONENT)
    mantissa, exponent = np.frexp(magnitude)
    # frexp's mantissa is in [0.5, 1). Below a power of two the spacing is half of that above.
    below = (mantissa == _HALF) & (np.abs(scaled) < np.abs(chosen))
    found: np.ndarray = 2.0 ** (np.maximum(exponent - 1 - below, _LEAST_EXPONENT) - _MANTISSA_BITS)
    return found
