"""Default values of the plugin inputs of the any-ratio graph.

They are the null plugin, with which the graph computes the backbone. A program that knows nothing of plugins
therefore runs the graph as ratio 1. In ONNX, an initializer with the name of an input is its default value.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir


def set_defaults(graph: ir.Graph, arrays: Mapping[str, np.ndarray]) -> None:
    """Give inputs a default value, stored in the graph itself.

    Args:
        graph: The graph, changed in place.
        arrays: The values by name of input. A symbolic dimension of the input stays symbolic.
    """
    for value in graph.inputs:
        name = str(value.name)
        if name in arrays:
            value.const_value = ir.tensor(arrays[name], name=name)
            graph.initializers.add(value)


def load_without_defaults(path: Path) -> ir.Model:
    """Load a graph without default values, so that no pass takes one for a constant."""
    model = ir.load(path)
    for value in model.graph.inputs:
        if value.is_initializer():
            del model.graph.initializers[str(value.name)]
            value.const_value = None
    return model
