"""Binding: inserting one plugin's tensors into the any-ratio graph, to produce the graph of one ratio."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from variator_export.graph.constants import add_constant
from variator_export.graph.defaults import load_without_defaults
from variator_export.graph.fold import fold_decompression
from variator_export.graph.masking import remove_padding_mask
from variator_export.graph.padding import remove_window_padding
from variator_export.graph.simplify import module_of, name_nodes, simplify
from variator_export.graph.weights import attach_weights, detach_weights, external_tensors
from variator_export.model.plugin_layout import (
    EXCLUDE_PADDING_INPUT,
    GRAPH_INPUT_PREFIX,
    PluginConfig,
    graph_shapes,
    tensor_name,
)


def bind(any_ratio: Path, config: PluginConfig, plugin_location: str) -> ir.Model:
    """Build the graph of one ratio.

    Args:
        any_ratio: The any-ratio graph, in the bundle's folder.
        config: The plugin's configuration.
        plugin_location: Path of the plugin's safetensors file inside the bundle's folder.

    Returns:
        A graph without plugin inputs, whose weights and plugin tensors are external data.
    """
    return bind_loaded(load_without_defaults(any_ratio), any_ratio.parent, config, plugin_location)


def bind_loaded(model: ir.Model, folder: Path, config: PluginConfig, plugin_location: str) -> ir.Model:
    """Bind a plugin as `bind` does, into a loaded graph without defaults, which is changed in place."""
    graph = model.graph
    held: dict[str, ir.TensorProtocol] = dict(detach_weights(graph))
    half = _half_type(held)
    tensors = external_tensors(folder, plugin_location)
    k = config.ratio
    for value in list(graph.inputs):
        name = str(value.name)
        if name == EXCLUDE_PADDING_INPUT:
            _bind_masking(graph, value, exclude_padding=config.masking == "exclude-padding")
        elif name.startswith(GRAPH_INPUT_PREFIX):
            held |= _bind_kind(graph, value, name.removeprefix(GRAPH_INPUT_PREFIX), config, tensors)
    _set_dimensions(graph, {"ratio": k, "bottleneck_size": config.bottleneck_size})
    simplify(model, fuse_norms=half is None)
    if half is not None:
        fold_decompression(graph, held, half)
    attach_weights(graph, held)
    name_nodes(model)
    graph.name = f"ratio-{k}"
    return model


def bind_baseline(any_ratio: Path) -> ir.Model:
    """Build the graph of ratio 1: the backbone without plugins and without padding.

    With k=1 a window is a single vector. The input of the compression layer can therefore go directly into
    the feed-forward network, and the output of the feed-forward network replaces that of the decompression
    layer.
    """
    return bind_baseline_loaded(load_without_defaults(any_ratio))


def bind_baseline_loaded(model: ir.Model) -> ir.Model:
    """Build the graph as `bind_baseline` does, from a loaded graph without defaults, changed in place."""
    graph = model.graph
    held = detach_weights(graph)
    for site in sorted({_site(node) for node in graph} - {""}):
        _remove_plugin(graph, site)
    ratio_inputs = [v for v in graph.inputs if str(v.name).startswith(GRAPH_INPUT_PREFIX)]
    _set_dimensions(graph, {"ratio": 1, "bottleneck_size": 1})
    remove_window_padding(graph)
    simplify(model, fuse_norms=_half_type(held) is None)
    # Only the shapes of the plugin inputs were still in use, and they are constant now.
    for value in ratio_inputs:
        assert not value.uses(), f"{value.name} is still used in the graph of ratio 1"
        graph.inputs.remove(value)
    attach_weights(graph, held)
    name_nodes(model)
    graph.name = "ratio-1"
    return model


def _half_type(weights: Mapping[str, ir.TensorProtocol]) -> ir.DataType | None:
    """The type of a backbone in half precision; None for any other."""
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return next((weight.dtype for weight in weights.values() if weight.dtype in halves), None)


def _bind_kind(
    graph: ir.Graph,
    value: ir.Value,
    kind: str,
    config: PluginConfig,
    tensors: Mapping[str, ir.ExternalTensor],
) -> dict[str, ir.TensorProtocol]:
    """Replace `Gather(stacked, layer)` by an input for the layer's tensor, which is attached later."""
    held: dict[str, ir.TensorProtocol] = {}
    shapes = graph_shapes(config)
    for node, _ in list(value.uses()):
        if node.op_type == "Shape":
            continue  # replaced below by a constant, once the shape is known
        assert node.op_type == "Gather", f"{value.name} is read by a {node.op_type}"
        index = node.inputs[1]
        assert index is not None
        assert index.const_value is not None
        layer = int(index.const_value.numpy())
        name = tensor_name(layer, kind)
        stored = tensors[name]
        shape = ir.Shape(shapes[kind][1:])
        graph_name = f"plugin.{name}"
        held[graph_name] = ir.ExternalTensor(
            stored.location, stored.offset, stored.length, stored.dtype, shape=shape, name=graph_name,
            base_dir=stored.base_dir,
        )  # fmt: skip
        bound = ir.Value(name=graph_name, shape=shape, type=ir.TensorType(stored.dtype))
        graph.inputs.append(bound)
        replacement = bound
        if stored.dtype != value.dtype:
            cast = ir.node("Cast", [bound], {"to": value.dtype})
            graph.insert_before(node, cast)
            replacement = cast.outputs[0]
            replacement.shape, replacement.type = shape, value.type
        node.outputs[0].replace_all_uses_with(replacement)
        graph.remove(node, safe=True)
    if value.uses():
        assert value.shape is not None
        bindings = {"ratio": config.ratio, "bottleneck_size": config.bottleneck_size}
        value.shape = value.shape.evaluate(bindings)
        for node, _ in list(value.uses()):
            start = node.attributes["start"].as_int() if "start" in node.attributes else 0
            end = node.attributes["end"].as_int() if "end" in node.attributes else None
            dims = np.array(list(value.shape)[start:end], np.int64)
            _replace_by_constant(graph, node.outputs[0], dims)
            graph.remove(node, safe=True)
    graph.inputs.remove(value)
    return held


