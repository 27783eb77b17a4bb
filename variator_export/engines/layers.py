"""In which types an engine computes, by what TensorRT's inspector says of its layers.

An engine that was built with detailed verbosity names for each layer its inputs with their types, and the
ONNX nodes that it was made of ("[ONNX Layer: NAME]"). No engine has been inspected yet: the form is that of
NVIDIA's documentation and of what users have posted (NVIDIA/TensorRT#4020).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from variator_export.core.precision import PRECISIONS

_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class EnginePrecision:
    """Shares of the multiply-accumulates of an engine; together 1.

    Attributes:
        asked: In layers all of whose floating-point inputs have the type that was asked for.
        other: In layers all of whose floating-point inputs have one other type.
        unknown: In layers with inputs of several types, or that name no ONNX node.
    """

    asked: float
    other: float
    unknown: float


def precision_in_engine(
    layers: Iterable[Any], macs: Mapping[str, int], precision: str
) -> EnginePrecision | None:
    """Where the products of a graph went.

    Args:
        layers: What the inspector lists: mappings, or names alone where it knows no more.
        macs: Of the graph's nodes, without those that are declared float32.
        precision: The precision of the graph.

    Returns:
        None if nothing is known of any product.
    """
    # By the words of the inspector.
    names = {word: p.name for p in PRECISIONS.all().values() for word in p.inspector}
    kind = re.compile(rf"\b({'|'.join(names)})\b")
    found: dict[str, set[str]] = {}
    for layer in layers:
        if not isinstance(layer, dict):
            continue
        formats = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", ())]
        types = {names[match[1]] for text in formats if (match := kind.search(text))}
        for node in _NODE.findall(str(layer.get("Metadata", ""))):
            found.setdefault(node, set()).update(types)
    total = sum(macs.values())
    known = {node: types for node, types in found.items() if node in macs and types}
    if not known or not total:
        return None
    asked = sum(macs[node] for node, types in known.items() if types == {precision})
    other = sum(macs[node] for node, types in known.items() if len(types) == 1 and precision not in types)
    return EnginePrecision(asked / total, other / total, (total - asked - other) / total)
