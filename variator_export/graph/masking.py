"""Masking mode `none`: every vector is included, so the compression layer needs no mask."""

import onnx_ir as ir

# Operators whose result is true (or one) everywhere if their first input is.
_PRESERVING = ("Unsqueeze", "Expand", "Reshape", "Identity", "Squeeze", "Cast")


def remove_padding_mask(graph: ir.Graph, exclude_padding: ir.Value) -> None:
    """Remove the selections and products that depend on `exclude_padding`, assuming that it is false.

    Args:
        graph: The graph, changed in place.
        exclude_padding: The bool (1,) that determines whether padding is excluded.
    """
    true = {node.outputs[0] for node, _ in exclude_padding.uses() if node.op_type == "Not"}
    for node in list(graph):  # in topological order
        first = node.inputs[0] if node.inputs else None
        if (node.op_type == "Or" and any(value in true for value in node.inputs)) or (
            node.op_type in _PRESERVING and first in true
        ):
            true.add(node.outputs[0])
        elif node.op_type == "Where" and first in true:
            chosen = node.inputs[1]
            assert chosen is not None
            node.outputs[0].replace_all_uses_with(chosen)
        elif node.op_type == "Mul" and node.inputs[1] in true:
            factor = node.inputs[0]
            assert factor is not None
            node.outputs[0].replace_all_uses_with(factor)
