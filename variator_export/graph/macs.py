"""Counting the multiply-accumulates (MACs) of a graph, to stand beside those of the formula (`core.macs`).

Only matrix products count; scores and weighted sums of the attention do.
"""

import math
from pathlib import Path

import onnx_ir as ir

from variator_export.graph.boundary import BATCH, LENGTH


class _UnknownShapeError(Exception):
    """The exporter did not follow a dimension."""


def graph_macs(graph: Path, batch_size: int, length: int, ratio: int = 1) -> int | None:
    """MACs of the matrix products of a graph of one ratio, at one input shape, padding included.

    Args:
        graph: The ONNX file; its weights are not read.
        batch_size: Rows.
        length: Tokens in each row.
        ratio: k of the graph.

    Returns:
        None if the shapes of a product are not known (DeBERTa cuts its relative positions to the length).
    """
    model = ir.load(graph)
    bindings = {BATCH: batch_size, LENGTH: length, "windows": math.ceil(length / ratio)}
    try:
        return sum(_node_macs(node, bindings) for node in model.graph)
    except _UnknownShapeError:
        return None


def _node_macs(node: ir.Node, bindings: dict[str, int]) -> int:
    if node.op_type in ("MatMul", "Gemm"):
        left = _dims(node.inputs[0], bindings)
        return math.prod(_dims(node.outputs[0], bindings)) * left[0 if _transposed(node) else -1]
    if node.op_type == "Attention":
        query = _dims(node.inputs[0], bindings)  # (B, N, width), or (B, heads, N, size)
        keys = _dims(node.inputs[1], bindings)[-2]
        return 2 * math.prod(query) * keys  # scores, weighted sums
    return 0


def _dims(value: ir.Value | None, bindings: dict[str, int]) -> list[int]:
    if value is None or value.shape is None:
        raise _UnknownShapeError
    dims = list(value.shape.evaluate(bindings))
    known = [dim for dim in dims if isinstance(dim, int)]
    if len(known) != len(dims):
        raise _UnknownShapeError
    return known


def _transposed(node: ir.Node) -> bool:
    return "transA" in node.attributes and bool(node.attributes["transA"].as_int())
