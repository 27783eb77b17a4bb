"""Counting multiply-accumulates (MACs): by formula, and on a graph.

The formula gives the limit of what a ratio can save; the count on the graph shows what is really there, so
that a wasteful graph is seen. Only matrix products count; scores and weighted sums of the attention do.
"""

import math
from pathlib import Path

import onnx_ir as ir

from variator_export.core.encoder_size import EncoderSize
from variator_export.graph.boundary import BATCH, LENGTH


def analytic_macs(
    size: EncoderSize, batch_size: int, length: int, ratio: int = 1, bottleneck_size: int = 0
) -> int:
    """MACs of an encoder with a compression plugin in the split form (arXiv 2310.15724).

    Args:
        size: The sizes of the encoder.
        batch_size: Rows.
        length: Tokens in each row. Windows are counted as length / ratio, without padding.
        ratio: k; 1: no plugin.
        bottleneck_size: m of the plugin.

    Returns:
        MACs of one forward pass: projections, attention scores and weighted sums, feed-forward networks,
        and the plugin.
    """
    d, a = size.hidden_size, size.attention_size
    attention = length * 4 * d * a + 2 * length * length * a
    ffn_per_vector = size.num_ffn_matrices * d * size.intermediate_size
    windows = length / ratio
    layer = attention + windows * ffn_per_vector
    if ratio > 1:
        compress = windows * (ratio * d * ratio + ratio * d)  # scores, weighted sum
        m = bottleneck_size
        decompress = windows * d * m + length * (d * m + m * d)  # down on y; down on x, up
        layer += compress + decompress
    return round(batch_size * size.num_layers * layer)


def graph_macs(graph: Path, batch_size: int, length: int, ratio: int = 1) -> int:
    """MACs of the matrix products of a graph of one ratio, at one input shape, padding included.

    Args:
        graph: The ONNX file; its weights are not read.
        batch_size: Rows.
        length: Tokens in each row.
        ratio: k of the graph.
    """
    model = ir.load(graph)
    bindings = {BATCH: batch_size, LENGTH: length, "windows": math.ceil(length / ratio)}
    return sum(_node_macs(node, bindings) for node in model.graph)


def _node_macs(node: ir.Node, bindings: dict[str, int]) -> int:
    if node.op_type in ("MatMul", "Gemm"):
        left = _dims(node, node.inputs[0], bindings)
        return math.prod(_dims(node, node.outputs[0], bindings)) * left[0 if _transposed(node) else -1]
    if node.op_type == "Attention":
        batch, queries, width = _dims(node, node.inputs[0], bindings)
        keys = _dims(node, node.inputs[1], bindings)[1]
        return 2 * batch * queries * keys * width  # scores, weighted sums
    return 0


def _dims(node: ir.Node, value: ir.Value | None, bindings: dict[str, int]) -> list[int]:
    if value is None or value.shape is None:
        raise ValueError(f"{node.op_type} {node.name} has no shapes")
    dims = list(value.shape.evaluate(bindings))
    known = [dim for dim in dims if isinstance(dim, int)]
    if len(known) != len(dims):
        raise ValueError(f"{node.op_type} {node.name} keeps unknown dimensions: {dims}")
    return known


def _transposed(node: ir.Node) -> bool:
    return "transA" in node.attributes and bool(node.attributes["transA"].as_int())
