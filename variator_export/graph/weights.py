"""Weights of a graph as external data inside safetensors files.

A graph uses the names and the layout of the backbone's state dict, so all graphs of a bundle can share one
weights file. While a graph is rewritten, its weights are *detached*: they are plain inputs, so no pass can
rename, merge, fold or even read them.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from variator_export.core.precision import PRECISIONS


def external_tensors(folder: Path, location: str) -> dict[str, ir.ExternalTensor]:
    """Map every tensor of a safetensors file to external data of a graph, by name.

    Args:
        folder: The bundle's folder.
        location: Path of the file inside the bundle, as written into graphs.
    """
    with (folder / location).open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    types = {p.safetensors: ir.DataType[p.onnx] for p in PRECISIONS.all().values()}
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = ir.ExternalTensor(
            location,
            8 + header_bytes + begin,
            end - begin,
            types[entry["dtype"]],
            shape=ir.Shape(entry["shape"]),
            name=name,
            base_dir=folder,
        )
    return tensors


def detach_weights(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Turn every external initializer into a plain input; returns the initializers' tensors by name."""
    held: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor):
            held[name] = value.const_value
            detach(graph, value)
    return held


def detach(graph: ir.Graph, value: ir.Value) -> None:
    """Turn one initializer into a plain input."""
    del graph.initializers[str(value.name)]
    value.const_value = None
    graph.inputs.append(value)


def attach_weights(graph: ir.Graph, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """Turn the inputs with these names back into initializers; unused ones are removed."""
    for value in [value for value in graph.inputs if value.name in tensors]:
        graph.inputs.remove(value)
        if value.uses() or value.is_graph_output():
            value.const_value = tensors[str(value.name)]
            graph.register_initializer(value)


def stored_weight(node: ir.Node) -> ir.Value | None:
    """The weight that a matrix product multiplies by, as it is stored; None if it is not stored."""
    right = node.inputs[1]
    while right is not None and (maker := right.producer()) is not None:
        if maker.op_type not in ("Transpose", "DequantizeLinear"):
            return None
        right = maker.inputs[0]
    return right if right is not None and right.is_initializer() else None


def quantized_input(node: ir.Node) -> ir.Value | None:
    """The integers that a product of quantised values multiplies a weight by; None for any other product."""
    if node.op_type != "MatMul":
        return None
    left, right = (value.producer() if value is not None else None for value in node.inputs)
    if right is not None and right.op_type == "Transpose":
        right = right.inputs[0].producer() if right.inputs[0] is not None else None
    if left is None or right is None or not left.op_type == right.op_type == "DequantizeLinear":
        return None
    return left.inputs[0]
