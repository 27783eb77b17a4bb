"""The kernel schedule inside a plan of TensorRT for RTX: which types the products of a graph are computed in.

A plan carries the schedule as text: declarations of tensors with their types, then calls of kernels with the
names of their tensors and of the ONNX nodes that they compute. It can be read without a GPU. The text is not
a documented interface: it was found in plans of TensorRT for RTX 1.7. In a plan of another form no layer is
found, and so no proof.
"""

import re
from collections.abc import Iterator
from typing import Any

# The type stands last in a tensor's declaration: `tensor={ dims={ 8 } name="x" type=half }`.
_TENSOR = re.compile(rb"tensor=\{((?:[^{}]|\{[^{}]*\})*)\btype=([a-z0-9_]+) \}")
_NAME = re.compile(rb'\bname="([^"]+)"')
# The calls that compute matrix products. Other functions are elementwise.
_PRODUCT = re.compile(rb"\n\s*(?:fully_connected=\{|runtime_fusion=\{|function=\{ name=_?gemm)")
# Closes a declaration or a call; what is nested inside closes with a blank behind it.
_END = b" }\n"
_NODE = re.compile(rb"\[ONNX Layer: [^\]]+\]")
_INPUTS = re.compile(rb"\binput(?:_args)?=\{([^}]*)\}")
# Factors of a product, in float32 whatever its type is.
_FACTORS = (b"_alpha", b"_beta")
_QUOTED = re.compile(rb'"([^"]+)"')


def scheduled_products(plan: bytes) -> list[dict[str, Any]]:
    """Read the kernels of a plan that compute matrix products.

    Args:
        plan: Content of the plan file.

    Returns:
        For each kernel, the ONNX nodes that it computes and the types of its inputs, in the form that
        `engines.layers.precision_in_engine` expects. Empty if the plan has no schedule of the known form.
    """
    return list(_products(plan))


def _products(plan: bytes) -> Iterator[dict[str, Any]]:
    types: dict[bytes, set[str]] = {}
    for match in _TENSOR.finditer(plan):
        if name := _NAME.search(match[1]):
            types.setdefault(name[1], set()).add(match[2].decode())
    for product in _PRODUCT.finditer(plan):
        end = plan.find(_END, product.end())
        if end < 0:
            continue
        call = plan[product.start() : end]
        nodes, inputs = _NODE.findall(call), _INPUTS.search(call)
        if not nodes or inputs is None:
            continue
        names = [name for name in _QUOTED.findall(inputs[1]) if not name.endswith(_FACTORS)]
        # A plan for several GPUs may declare a name twice; with two types, its type is not known.
        known = [kind for name in names if len(found := types.get(name, set())) == 1 for kind in found]
        yield {
            "Inputs": [{"Format/Datatype": kind} for kind in known],
            "Metadata": b"".join(nodes).decode(errors="replace"),
        }
