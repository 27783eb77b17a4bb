"""Inputs and outputs of models in Triton, from the tensors that a manifest describes."""

from collections.abc import Iterable
from typing import Any

from variator_export.bundle.manifest import BackboneEntry
from variator_export.bundle.parts import TensorEntry
from variator_export.core.errors import UserError
from variator_export.inference import EMBEDDING
from variator_export.serving.triton.prototext import Symbol

# The inputs of the Python model beside the backbone's own.
TEXT, TEXT_PAIR, RATIO = "TEXT", "TEXT_PAIR", "RATIO"
# Triton's data types by numpy's.
_TYPES = {
    "bool": "TYPE_BOOL",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
}


def graph_tensors(tensors: Iterable[TensorEntry]) -> list[dict[str, Any]]:
    """The fields of `input` or `output` for the tensors of a graph. The batch dimension is left out.

    Raises:
        UserError: Triton has no such type, or a tensor has no batch dimension first.
    """
    return [_tensor(entry.name, _type(entry), _dims(entry)) for entry in tensors]


def python_inputs(backbone: BackboneEntry) -> list[dict[str, Any]]:
    """The fields of `input` of the Python model. Each is optional: a request has texts or token ids.

    Inputs of different length may be in one batch, because the model pads them itself.
    """
    own = [
        _tensor(TEXT, "TYPE_STRING", [1]),
        _tensor(TEXT_PAIR, "TYPE_STRING", [1]),
        *graph_tensors(backbone.part.inputs),
        _tensor(RATIO, "TYPE_INT32", [1]),
    ]
    return [{**tensor, "optional": True, "allow_ragged_batch": True} for tensor in own]


def python_outputs(backbone: BackboneEntry) -> list[dict[str, Any]]:
    """The fields of `output` of the Python model."""
    own = [entry for entry in backbone.part.outputs if entry.name in answered(backbone)]
    return [*graph_tensors(own), _tensor(RATIO, "TYPE_INT32", [1])]


def answered(backbone: BackboneEntry) -> tuple[str, ...]:
    """The outputs that the Python model returns: the sentence embedding alone if the model has one."""
    return (EMBEDDING,) if EMBEDDING in backbone.outputs else backbone.outputs


def _tensor(name: str, data_type: str, dims: list[int]) -> dict[str, Any]:
    return {"name": name, "data_type": Symbol(data_type), "dims": dims}


def _type(entry: TensorEntry) -> str:
    if entry.dtype not in _TYPES:
        raise UserError(
            f"The tensor {entry.name} has the type {entry.dtype}, which this export does not know.",
            f"It knows {', '.join(_TYPES)}.",
        )
    return _TYPES[entry.dtype]


def _dims(entry: TensorEntry) -> list[int]:
    """The dimensions after the batch; -1 for one whose size varies."""
    if not entry.axes or not isinstance(entry.axes[0], str) or len(entry.axes) < 2:
        raise UserError(
            f"The tensor {entry.name} has the axes {entry.axes}; Triton needs one for the batch and others.",
            "Serve this model with another program.",
        )
    return [axis if isinstance(axis, int) else -1 for axis in entry.axes[1:]]