def _set_dimensions(graph: ir.Graph, bindings: Mapping[str, int]) -> None:
    """Replace symbolic dimensions by numbers in the shapes of all values."""
    values = [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = value.shape.evaluate(bindings)


def _bind_masking(graph: ir.Graph, value: ir.Value, *, exclude_padding: bool) -> None:
    """Replace the input of the masking mode, and its conversion to bool, by a constant."""
    (conversion,) = value.consumers()
    excludes = conversion.outputs[0]
    if not exclude_padding:
        remove_padding_mask(graph, excludes)
    _replace_by_constant(graph, excludes, np.array([exclude_padding]))
    graph.remove(conversion, safe=True)
    graph.inputs.remove(value)


def _replace_by_constant(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    value.replace_all_uses_with(add_constant(graph, f"{value.name}.bound", array))


_COMPRESS, _DECOMPRESS, _FFN = ".plugin.compress", ".plugin.decompress", ".ffn"


def _site(node: ir.Node) -> str:
    """Path of the wrapped feed-forward network whose compression layer a node belongs to; empty if none."""
    module = module_of(node)
    return module.removesuffix(_COMPRESS) if module.endswith(_COMPRESS) else ""


def _remove_plugin(graph: ir.Graph, site: str) -> None:
    """Bypass the plugin of one site."""
    compress = [node for node in graph if module_of(node) == site + _COMPRESS]
    decompress = [node for node in graph if module_of(node).startswith(site + _DECOMPRESS)]
    # Other layers read the mask from the first one, but the feed-forward network reads only the compressed
    # window.
    to_ffn = [v for v in _leaving(compress) if any(module_of(u).startswith(site + _FFN) for u, _ in v.uses())]
    if not to_ffn:
        return  # an assembly leaves the layer out, and others read its mask
    compressed = _only(to_ffn, site)
    entered = _only([value for value in _entering(decompress) if _is_from(value, site)], site)
    ffn_output = _only(
        [v for v in _entering(decompress) if (p := v.producer()) and module_of(p).startswith(site + _FFN)],
        site,
    )
    left = _only(_leaving(decompress), site)
    rejoined = _only([node.outputs[0] for node, _ in left.uses()], site)
    to_windows = entered.producer()
    assert to_windows is not None
    assert to_windows.op_type == "Reshape", f"{site}: {to_windows.op_type} cuts into windows"
    hidden = to_windows.inputs[0]
    assert hidden is not None
    compressed.replace_all_uses_with(hidden)
    rejoined.replace_all_uses_with(ffn_output)


def _is_from(value: ir.Value, site: str) -> bool:
    producer = value.producer()
    return producer is not None and module_of(producer) == site


def _entering(nodes: list[ir.Node]) -> list[ir.Value]:
    """Values from outside that a group of nodes reads, in order and without duplicates."""
    inside = {output for node in nodes for output in node.outputs}
    return list(dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v not in inside))


def _leaving(nodes: list[ir.Node]) -> list[ir.Value]:
    """Values of a group of nodes that nodes outside the group read."""
    group = set(nodes)
    return [
        output
        for node in nodes
        for output in node.outputs
        if any(user not in group for user, _ in output.uses())
    ]


def _only(values: list[ir.Value], site: str) -> ir.Value:
    assert len(values) == 1, f"{site}: expected one value, found {[value.name for value in values]}"
    return values[0]
