"""Types in which an engine computes, read from what TensorRT lists for its layers.

An engine built with detailed verbosity lists, for each layer, the inputs with their types and the ONNX nodes
that the layer was made from ("[ONNX Layer: NAME]"). No engine has been inspected yet: the format comes from
NVIDIA's documentation and from users' posts (NVIDIA/TensorRT#4020). The schedule inside a plan
(`engines.tensorrt.schedule`) has been read in real plans.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from variator_export.core.precision import PRECISIONS, find_precision

# A product has two: activations and a weight.
_OPERANDS = 2
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class EnginePrecision:
    """Shares of the multiply-accumulates of an engine; they add up to 1.

    Attributes:
        asked: Share in layers whose floating-point inputs all have the requested type. For a quantised type,
            share in layers with two inputs of that type: what is added to a product is not quantised.
        other: Share in layers whose floating-point inputs all have one other type.
        unknown: Share in layers with inputs of several types, or without the name of an ONNX node.
    """

    asked: float
    other: float
    unknown: float


def precision_in_engine(
    layers: Iterable[Any], macs: Mapping[str, int], precision: str
) -> EnginePrecision | None:
    """Compute in which types an engine calculates the products of a graph.

    Args:
        layers: Layers as the inspector lists them: mappings, or names alone if it has no details.
        macs: Multiply-accumulates by graph node, without the nodes declared float32.
        precision: Precision of the graph.

    Returns:
        The shares, or None if the type of no product is known.
    """
    # Keys: the inspector's words for the types. Precisions with the same quantised type share the words.
    names = {word: p.tensorrt for p in PRECISIONS.all().values() for word in p.inspector}
    kind = re.compile(rf"\b({'|'.join(names)})\b")
    wanted = find_precision(precision)
    found: dict[str, set[str]] = {}
    # Nodes of which a layer multiplies by something else than a value of the type that was asked for.
    mixed: set[str] = set()
    for layer in layers:
        if not isinstance(layer, dict):
            continue
        formats = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", ())]
        types = [names[match[1]] for text in formats if (match := kind.search(text))]
        for node in _NODE.findall(str(layer.get("Metadata", ""))):
            found.setdefault(node, set()).update(types)
            # Activations and weight; a quantised weight alone is not a quantised product.
            if wanted.quantizes and types.count(wanted.tensorrt) < _OPERANDS:
                mixed.add(node)
    total = sum(macs.values())
    known = {node: types for node, types in found.items() if node in macs and types}
    if not known or not total:
        return None
    asked = sum(
        macs[node]
        for node, types in known.items()
        if (node not in mixed if wanted.quantizes else types == {wanted.tensorrt})
    )
    other = sum(
        macs[node] for node, types in known.items() if len(types) == 1 and wanted.tensorrt not in types
    )
    return EnginePrecision(asked / total, other / total, (total - asked - other) / total)
