"""Making bfloat16 float32 in a graph, for runtimes that have no products of bfloat16.

ONNX Runtime's CPU provider has none. What such a graph computes shows that the graph is right, not how it
rounds.
"""

import numpy as np
import onnx_ir as ir


def widen(model: ir.Model) -> None:
    """Make all bfloat16 tensors of a graph float32; their values are in memory then."""
    for value in model.graph.initializers.values():
        stored = value.const_value
        if stored is not None and stored.dtype == ir.DataType.BFLOAT16:
            value.const_value = ir.tensor(stored.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        for name in ("to", "softmax_precision", "stash_type"):
            if name in node.attributes and node.attributes[name].as_int() == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        tensor = node.attributes["value"].as_tensor() if "value" in node.attributes else None
        if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))
    for value in (*model.graph.inputs, *model.graph.outputs, *(o for n in model.graph for o in n.outputs)):
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
