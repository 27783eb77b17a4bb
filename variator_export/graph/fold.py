"""Folding of the decompression layer's product with the network's output into the network's second weight.

The decompression layer multiplies the output of the feed-forward network, `y = h W + b`, by a part of its
own weight: `y V + c`. That is `h (W V) + (b V + c)`, a product with the same `h`, which a builder of engines
runs together with the network's own in one kernel. It costs more arithmetic, because h is wider than y, and
saves a kernel per layer. So it is for graphs in half precision, which run on GPUs: calls are short there, and
starting a kernel takes as long as small products do. On a CPU, it would cost up to 2 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from variator_export.graph.constants import add_constant
from variator_export.graph.simplify import module_of, remove_unused

# Last components of the name of a decompression layer.
_DECOMPRESS = ".plugin.decompress"
# What stands between a stored tensor and the product that reads it.
_VIEWS = ("Transpose", "Slice", "Cast")


@dataclass(frozen=True)
class _Product:
    """`left @ right + bias`.

    Attributes:
        node: The product.
        right: Its right factor.
        total: The value of the sum; of the product, if there is no bias.
        bias: The bias.
    """

    node: ir.Node
    right: np.ndarray
    total: ir.Value
    bias: np.ndarray | None


def fold_decompression(graph: ir.Graph, weights: Mapping[str, ir.TensorProtocol], dtype: ir.DataType) -> int:
    """Fold the product of each layer that computes it in a type; returns the number of layers.

    Products are summed in float64. The results are stored in the graph itself: d_ff x m numbers per layer, in
    MiniLM 1.2 MB per ratio. A network whose second weight is quantised, or in float32
    (T5 in float16), stays as it is.

    Args:
        graph: The graph of one ratio, whose weights are inputs. It is changed in place.
        weights: The weights by name.
        dtype: The type.
    """
    folded = 0
    for node in list(graph):
        if node.op_type != "MatMul" or not module_of(node).endswith(_DECOMPRESS):
            continue
        of_plugin = _product(node, weights)
        of_network = None if of_plugin is None else _source(node.inputs[0], weights)
        if of_plugin is None or of_network is None:
            continue
        if not of_plugin.right.dtype == of_network.right.dtype == dtype.numpy():
            continue
        w, v = of_network.right.astype(np.float64), of_plugin.right.astype(np.float64)
        b, c = (
            np.zeros(len(found.right.T)) if found.bias is None else found.bias.astype(np.float64)
            for found in (of_network, of_plugin)
        )
        name = f"folded.{module_of(node)}"
        weight = add_constant(graph, f"{name}.weight", (w @ v).astype(dtype.numpy()))
        bias = add_constant(graph, f"{name}.bias", (b @ v + c).astype(dtype.numpy()))
        _replace(graph, of_plugin, of_network.node.inputs[0], weight, bias)
        folded += 1
    remove_unused(graph)
    return folded


def _replace(graph: ir.Graph, old: _Product, left: ir.Value | None, weight: ir.Value, bias: ir.Value) -> None:
    """Compute `left @ weight + bias` in the place of an old product and its sum."""
    total, module = old.total, dict(old.node.metadata_props)
    product = ir.node("MatMul", [left, weight], metadata_props=module)
    added = ir.node("Add", [product.outputs[0], bias], metadata_props=module)
    product.outputs[0].type, product.outputs[0].shape = total.type, total.shape
    added.outputs[0].type, added.outputs[0].shape = total.type, total.shape
    last = total.producer()
    assert last is not None
    graph.insert_after(last, [product, added])
    total.replace_all_uses_with(added.outputs[0])


def _source(value: ir.Value | None, weights: Mapping[str, ir.TensorProtocol]) -> _Product | None:
    """The product outside of plugins that a value is the result of."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Add":
        products = [maker for v in node.inputs if (maker := v and v.producer()) and maker.op_type == "MatMul"]
        node = products[0] if len(products) == 1 else None
    if node is None or node.op_type != "MatMul" or ".plugin." in module_of(node) + ".":
        return None
    found = _product(node, weights)
    return found if found is not None and found.total is value else None


def _product(node: ir.Node, weights: Mapping[str, ir.TensorProtocol]) -> _Product | None:
    """A product by a stored weight, with the stored bias that is added to it; None for any other."""
    right = _stored(node.inputs[1], weights)
    if right is None:
        return None
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        (other,) = [v for v in uses[0].node.inputs if v is not node.outputs[0]] or [None]
        if (bias := _stored(other, weights)) is not None and bias.dtype == right.dtype:
            return _Product(node, right, uses[0].node.outputs[0], bias)
    return _Product(node, right, node.outputs[0], None)


def _stored(value: ir.Value | None, weights: Mapping[str, ir.TensorProtocol]) -> np.ndarray | None:
    """The numbers of a weight, or of a part of one; None for what is computed in each call."""
    if value is None:
        return None
    if (tensor := weights.get(str(value.name))) is not None:
        return np.asarray(tensor.numpy())
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is None or node.op_type not in _VIEWS or (array := _stored(node.inputs[0], weights)) is None:
        return None
    if node.op_type == "Transpose":
        permutation = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
        return array.transpose(permutation)
    if node.op_type == "Cast":
        return array.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    given = [_stored(value, weights) for value in node.inputs[1:]]
    starts, ends = given[:2]
    if starts is None or ends is None:
        return None
    axes = given[2] if len(given) > 2 else None  # may be left out, and so may the steps
    steps = given[3] if len(given) > 3 else None
    index = [slice(None)] * array.ndim
    for start, end, axis, step in zip(
        starts,
        ends,
        range(len(starts)) if axes is None else axes,
        np.ones(len(starts)) if steps is None else steps,
        strict=True,
    ):
        index[int(axis)] = slice(int(start), int(end), int(step))
    return array[tuple(index)]
