"""Graph files for builders that take an input with a default value for a constant."""

from pathlib import Path
from typing import TYPE_CHECKING

from variator_export.core.environment import require

if TYPE_CHECKING:
    import onnx


def load_without_defaults(graph: Path, extra: str, purpose: str) -> "onnx.ModelProto":
    """Load a graph without its weights, and without default values of inputs.

    TensorRT would take an input that has one for a constant, and run the null plugin.

    Args:
        graph: The ONNX file.
        extra: The extra that installs onnx, for the message if it is missing.
        purpose: What the graph is loaded for, for the same message.

    Raises:
        UserError: The package onnx is not installed.
    """
    require("onnx", extra, purpose)
    import onnx

    model = onnx.load(graph, load_external_data=False)
    inputs = {value.name for value in model.graph.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model
