"""Counts of the multiply-accumulates (MACs) in a graph, for comparison with the formula in `model.macs`.

Only matrix products count, including the scores and weighted sums of attention and of the compression layers.
"""

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from variator_export.core.axes import BATCH, LENGTH
from variator_export.core.precision import find_precision
from variator_export.graph.simplify import module_of
from variator_export.graph.weights import stored_weight
from variator_export.model.quantization.layers import is_part_of

# Last components of the name of a compression layer.
_COMPRESS = ".plugin.compress"


class _UnknownShapeError(Exception):
    """The exporter left a dimension unknown."""


def graph_macs(graph: Path, batch_size: int, length: int, ratio: int = 1) -> int | None:
    """Count the MACs in a graph of one ratio, at one input shape and including padding.

    Args:
        graph: The ONNX file; its weights are not read.
        batch_size: Number of rows.
        length: Number of tokens in each row.
        ratio: The graph's ratio k.

    Returns:
        MACs of all matrix products; None if the shapes of a product are unknown (DeBERTa cuts its relative
        positions to the length).
    """
    model = ir.load(graph)
    bindings = {BATCH: batch_size, LENGTH: length, "windows": math.ceil(length / ratio)}
    try:
        return sum(_node_macs(node, bindings) + _weighted_sum_macs(node, bindings) for node in model.graph)
    except _UnknownShapeError:
        return None


@dataclass(frozen=True)
class PrecisionShare:
    """The share of a graph's matrix products that is computed in the requested precision.

    Attributes:
        precision: The requested precision.
        macs: Multiply-accumulates in that precision, as a share of the graph's total without the modules that
            are declared float32.
        float32_modules: The share of the graph's total in each module that is declared float32, by module.
    """

    precision: str
    macs: float
    float32_modules: dict[str, float]


def precision_share(
    graph: Path, precision: str, float32_modules: Sequence[str], ratio: int, stack: str
) -> PrecisionShare:
    """Compute how much of a graph of one ratio runs in a precision, at 8 rows of 128 tokens.

    A precision that quantises applies to the linear layers of the encoder alone. Modules with other products,
    such as attention, the plugin and heads, count as declared float32, also where they are float16.

    Args:
        graph: The ONNX file.
        precision: The requested precision.
        float32_modules: Last name components of the modules that stay in float32. With a precision that
            quantises, any part of their names.
        ratio: The graph's ratio k.
        stack: Name of the module that holds the encoder layers.
    """
    quantizes, wanted = find_precision(precision).quantizes, find_precision(precision).onnx
    asked = rest = whole = 0
    declared: dict[str, int] = {}
    for node, macs in _products(graph, ratio):
        module, right = module_of(node), stored_weight(node) or node.inputs[1]
        kind = right.dtype if right is not None else None
        whole += macs
        if quantizes:
            # The weight's name: a module around a feed-forward network hides those of its linear layers.
            weight = _encoder_weight(node, stack)
            stays = weight is None or any(is_part_of(weight, part) for part in float32_modules)
        else:
            stays = module.rpartition(".")[2] in float32_modules
        if stays and wanted != "FLOAT" and (quantizes or kind == ir.DataType.FLOAT):
            declared[module] = declared.get(module, 0) + macs
            continue
        rest += macs
        asked += macs if kind is not None and kind.name == wanted else 0
    shares = {module: macs / whole for module, macs in declared.items()}
    return PrecisionShare(precision, asked / rest if rest else 0.0, shares)


def _encoder_weight(node: ir.Node, stack: str) -> str | None:
    """The name of the weight of the encoder that a node multiplies by; None for any other product."""
    weight = stored_weight(node)
    name = "" if weight is None else str(weight.name)
    return name if not name.startswith("plugin.") and is_part_of(name, stack) else None


def macs_by_node(graph: Path, float32_modules: Collection[str], ratio: int) -> dict[str, int]:
    """Count the MACs of each matrix product in a graph of one ratio, by node name, at 8 rows of 128 tokens.

    Args:
        graph: The ONNX file.
        float32_modules: Names of the modules to leave out, in full or their last component.
        ratio: The graph's ratio k.
    """
    return {
        str(node.name): macs
        for node, macs in _products(graph, ratio)
        if not {module_of(node), module_of(node).rpartition(".")[2]} & set(float32_modules)
    }


def _products(graph: Path, ratio: int) -> Iterator[tuple[ir.Node, int]]:
    """Yield the matrix products with known shapes and their MACs; some shapes in DeBERTa are unknown."""
    bindings = {BATCH: 8, LENGTH: 128, "windows": math.ceil(128 / ratio)}
    for node in ir.load(graph).graph:
        with contextlib.suppress(_UnknownShapeError):
            if macs := _node_macs(node, bindings):
                yield node, macs


def _node_macs(node: ir.Node, bindings: dict[str, int]) -> int:
    if node.op_type in ("MatMul", "Gemm"):
        left = _dims(node.inputs[0], bindings)
        return math.prod(_dims(node.outputs[0], bindings)) * left[0 if _transposed(node) else -1]
    if node.op_type == "Attention":
        query = _dims(node.inputs[0], bindings)  # (B, N, width), or (B, heads, N, size)
        keys = _dims(node.inputs[1], bindings)[-2]
        return 2 * math.prod(query) * keys  # scores, weighted sums
    return 0


def _weighted_sum_macs(node: ir.Node, bindings: dict[str, int]) -> int:
    """The MACs of the weighted sum of a compression layer, which is a product and a sum of single values."""
    is_one = node.op_type == "ReduceSum" and module_of(node).endswith(_COMPRESS)
    return math.prod(_dims(node.inputs[0], bindings)) if is_one else 0


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
