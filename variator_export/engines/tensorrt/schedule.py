"""The kernel schedule inside a plan of TensorRT for RTX: its kernels, and the types of its matrix products.

A plan carries the schedule as text: declarations of tensors with their types, then calls of kernels with the
names of their tensors and of the ONNX nodes that they compute. It can be read without a GPU. The text is not
a documented interface: it was found in plans of TensorRT for RTX 1.7. In a plan of another form no layer is
found, and so no proof.
"""

import re
from collections.abc import Iterator
from typing import Any

from variator_export.engines.kernels import Kernel, Schedule, layers_of

# The type stands last in a tensor's declaration: `tensor={ dims={ 8 } name="x" type=half }`.
_TENSOR = re.compile(rb"tensor=\{((?:[^{}]|\{[^{}]*\})*)\btype=([a-z0-9_]+) \}")
_NAME = re.compile(rb'\bname="([^"]+)"')
# The calls that compute matrix products. Other functions are elementwise.
_PRODUCT = re.compile(rb"\n\s*(?:fully_connected=\{|runtime_fusion=\{|function=\{ name=_?gemm)")
# Closes a declaration or a call; what is nested inside closes with a blank behind it.
_END = b" }\n"
_NODE = re.compile(rb"\[ONNX Layer: ([^\]]+)\]")
_INPUTS = re.compile(rb"\binput(?:_args)?=\{([^}]*)\}")
# Factors of a product, in float32 whatever its type is.
_FACTORS = (b"_alpha", b"_beta")
_QUOTED = re.compile(rb'"([^"]+)"')
# The calls of a schedule, one per line. Other lines wait for events, or compute shapes on the host.
_MAIN, _SECTION_END = re.compile(rb"\nmain \{"), b"\n}\n"
_PRODUCTS = (b"fully_connected", b"runtime_fusion")
_CALL = re.compile(rb"\n  (function|fully_connected|runtime_fusion)=\{ ([^\n]*)")
_NAME_OF_CALL = re.compile(rb'^name="?([^" ]+)')
# Of the kernels of fused attention: the type of the products, and in float16 that of their sums.
_TRAITS = re.compile(rb"_hmma_(\w+?)_traits")
_ACCUMULATES = {b"fp16": "float16", b"fp32": "float32", b"bf16": "float32"}


def scheduled_products(plan: bytes) -> list[dict[str, Any]]:
    """Read the kernels of a plan that compute matrix products.

    Args:
        plan: Content of the plan file.

    Returns:
        For each kernel, the ONNX nodes that it computes and the types of its inputs, in the form that
        `engines.layers.precision_in_engine` expects. Empty if the plan has no schedule of the known form.
    """
    return list(_products(plan))


def schedule(plan: bytes) -> Schedule | None:
    """Read the kernels of a plan in the order of their calls.

    A plan for several kinds of GPU may hold a schedule for each. The longest one is read.

    Returns:
        The schedule; None if the plan has none of the known form.
    """
    sections = [plan[m.end() : plan.find(_SECTION_END, m.end())] for m in _MAIN.finditer(plan)]
    calls = max((list(_CALL.finditer(section)) for section in sections), key=len, default=[])
    nodes = [tuple(n.decode(errors="replace") for n in _NODE.findall(match[2])) for match in calls]
    kernels = [
        Kernel(
            "product"
            if match[1] in _PRODUCTS or match[2].startswith((b"name=_gemm", b"name=gemm"))
            else "other",
            _name(match[2]),
            own,
            layer,
        )
        for match, own, layer in zip(calls, nodes, layers_of(nodes), strict=True)
    ]
    found = {_ACCUMULATES[name] for name in _TRAITS.findall(plan) if name in _ACCUMULATES}
    return Schedule(tuple(kernels), found.pop() if len(found) == 1 else None) if kernels else None


def _name(call: bytes) -> str:
    found = _NAME_OF_CALL.search(call)
    return "" if found is None else found[1].decode(errors="replace")


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
        nodes, inputs = [match[0] for match in _NODE.finditer(call)], _INPUTS.search(call)
        if not nodes or inputs is None:
            continue
        names = [name for name in _QUOTED.findall(inputs[1]) if not name.endswith(_FACTORS)]
        # A plan for several GPUs may declare a name twice; with two types, its type is not known.
        known = [kind for name in names if len(found := types.get(name, set())) == 1 for kind in found]
        yield {
            "Inputs": [{"Format/Datatype": kind} for kind in known],
            "Metadata": b"".join(nodes).decode(errors="replace"),
        }
