"""The boundary of a graph: callers use (batch_size, sequence_length), and the traced body uses windows.

The prologue pads the inputs to a multiple of the ratio and cuts them into windows. The epilogue cuts token
outputs back to the caller's length. The prologue reads the ratio from the shape of a plugin input, so one
any-ratio graph serves every ratio.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from variator_export.core.axes import BATCH, LENGTH, token_axis
from variator_export.graph.constants import add_constant
from variator_export.model.plugin_layout import GRAPH_INPUT_PREFIX

_PADDED = ".padded"
RATIO_SOURCE = GRAPH_INPUT_PREFIX + "compress.bias"  # (L, k)


def add_window_padding(
    graph: ir.Graph, inputs: Collection[str], token_outputs: Collection[str], pad_id: int
) -> None:
    """Give a windowed graph the interface (batch_size, sequence_length).

    Args:
        graph: The graph, changed in place. Its inputs named in `inputs` are int64 (batch_size, windows,
            ratio).
        inputs: Names of the token inputs. `input_ids` is padded with `pad_id`, the others with 0.
        token_outputs: Names of the outputs with one row per token.
        pad_id: Id of the tokenizer's pad token.
    """
    tape = ir.tape.Tape(graph)
    constants = _Constants(graph)
    outer = {name: _new_input(name) for name in inputs}
    ratio_source = next(value for value in graph.inputs if value.name == RATIO_SOURCE)

    length = tape.op("Shape", [outer["input_ids"]], {"start": 1, "end": 2})
    ratio = tape.op("Shape", [ratio_source], {"start": 1, "end": 2})
    rounded_up = tape.op("Sub", [tape.op("Add", [length, ratio]), constants([1])])
    padded_length = tape.op("Mul", [tape.op("Div", [rounded_up, ratio]), ratio])
    # A Concat and a Slice, because ONNX Runtime has no int64 Pad for CUDA: each would run on the CPU.
    window_of_each_row = tape.op(
        "Concat", [tape.op("Shape", [outer["input_ids"]], {"start": 0, "end": 1}), ratio], {"axis": 0}
    )
    window_shape = tape.op("Concat", [constants([0, -1]), ratio], {"axis": 0})
    for position, value in enumerate(list(graph.inputs)):
        if value.name not in outer:
            continue
        source = outer[value.name]
        fill = constants([[pad_id if value.name == "input_ids" else 0]])
        longer = tape.op("Concat", [source, tape.op("Expand", [fill, window_of_each_row])], {"axis": 1})
        padded = tape.op("Slice", [longer, constants([0]), padded_length, constants([1])])
        windows = tape.op("Reshape", [padded, window_shape])
        windows.shape, windows.type = value.shape, value.type
        graph.inputs[position] = source
        value.replace_all_uses_with(windows)
    prologue = list(tape.nodes)
    for node in prologue:
        graph.remove(node)
    graph.insert_before(graph[0], prologue)

    for position, value in enumerate(list(graph.outputs)):
        if value.name not in token_outputs:
            continue
        name, shape = str(value.name), value.shape
        assert shape is not None
        value.name = name + _PADDED
        axis = token_axis(name)
        sliced = tape.op("Slice", [value, constants([0]), length, constants([axis])])
        sliced.name, sliced.type = name, value.type
        sliced.shape = ir.Shape([BATCH, *shape[1:axis], LENGTH, *shape[axis + 1 :]])
        graph.outputs[position] = sliced


def remove_window_padding(graph: ir.Graph) -> None:
    """Undo `add_window_padding` for ratio 1, where no length needs padding."""
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Concat" and source is not None and source.is_graph_input():
            for user, _ in list(node.outputs[0].uses()):
                user.outputs[0].replace_all_uses_with(source)
    for position, value in enumerate(list(graph.outputs)):
        slicing = value.producer()
        inner = slicing.inputs[0] if slicing is not None and slicing.op_type == "Slice" else None
        if slicing is None or inner is None or not str(inner.name).endswith(_PADDED):
            continue
        name, shape = value.name, value.shape
        graph.outputs[position] = inner
        graph.remove(slicing, safe=True)
        inner.name, inner.shape = name, shape


class _Constants:
    """The int64 constants of a graph's boundary; each value is created once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[str, ir.Value] = {}

    def __call__(self, value: list[int] | list[list[int]]) -> ir.Value:
        name = (
            "boundary." + str(value).strip("[]").replace(", ", "_") + "_columns" * isinstance(value[0], list)
        )
        if name not in self._made:
            self._made[name] = add_constant(self._graph, name, np.array(value, np.int64))
        return self._made[name]


def _new_input(name: str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape([BATCH, LENGTH]), type=ir.TensorType(ir.DataType.INT64))
