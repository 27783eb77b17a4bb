"""Conversion of bfloat16 to float32 in a graph, for runtimes without bfloat16 matrix products.

ONNX Runtime's CPU provider is one of them. The outputs of a converted graph show that the graph is correct,
but not how it rounds.
"""

import numpy as np
import onnx_ir as ir


def bfloat16_to_float32(model: ir.Model) -> None:
    """Convert all bfloat16 tensors of a graph to float32; converted values are held in memory."""
    for value in model.graph.initializers.values():
        stored = value.const_value
        if stored is not None and stored.dtype == ir.DataType.BFLOAT16:
            value.const_value = ir.tensor(stored.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    nodes = list(model.graph.all_nodes())  # those of branches too
    for node in nodes:
        for name in ("to", "softmax_precision", "stash_type"):
            if name in node.attributes and node.attributes[name].as_int() == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        tensor = node.attributes["value"].as_tensor() if "value" in node.attributes else None
        if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))
    for value in (*model.graph.inputs, *model.graph.outputs, *(o for n in nodes for o in n.outputs)):
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
