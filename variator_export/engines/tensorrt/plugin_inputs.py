"""Plugin inputs of an engine that runs every ratio: a tensor for each layer, in the precision of the graph.

An any-ratio graph takes each kind of tensor stacked over the layers, in float32. An engine would select the
layer, convert it and cut it in every call, with four kernels in each layer (MiniLM, bfloat16). So the graph
is changed before it is built, and the tensors are prepared once, when a session takes a plugin.

The name of an input tells what it holds: `plugin.layers.3.decompress.down.weight[0:384]` is the first 384
columns of `decompress.down.weight` of layer 3. Profiles keep the names and shapes of the graph.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.core.axes import InputShapes
from variator_export.engines.tensorrt.device import numpy_type
from variator_export.model.plugin_layout import EXCLUDE_PADDING_INPUT, GRAPH_INPUT_PREFIX

if TYPE_CHECKING:
    import onnx

_OWN = re.compile(rf"{re.escape(GRAPH_INPUT_PREFIX)}layers\.(\d+)\.([^\[]+)(?:\[(\d+):(\d+)\])?$")
# Between the tensor of a layer and what reads it.
_ON_THE_WAY = ("Reshape", "Cast")


def unstack(model: "onnx.ModelProto") -> None:
    """Give a graph, which is changed in place, a plugin input for each layer and each slice of columns.

    Args:
        model: An any-ratio graph without default values.
    """
    from onnx import numpy_helper

    graph = model.graph
    nodes = _Nodes(graph)
    stacked = {
        value.name: value
        for value in graph.input
        if value.name.startswith(GRAPH_INPUT_PREFIX) and value.name != EXCLUDE_PADDING_INPUT
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for name, value in stacked.items():
        first = ""
        for node in nodes.readers(name):
            if node.op_type != "Gather":
                continue
            layer = int(numpy_helper.to_array(constants[node.input[1]]))
            own = f"{GRAPH_INPUT_PREFIX}layers.{layer}.{name.removeprefix(GRAPH_INPUT_PREFIX)}"
            first = first or own
            found, kind = nodes.behind(node.output[0], value.type.tensor_type.elem_type)
            dims = [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim][1:]
            columns = [_columns(reader, constants) for reader in nodes.readers(found)]
            if columns and all(columns) and len(dims) == 2 and found not in nodes.outputs:
                for reader, (start, open_end) in zip(
                    nodes.readers(found), filter(None, columns), strict=True
                ):
                    end = min(open_end, dims[1])
                    nodes.add_input(f"{own}[{start}:{end}]", kind, [dims[0], end - start])
                    nodes.replace(reader.output[0], f"{own}[{start}:{end}]")
            else:
                nodes.add_input(own, kind, dims)
                nodes.replace(node.output[0], own)
        for node in nodes.readers(name):
            if node.op_type == "Shape":  # of one layer now, which has an axis less
                node.input[0] = first
                for attribute in node.attribute:
                    attribute.i -= 1
        graph.input.remove(value)
    nodes.remove_unused()
    del graph.value_info[:]  # of other types


class _Nodes:
    """Changes of a graph's nodes."""

    def __init__(self, graph: "onnx.GraphProto") -> None:
        self._graph = graph
        self.outputs = {value.name for value in graph.output}

    def readers(self, name: str) -> list["onnx.NodeProto"]:
        return [node for node in self._graph.node if name in node.input]

    def behind(self, name: str, kind: int) -> tuple[str, int]:
        """The tensor that is read, behind reshapes and conversions of a tensor, and its type."""
        while (
            name not in self.outputs
            and len(readers := self.readers(name)) == 1
            and readers[0].op_type in _ON_THE_WAY
        ):
            (reader,) = readers
            kind = next((a.i for a in reader.attribute if a.name == "to"), kind)
            name = reader.output[0]
        return name, kind

    def add_input(self, name: str, kind: int, dims: list[Any]) -> None:
        from onnx import helper

        self._graph.input.append(helper.make_tensor_value_info(name, kind, dims))

    def replace(self, name: str, by: str) -> None:
        for node in self.readers(name):
            node.input[:] = [by if own == name else own for own in node.input]
        if name in self.outputs:  # of a graph that shows what is inside
            from onnx import helper

            (maker,) = (node for node in self._graph.node if name in node.output)
            self._graph.node.remove(maker)
            self._graph.node.append(helper.make_node("Identity", [by], [name]))

    def remove_unused(self) -> None:
        kept = set(self.outputs)
        for node in reversed(list(self._graph.node)):
            if kept.isdisjoint(node.output):
                self._graph.node.remove(node)
            else:
                kept.update(node.input)


def _columns(node: "onnx.NodeProto", constants: Mapping[str, Any]) -> tuple[int, int] | None:
    """The columns that a node selects of a matrix; None if it does something else."""
    from onnx import numpy_helper

    if node.op_type != "Slice" or not all(name in constants for name in node.input[1:]):
        return None
    start, end, axis, step = (int(numpy_helper.to_array(constants[name])[0]) for name in node.input[1:])
    return (start, end) if (axis, step) == (1, 1) else None


def plugin_tensors(
    stacked: Mapping[str, np.ndarray], types: Mapping[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The plugin inputs of an engine.

    Args:
        stacked: Inputs of the any-ratio graph (`plugin_layout.stack_for_graph`).
        types: Types of all inputs of the engine, for example `bfloat16`, by name.

    Yields:
        The name of each plugin input of the engine, and its values.
    """
    for name, kind in types.items():
        if name in stacked:
            yield name, stacked[name].astype(numpy_type(kind))
        elif (own := _OWN.match(name)) is not None:
            array = stacked[GRAPH_INPUT_PREFIX + own[2]][int(own[1])]
            if own[3] is not None:
                array = array[:, int(own[3]) : int(own[4])]
            yield name, np.ascontiguousarray(array.astype(numpy_type(kind)))


def engine_shapes(shapes: InputShapes, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of an engine's inputs.

    Args:
        shapes: Shapes of the any-ratio graph's inputs, or of the inputs of a graph of one variant.
        names: The engine's inputs whose shape varies.

    Returns:
        The shapes by names of the engine, as far as `shapes` has them.
    """
    found = {}
    for name in names:
        if name in shapes:
            found[name] = tuple(shapes[name])
        elif (own := _OWN.match(name)) is not None and GRAPH_INPUT_PREFIX + own[2] in shapes:
            shape = tuple(shapes[GRAPH_INPUT_PREFIX + own[2]])[1:]
            found[name] = shape if own[3] is None else (shape[0], int(own[4]) - int(own[3]))
    return found
