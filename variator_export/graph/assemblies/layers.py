"""Assembling on the graph: layers of a trace are left out, and others get the weights of modules.

Every node carries the PyTorch module that it came from, and exactly one vector per token crosses the border
of two layers. A module has the architecture of one of the layers that it replaces. So its graph is the graph
of that layer, with weights of its own, and no trace is needed.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from variator_export.core.axes import KINDS, past_name, present_name
from variator_export.graph.simplify import module_of, remove_unused
from variator_export.graph.weights import attach_weights, detach_weights

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class KeptLayer:
    """A layer of the trace that stays in an assembly.

    Attributes:
        index: The layer's index in the trace.
        weights: The weights of a module, by their names in the layer; None for an original layer.
    """

    index: int
    weights: Mapping[str, ir.ExternalTensor] | None = None


@dataclass(frozen=True)
class StackLayers:
    """A stack of an assembly.

    Attributes:
        path: Name of the PyTorch module that holds the layers, inside transformers' base model.
        layers: The layers that stay, in order.
        num_layers: Layers of the trace.
        is_decoder: Whether the layers have keys and values as inputs and outputs.
    """

    path: str
    layers: Sequence[KeptLayer]
    num_layers: int
    is_decoder: bool = False


def assemble(model: ir.Model, stacks: Sequence[StackLayers], hidden_size: int) -> None:
    """Turn a traced graph into the graph of an assembly.

    Args:
        model: A traced graph whose weights are external data, changed in place. Inputs for plugins stay as
            they are: a module reads the part of the layer that it is like.
        stacks: The layers to keep of each stack.
        hidden_size: Width of the vectors between two layers.
    """
    graph = model.graph
    held: dict[str, ir.TensorProtocol] = dict(detach_weights(graph))
    for stack in stacks:
        nodes = nodes_by_layer(graph, stack.path)
        kept = [layer.index for layer in stack.layers]
        if nodes and _runs(graph, stack):
            states = layer_states(nodes, hidden_size)
            for index in sorted(set(range(stack.num_layers)) - set(kept)):
                states[index + 1].replace_all_uses_with(states[index])
                # What follows reads the value before the layers that are left out.
                states[index + 1] = states[index]
        if stack.is_decoder:
            _renumber_caches(graph, kept, stack.num_layers)
        for layer in stack.layers:
            if layer.weights is not None:
                held |= _exchange_weights(graph, f"{stack.path}.{layer.index}", layer.weights)
    remove_unused(graph)
    attach_weights(graph, held)


def nodes_by_layer(graph: ir.Graph, path: str) -> dict[int, list[ir.Node]]:
    """The nodes of each layer of a stack, in order.

    A simplification may have lost the module of a node. Such a node is in a layer if values of the layer
    enter it and come back.
    """
    pattern = re.compile(rf"(?:^|\.){re.escape(path)}\.(\d+)(?:\.|$)")
    nodes = list(graph)
    own = {node: int(m[1]) for node in nodes if (m := pattern.search(module_of(node)))}
    unnamed = [node for node in nodes if not module_of(node)]
    come_from: dict[ir.Node, set[int]] = {}
    lead_to: dict[ir.Node, set[int]] = {}
    for node in unnamed:
        makers = {value.producer() for value in node.inputs if value is not None} - {None}
        come_from[node] = {layer for maker in makers for layer in _layers(maker, own, come_from)}
    for node in reversed(unnamed):
        users = {use.node for output in node.outputs for use in output.uses()}
        lead_to[node] = {layer for user in users for layer in _layers(user, own, lead_to)}
        if both := come_from[node] & lead_to[node]:
            own[node] = min(both)
    found: dict[int, list[ir.Node]] = {}
    for node in nodes:
        if node in own:
            found.setdefault(own[node], []).append(node)
    return found


def _layers(
    node: ir.Node | None, own: Mapping[ir.Node, int], through: Mapping[ir.Node, set[int]]
) -> set[int]:
    """The layer of a node; of a node without one, those on the other side of it."""
    if node is None:
        return set()
    return {own[node]} if node in own else through.get(node, set())


def _runs(graph: ir.Graph, stack: StackLayers) -> bool:
    """Whether the graph runs the stack. An encoder's graph has only projections of the decoder's layers."""
    caches = {str(value.name) for value in graph.inputs}
    return not stack.is_decoder or past_name(0, "decoder", KINDS[0]) in caches


def layer_states(nodes: Mapping[int, Sequence[ir.Node]], hidden_size: int) -> list[ir.Value]:
    """The vectors before the first layer, and after each layer, in order."""
    layers = [nodes[index] for index in range(len(nodes))]
    first = set(layers[0])
    entering = dict.fromkeys(
        value
        for node in layers[0]
        for value in node.inputs
        if value is not None and value.producer() not in first and _is_state(value, hidden_size)
    )
    found = [_only(list(entering), "before the first layer")]
    for index, layer in enumerate(layers):
        inside = set(layer)
        leaving = [
            output
            for node in layer
            for output in node.outputs
            if _is_state(output, hidden_size)
            and (output.is_graph_output() or any(use.node not in inside for use in output.uses()))
        ]
        found.append(_only(leaving, f"after layer {index}"))
    return found


def _is_state(value: ir.Value, hidden_size: int) -> bool:
    """Whether a value is one vector per token: (batch, tokens, hidden size), of no weight."""
    shape = value.shape
    return (
        value.dtype in _FLOATS
        and shape is not None
        and len(shape) == 3
        and shape[2] == hidden_size
        and not isinstance(shape[0], int)
    )


def _only(values: Sequence[ir.Value], where: str) -> ir.Value:
    assert len(values) == 1, f"{where}: expected one value, found {[value.name for value in values]}"
    return values[0]


def _exchange_weights(
    graph: ir.Graph, layer: str, weights: Mapping[str, ir.ExternalTensor]
) -> dict[str, ir.TensorProtocol]:
    """Let a layer's nodes read the weights of a module; returns the module's weights by name in the graph."""
    values, held = module_values(graph, list(graph.inputs), layer, weights)
    for value, new in values.items():
        value.replace_all_uses_with(new)
    return held


def module_values(
    graph: ir.Graph, values: Iterable[ir.Value], layer: str, weights: Mapping[str, ir.ExternalTensor]
) -> tuple[dict[ir.Value, ir.Value], dict[str, ir.TensorProtocol]]:
    """Make a module's detached weights, as inputs of a graph.

    Args:
        graph: The graph.
        values: Values of the graph; those that are no weights of the layer are passed over.
        layer: Path of the layer.
        weights: The module's weights, by their names in the layer.

    Returns:
        The new values by those that they stand for, and the module's weights by name in the graph.
    """
    made: dict[ir.Value, ir.Value] = {}
    held: dict[str, ir.TensorProtocol] = {}
    for value in values:
        before, found, name = str(value.name).rpartition(f"{layer}.")
        if not found or (before and not before.endswith(".")):
            continue
        tensor = weights.get(name)
        if tensor is None:
            continue  # what only the first layer has, for all
        assert tensor.dtype == value.dtype, f"{value.name} is {value.dtype}, its module's is {tensor.dtype}"
        new = ir.Value(
            name=str(tensor.name), shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
        )
        graph.inputs.append(new)
        made[value] = new
        held[str(tensor.name)] = tensor
    return made, held


def _renumber_caches(graph: ir.Graph, kept: Sequence[int], num_layers: int) -> None:
    """Leave out the keys and values of layers that are left out, and number the others from 0.

    What has the same shape in all layers is read from one of them, the number of earlier tokens for example.
    It may be a layer that is left out.
    """
    gone = set(range(num_layers)) - set(kept)
    inputs = {str(value.name): value for value in graph.inputs}
    for stack, kind in itertools.product(("encoder", "decoder"), KINDS):
        if (there := inputs.get(past_name(kept[0], stack, kind))) is not None:
            for layer in gone:
                inputs[past_name(layer, stack, kind)].replace_all_uses_with(there)
    for values, name_of in ((graph.inputs, past_name), (graph.outputs, present_name)):
        by_name = {str(value.name): value for value in values}
        for stack in ("encoder", "decoder"):
            for kind in KINDS:
                for layer in gone:
                    if (value := by_name.get(name_of(layer, stack, kind))) is not None:
                        values.remove(value)
                for place, layer in enumerate(kept):
                    if (value := by_name.get(name_of(layer, stack, kind))) is not None:
                        value.name = name_of(place, stack, kind)
