"""Faults of an export or a runtime, planted into a graph of ratio 4 of the small embedding model.

docs/verification.md lists them with what catches each. A plant that finds nothing to change fails.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Fault = Callable[[ModelProto], None]


def scaled_weight(model: ModelProto) -> None:
    """One weight matrix is 1.01 times what it should be."""
    _change(model, "encoder.layer.1.output.dense.weight", lambda w: w * np.float32(1.01))


def biased(model: ModelProto) -> None:
    """Every value is off by 8e-7, less than rounding may make of it in a case."""
    _constant(model, "bias", np.array(8e-7, np.float32))
    _behind(model, "last_hidden_state", [helper.make_node("Add", ["{}", "bias"], ["{}.out"])])


def swapped_plugin_tensors(model: ModelProto) -> None:
    """Two layers have each other's plugin tensors."""
    first, second = (_tensor(model, f"plugin.layers.{i}.decompress.up.weight") for i in (0, 1))
    first.raw_data, second.raw_data = second.raw_data, first.raw_data


def swapped_halves(model: ModelProto) -> None:
    """The two halves of the decompression matrix change places."""
    _change(
        model,
        "plugin.layers.1.decompress.down.weight",
        lambda w: np.concatenate(np.split(w, 2, axis=1)[::-1], 1),
    )


def ignored_mask(model: ModelProto) -> None:
    """The attention sees padding."""
    _constant(model, "ones", np.ones(1, np.int64))
    _replace(model, "attention_mask", "seen", helper.make_node("Max", ["attention_mask", "ones"], ["seen"]))


