"""Types and checks common to every way to run a model.

Arrays: int64 inputs (B, S) by name; outputs by name, with one row per token for token outputs and otherwise
one per input row.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from variator_export.core.axes import LENGTH, is_key_or_value
from variator_export.core.errors import UserError

if TYPE_CHECKING:  # code that runs graphs needs no pydantic
    from variator_export.bundle.parts import PartEntry

Arrays = dict[str, np.ndarray]
T = TypeVar("T")


class Runner(Protocol):
    """One model at one ratio."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the model once."""
        ...


def named_outputs(outputs: dict[str, T], names: Mapping[str, str] | None) -> dict[str, T]:
    """The outputs of a variant, of a graph that runs every assembly.

    Args:
        outputs: The graph's outputs. Keys and values of decoder layers that do not run are empty.
        names: Where a variant's keys and values for the decoder are (`Manifest.shared_outputs`); None for a
            graph that has them in their places.
    """
    if names is None:
        return outputs
    others = {name: value for name, value in outputs.items() if not is_key_or_value(name)}
    return others | {name: outputs[source] for name, source in names.items()}


def choose_outputs(wanted: Sequence[str] | None, there: Sequence[str]) -> list[str]:
    """The outputs to return: the wanted ones in their order, or all.

    Args:
        wanted: Names of outputs; None for all.
        there: Names of the outputs that the model has.

    Raises:
        UserError: The model does not have one of them.
    """
    if wanted is None:
        return list(there)
    if isinstance(wanted, str) or (unknown := [name for name in wanted if name not in there]):
        asked = wanted if isinstance(wanted, str) else ", ".join(unknown)
        raise UserError(
            f"The outputs {asked} were asked for; the model has {', '.join(there)}.",
            "Give a list of some of those, or nothing for all.",
        )
    return list(wanted)


def check_inputs(
    inputs: Mapping[str, np.ndarray], part: "PartEntry", max_length: int | None = None
) -> Arrays:
    """Check inputs and convert them to the types of a graph.

    Every input of the graph must be given, with a type and axes that fit, within the model's limit.

    Args:
        inputs: Arrays by name.
        part: The part of the model that the inputs are for.
        max_length: The model's limit in tokens; None if there is none.

    Raises:
        UserError: A name is missing or unknown, or a shape or a type does not fit.
    """
    names = part.input_names
    missing, unknown = set(names) - set(inputs), set(inputs) - set(names)
    if missing or unknown:
        raise UserError(
            f"Inputs {', '.join(sorted(inputs)) or 'none'} were given; the model accepts {', '.join(names)}.",
            f"Pass exactly those, as {_wanted(part)}.",
        )
    arrays = {name: np.asarray(inputs[name]) for name in names}
    if any(arrays[t.name].dtype.kind not in _KINDS[np.dtype(t.dtype).kind] for t in part.inputs):
        kinds = {name: str(array.dtype) for name, array in arrays.items()}
        raise UserError(f"The inputs have the types {kinds}.", f"Pass {_wanted(part)}.")
    sizes: dict[str | int, set[int]] = {}
    for tensor in part.inputs:
        shape = arrays[tensor.name].shape
        fits = len(shape) == len(tensor.axes) and 0 not in shape
        for axis, size in zip(tensor.axes, shape, strict=False):
            sizes.setdefault(axis, set() if isinstance(axis, str) else {axis}).add(size)
        if not fits or any(len(found) > 1 for found in sizes.values()):
            shapes = sorted({str(array.shape) for array in arrays.values()})
            raise UserError(
                f"The inputs have the shapes {shapes}.",
                f"Pass {_wanted(part)}, each dimension at least 1 and of the same size wherever it occurs.",
            )
    if "input_ids" in arrays and arrays["input_ids"].min() < 0:
        raise UserError("input_ids holds negative numbers.", "Pass token ids from the backbone's tokenizer.")
    length = max(sizes.get(LENGTH, {0}))
    if max_length is not None and length > max_length:
        raise UserError(
            f"The inputs have {length} tokens; the model's limit is {max_length}.",
            "Shorten or split the text.",
        )
    return {t.name: np.ascontiguousarray(arrays[t.name], np.dtype(t.dtype)) for t in part.inputs}


# Kinds of numpy types accepted for each kind of graph input.
_KINDS = {"i": "iu", "f": "f", "b": "b"}


def _wanted(part: "PartEntry") -> str:
    """The arrays that a part accepts, in words."""
    kinds = dict.fromkeys((tensor.dtype, tensor.axes) for tensor in part.inputs)
    return " and ".join(f"{dtype} arrays ({', '.join(map(str, axes))})" for dtype, axes in kinds)
