"""What every way to run a model has in common.

Arrays: int64 inputs (B, S) by name; outputs by name, one row per token for token outputs, else one per row.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from variator_export.core.errors import UserError

if TYPE_CHECKING:  # what runs graphs needs no manifest
    from variator_export.bundle.manifest import BackboneEntry

Arrays = dict[str, np.ndarray]


class Runner(Protocol):
    """One model at one ratio."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run it once."""
        ...


def check_inputs(inputs: Mapping[str, np.ndarray], backbone: "BackboneEntry") -> Arrays:
    """Inputs as a graph takes them: all of them, int64, one shape, within the model's limit.

    Raises:
        UserError: A name is missing or unknown, or a shape or a type does not fit.
    """
    missing, unknown = set(backbone.inputs) - set(inputs), set(inputs) - set(backbone.inputs)
    if missing or unknown:
        raise UserError(
            f"Inputs {', '.join(sorted(inputs)) or 'none'} were given; the model takes "
            f"{', '.join(backbone.inputs)}.",
            "Give exactly those, as int64 arrays (batch_size, sequence_length).",
        )
    arrays = {name: np.asarray(inputs[name]) for name in backbone.inputs}
    shapes = {array.shape for array in arrays.values()}
    shape = next(iter(shapes))
    if len(shapes) != 1 or len(shape) != 2 or 0 in shape:
        raise UserError(
            f"The inputs have the shapes {sorted(map(str, shapes))}.",
            "Give arrays of one shape (batch_size, sequence_length), both at least 1.",
        )
    if any(array.dtype.kind not in "iu" for array in arrays.values()):
        kinds = {name: str(array.dtype) for name, array in arrays.items()}
        raise UserError(f"The inputs have the types {kinds}.", "Give integers.")
    if arrays["input_ids"].min() < 0:
        raise UserError(
            "input_ids holds negative numbers.", "Give the token ids of the backbone's tokenizer."
        )
    if backbone.max_length is not None and shape[1] > backbone.max_length:
        raise UserError(
            f"The inputs have {shape[1]} tokens; the model's limit is {backbone.max_length}.",
            "Shorten or split the text.",
        )
    return {name: np.ascontiguousarray(array, np.int64) for name, array in arrays.items()}
