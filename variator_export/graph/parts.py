"""Description of the part of a model that a graph holds."""

from collections.abc import Mapping

import onnx_ir as ir

from variator_export.bundle.parts import PartEntry, TensorEntry
from variator_export.model.plugin_layout import GRAPH_INPUT_PREFIX


def part_of(graph: ir.Graph, *, num_sites: int, feeds: Mapping[str, str]) -> PartEntry:
    """Describe the part of a model that a graph holds, from the graph's inputs and outputs.

    Args:
        graph: The graph of one variant, or the graph for all. Inputs that carry a plugin are left out.
        num_sites: Number of feed-forward networks in the graph that a plugin wraps.
        feeds: The outputs that feed inputs (`PartEntry.feeds`).
    """
    inputs = [value for value in graph.inputs if not str(value.name).startswith(GRAPH_INPUT_PREFIX)]
    return PartEntry(
        inputs=tuple(map(_entry, inputs)),
        outputs=tuple(map(_entry, graph.outputs)),
        feeds=dict(feeds),
        num_sites=num_sites,
    )


def _entry(value: ir.Value) -> TensorEntry:
    assert value.dtype is not None, f"{value.name} has no type"
    assert value.shape is not None, f"{value.name} has no shape"
    axes = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorEntry(name=str(value.name), dtype=value.dtype.numpy().name, axes=axes)
