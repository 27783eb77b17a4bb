"""Bisection of an assembly: one name for each of its layers, in eager PyTorch and in graphs.

A graph keeps the names of the original layers. In eager PyTorch the layers of an assembly are numbered anew.
Here an original layer keeps its number, and a module is named by the layers that it replaces, as in
`encoder.layer.2-3`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from variator_export.core.assembly import Span
from variator_export.engines.base import Arrays
from variator_export.engines.eager import EagerModel
from variator_export.graph.simplify import MODULE_KEY, module_of


class AssembledRunner:
    """An assembly in eager PyTorch, as it is bisected.

    Args:
        eager: The model.
        path: Name of the module that holds the layers.
        spans: The original layers that each layer stands for.
    """

    def __init__(self, eager: EagerModel, path: str, spans: Sequence[Span]) -> None:
        self.transformer = _Renamed(
            eager.transformer, {f"{path}.{i}": f"{path}.{s}" for i, s in enumerate(spans)}
        )
        self._eager = eager

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the model once."""
        return self._eager.run(inputs)


class _Renamed:
    """A model whose modules have other names."""

    def __init__(self, model: Any, names: Mapping[str, str]) -> None:
        self._model, self._names = model, names

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """Yield names and modules."""
        for name, module in self._model.named_modules():
            yield renamed(name, self._names), module


def rename_layers(model: ir.Model, path: str, layers: Mapping[int, Span]) -> ir.Model:
    """Name the layers of an assembly's own graph in place; returns the graph.

    Args:
        model: The graph.
        path: Name of the module that holds the layers.
        layers: The original layers that each layer stands for, by the layer of the trace.
    """
    names = {f"{path}.{layer}": f"{path}.{span}" for layer, span in layers.items()}
    for node in model.graph:
        if module := module_of(node):
            node.metadata_props[MODULE_KEY] = renamed(module, names)
    return model


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A module's name with that of its layer replaced."""
    for old, new in names.items():
        before, found, rest = f".{name}.".partition(f".{old}.")
        if found:
            return f"{before}.{new}.{rest}".strip(".")
    return name
