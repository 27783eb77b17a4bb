"""Forms of a network's attention, from the most precise one to the one that every TensorRT builds."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

# As the graph has it, with products added in float32, or computed by several kernels.
Form = Literal["float32 sums", "as exported", "decomposed"]
FORMS: tuple[Form, ...] = ("float32 sums", "as exported", "decomposed")
# A score with this added is nothing beside others: exported masks hold half the lowest number.
_HIDDEN = float(np.finfo(np.float16).min) / 2
_KEYS = 1 << 3  # axis of a mask (B, heads, queries, keys), as TensorRT writes axes


def apply_form(trt: Any, network: Any, form: Form) -> bool:
    """Give all attention of a network a form; returns whether the form is one of its own for this network."""
    found = list(attentions(trt, network))
    if form == "float32 sums":
        return _add_in_float32(trt, network, found)
    if form == "decomposed":
        for attention in found:
            attention.decomposable = True
        return bool(found)
    return True


def attentions(trt: Any, network: Any) -> Iterator[Any]:
    """The attention operators of a network."""
    for layer in _layers(network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # The bindings return every layer as the base class; set the layer's own class by hand.
            layer.__class__ = trt.IAttentionBoundaryLayer
            yield layer.attention


def _add_in_float32(trt: Any, network: Any, found: list[Any]) -> bool:
    """Let fused attention in float16 add its products in float32.

    TensorRT's kernels do so if query, key and value are cast to float32 in front of the operator and the
    mask is bool. The products themselves stay in float16. With a mask of numbers the casts would prevent the
    fusion; in bfloat16 the sums are in float32 anyway.

    A query that may see nothing sees everything here. In exported graphs its output is the mean of all
    values, which a bool mask cannot say, and NaN would spread to other tokens. Only masks that are the same
    for each query are replaced: with them, such queries are in rows that are all padding, which have no
    defined output.

    Returns:
        Whether any attention was changed.
    """
    makers = {layer.get_output(i).name: layer for layer in _layers(network) for i in range(layer.num_outputs)}
    readers: dict[str, list[tuple[Any, int]]] = {}
    for layer in _layers(network):
        for index in range(layer.num_inputs):
            if (tensor := layer.get_input(index)) is not None:
                readers.setdefault(tensor.name, []).append((layer, index))
    masks: dict[str, Any] = {}
    changed = False
    for attention in found:
        if attention.mask is None or attention.get_input(0).dtype != trt.DataType.HALF:
            continue
        name = attention.mask.name
        if name not in masks:
            seen = _seen_keys(trt, makers, attention.mask)
            masks[name] = None if seen is None else _or_everything(trt, network, seen)
        if masks[name] is not None:
            _widen(trt, network, attention, masks[name], readers)
            changed = True
    return changed


def _widen(
    trt: Any, network: Any, attention: Any, mask: Any, readers: dict[str, list[tuple[Any, int]]]
) -> None:
    """Put casts to float32 in front of attention, and one to float16 behind it."""
    output = attention.get_output(0)
    attention.mask = mask
    for index in range(3):
        cast = network.add_cast(attention.get_input(index), trt.DataType.FLOAT)
        attention.set_input(index, cast.get_output(0))
    narrowed = network.add_cast(output, trt.DataType.HALF).get_output(0)
    for layer, index in readers.get(output.name, []):
        layer.set_input(index, narrowed)


def _seen_keys(trt: Any, makers: dict[str, Any], mask: Any) -> Any | None:
    """The bool tensor that a mask of numbers was selected by; None if there is none, or queries differ.

    Queries differ if a term of the tensor has a value for each query and each key, as a sliding window has.
    A term that has a value for each query alone (the position is not negative) hides no key from one query
    that another one sees.
    """
    selected = makers.get(mask.name)
    if selected is None or selected.type != trt.LayerType.SELECT:
        return None
    kept, hidden = (_constant(trt, makers, selected.get_input(index)) for index in (1, 2))
    if kept != 0 or hidden is None or hidden > _HIDDEN:
        return None  # a bias, or the other way round
    terms, seen = [selected.get_input(0)], selected.get_input(0)
    while terms:
        term = terms.pop()
        maker = makers.get(term.name)
        if maker is not None and maker.type == trt.LayerType.SLICE:  # of ONNX Expand
            terms.append(maker.get_input(0))
            continue
        if maker is not None and maker.type == trt.LayerType.ELEMENTWISE:
            maker.__class__ = trt.IElementWiseLayer
            if maker.op == trt.ElementWiseOperation.AND:
                terms += [maker.get_input(0), maker.get_input(1)]
                continue
        if len(term.shape) != 4 or 1 not in tuple(term.shape)[2:]:
            return None
    return seen


def _constant(trt: Any, makers: dict[str, Any], tensor: Any) -> float | None:
    """The number that a tensor holds everywhere; None if it is computed, or holds several."""
    maker = makers.get(tensor.name)
    while maker is not None and maker.type in (trt.LayerType.SHUFFLE, trt.LayerType.CAST):
        maker = makers.get(maker.get_input(0).name)
    if maker is None or maker.type != trt.LayerType.CONSTANT:
        return None
    maker.__class__ = trt.IConstantLayer
    numbers = np.unique(np.asarray(maker.weights))
    return float(numbers[0]) if len(numbers) == 1 else None


def _or_everything(trt: Any, network: Any, seen: Any) -> Any:
    """`seen`, and all keys where a query sees none."""
    numbers = network.add_cast(seen, trt.DataType.FLOAT).get_output(0)
    most = network.add_reduce(numbers, trt.ReduceOperation.MAX, _KEYS, keep_dims=True).get_output(0)
    some = network.add_cast(most, trt.DataType.BOOL).get_output(0)
    none = network.add_unary(some, trt.UnaryOperation.NOT).get_output(0)
    return network.add_elementwise(seen, none, trt.ElementWiseOperation.OR).get_output(0)


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(index) for index in range(network.num_layers)]