def mask_as_length(model: ModelProto) -> None:
    """The mask is taken for the number of tokens, which come first: no holes, no padding on the left."""
    for name, value in (("axis1", [1]), ("first", 0), ("step", 1), ("axis0", [0])):
        _constant(model, f"length.{name}", np.array(value, np.int64))
    nodes = list(model.graph.node)
    for node in nodes:
        node.input[:] = ["seen" if name == "attention_mask" else name for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend(
        [
            helper.make_node("ReduceSum", ["attention_mask", "length.axis1"], ["length.tokens"], keepdims=1),
            helper.make_node("Shape", ["attention_mask"], ["length.shape"], start=1, end=2),
            helper.make_node("Squeeze", ["length.shape", "length.axis0"], ["length.size"]),
            helper.make_node("Range", ["length.first", "length.size", "length.step"], ["length.places"]),
            helper.make_node("Less", ["length.places", "length.tokens"], ["length.kept"]),
            helper.make_node("Cast", ["length.kept"], ["seen"], to=TensorProto.INT64),
            *nodes,
        ]
    )


def frozen_length(model: ModelProto) -> None:
    """The sequence length of the example that was traced has stayed in the graph."""
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = 37


def repeated_row(model: ModelProto) -> None:
    """The second row of a batch is the first once more."""
    for name, end in (("0", [0]), ("1", [1]), ("2", [2]), ("axis0", [0]), ("max", [2**31 - 1])):
        _constant(model, f"row.{name}", np.array(end, np.int64))
    nodes = [
        helper.make_node("Shape", ["{}"], ["{}.batch"], start=0, end=1),
        helper.make_node("Sub", ["{}.batch", "row.1"], ["{}.others"]),
        helper.make_node("Min", ["{}.others", "row.1"], ["{}.second"]),
        helper.make_node("Slice", ["{}", "row.0", "row.1", "row.axis0"], ["{}.a"]),
        helper.make_node("Slice", ["{}", "row.0", "{}.second", "row.axis0"], ["{}.b"]),
        helper.make_node("Slice", ["{}", "row.2", "row.max", "row.axis0"], ["{}.c"]),
        helper.make_node("Concat", ["{}.a", "{}.b", "{}.c"], ["{}.out"], axis=0),
    ]
    _behind(model, "last_hidden_state", nodes)


def overflow(model: ModelProto) -> None:
    """A step in half precision overflows."""
    _constant(model, "large", np.array(1e5, np.float32))
    nodes = [
        helper.make_node("Mul", ["{}", "large"], ["{}.up"]),
        helper.make_node("Cast", ["{}.up"], ["{}.half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["{}.half"], ["{}.whole"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["{}.whole", "large"], ["{}.out"]),
    ]
    _behind(model, "last_hidden_state", nodes)


def shifted_unpadding(model: ModelProto) -> None:
    """What cuts the padding off is off by one token."""
    for name, end in (("1", [1]), ("axis1", [1]), ("max", [2**31 - 1]), ("-1", [-1])):
        _constant(model, f"token.{name}", np.array(end, np.int64))
    nodes = [
        helper.make_node("Slice", ["{}", "token.1", "token.max", "token.axis1"], ["{}.a"]),
        helper.make_node("Slice", ["{}", "token.-1", "token.max", "token.axis1"], ["{}.b"]),
        helper.make_node("Concat", ["{}.a", "{}.b"], ["{}.out"], axis=1),
    ]
    _behind(model, "last_hidden_state", nodes)


def dependent_on_place(model: ModelProto) -> None:
    """What a row gives depends on its place in the batch."""
    for name, value in (("first", 0), ("step", 1), ("axis0", [0]), ("column", [-1, 1, 1])):
        _constant(model, f"place.{name}", np.array(value, np.int64))
    for name, number in (("share", 1e-3), ("whole", 1.0)):
        _constant(model, f"place.{name}", np.array(number, np.float32))
    nodes = [
        helper.make_node("Shape", ["{}"], ["{}.batch"], start=0, end=1),
        helper.make_node("Squeeze", ["{}.batch", "place.axis0"], ["{}.count"]),
        helper.make_node("Range", ["place.first", "{}.count", "place.step"], ["{}.places"]),
        helper.make_node("Reshape", ["{}.places", "place.column"], ["{}.column"]),
        helper.make_node("Cast", ["{}.column"], ["{}.number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["{}.number", "place.share"], ["{}.shares"]),
        helper.make_node("Add", ["{}.shares", "place.whole"], ["{}.factors"]),
        helper.make_node("Mul", ["{}", "{}.factors"], ["{}.out"]),
    ]
    _behind(model, "last_hidden_state", nodes)


def nan_in_batches(model: ModelProto) -> None:
    """More than one row gives NaN."""
    _constant(model, "rows.two", np.array([2], np.int64))
    _constant(model, "rows.zero", np.array([0.0], np.float32))
    nodes = [
        helper.make_node("Shape", ["{}"], ["{}.batch"], start=0, end=1),
        helper.make_node("Min", ["{}.batch", "rows.two"], ["{}.one_or_two"]),
        helper.make_node("Sub", ["rows.two", "{}.one_or_two"], ["{}.one_or_none"]),
        helper.make_node("Cast", ["{}.one_or_none"], ["{}.divisor"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["rows.zero", "{}.divisor"], ["{}.zero_or_nan"]),
        helper.make_node("Add", ["{}", "{}.zero_or_nan"], ["{}.out"]),
    ]
    _behind(model, "last_hidden_state", nodes)


def windows_see_padding(model: ModelProto) -> None:
    """The mask of the windows keeps everything, in a graph whose plugin excludes padding."""
    (node,) = (
        node
        for node in model.graph.node
        if node.op_type == "Greater" and any(p.value == "windowed" for p in node.metadata_props)
    )
    node.op_type = "GreaterOrEqual"


def transposed_window(model: ModelProto) -> None:
    """A window takes every W-th token instead of k neighbouring ones."""
    reshape = next(
        node
        for node in model.graph.node
        if node.op_type == "Reshape"
        and any(p.value == "encoder.layer.0.intermediate" for p in node.metadata_props)
    )
    shape = numpy_helper.to_array(_tensor(model, reshape.input[1]))
    zero, windows, ratio, hidden = shape.tolist()
    _constant(model, "strided", np.array([zero, ratio, windows, hidden], np.int64))
    reshape.input[1] = "strided"
    after = helper.make_node("Transpose", [reshape.output[0]], ["windows.strided"], perm=[0, 2, 1, 3])
    _replace(model, reshape.output[0], "windows.strided", after)


FAULTS: dict[str, Fault] = {
    "one weight matrix scaled by 1.01": scaled_weight,
    "every value off by 8e-7": biased,
    "a swapped pair of plugin tensors": swapped_plugin_tensors,
    "swapped halves of the decompression matrix": swapped_halves,
    "an ignored mask": ignored_mask,
    "a mask taken for a length": mask_as_length,
    "a frozen dimension": frozen_length,
    "a repeated row of the batch": repeated_row,
    "an overflow in half precision": overflow,
    "unpadding that is off by one": shifted_unpadding,
    "a transposed window": transposed_window,
    "a result that depends on the place in the batch": dependent_on_place,
    "NaN where the batch has more than one row": nan_in_batches,
    "windows that see padding which the plugin excludes": windows_see_padding,
}


def plant(fault: Fault, graph: Path) -> None:
    """Rewrite a graph with a fault; its weights go into the file itself."""
    model = onnx.load(graph)
    fault(model)
    onnx.save(model, graph)


def _tensor(model: ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _change(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = _tensor(model, name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), name))


def _constant(model: ModelProto, name: str, value: np.ndarray) -> None:
    model.graph.initializer.append(numpy_helper.from_array(value, name))


def _replace(model: ModelProto, old: str, new: str, node: NodeProto) -> None:
    """Let everything that reads `old` read `new`, which `node` makes of it."""
    readers = [(n, i) for n in model.graph.node for i, name in enumerate(n.input) if name == old]
    assert readers, old
    for reader, index in readers:
        reader.input[index] = new
    nodes = list(model.graph.node)
    place = next(i for i, n in enumerate(nodes) if any(n is reader for reader, _ in readers))
    model.graph.node.insert(place, node)


def _behind(model: ModelProto, output: str, nodes: list[NodeProto]) -> None:
    """Put nodes between an output and what makes it; {} stands for the value."""
    before = f"{output}.before"
    for node in model.graph.node:
        node.input[:] = [before if name == output else name for name in node.input]
        node.output[:] = [before if name == output else name for name in node.output]
    for node in nodes:
        node.input[:] = [name.format(before) for name in node.input]
        node.output[:] = [name.format(before) for name in node.output]
    nodes[-1].output[0] = output
    model.graph.node.extend(nodes)
