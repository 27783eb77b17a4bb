"""One graph for all assemblies: every layer and every module is a branch that an input switches on or off.

The branches of an encoder stand in the order of the layers that they begin with. So the branches of an
assembly, which overlap nowhere, follow each other, and all others pass their input on. Each weight is in the
graph once. Of a decoder, this is the graph of the encoder that it reads: it has the projections of the
decoder's layers and modules, which make keys and values of the encoder's last states.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from variator_export.bundle.branches import BRANCHES_INPUT
from variator_export.core.assembly import Span
from variator_export.core.axes import KINDS, present_name
from variator_export.graph.assemblies.layers import KeptLayer, layer_states, module_values, nodes_by_layer
from variator_export.graph.defaults import set_defaults
from variator_export.graph.simplify import MODULE_KEY, name_nodes
from variator_export.graph.weights import attach_weights, detach_weights


@dataclass(frozen=True)
class StackBranches:
    """The branches of a stack.

    Attributes:
        path: Name of the PyTorch module that holds the layers, inside transformers' base model.
        branches: The original layers and the modules, in the order of the layers that they begin with.
        spans: The original layers that each branch stands for. Those that are one are on by default.
    """

    path: str
    branches: Sequence[KeptLayer]
    spans: Sequence[Span]


def any_assembly(
    any_ratio: Path, encoder: StackBranches | None, decoder: StackBranches | None, hidden_size: int
) -> ir.Model:
    """Build the graph.

    Args:
        any_ratio: The graph of the original layers that takes plugins as inputs, in the bundle's folder.
        encoder: The branches of the encoder; None if it has the original layers alone.
        decoder: The branches of a decoder, whose graph this is not. It has its own keys and values of the
            encoder for each; those of branches that are off are empty.
        hidden_size: Width of the vectors between two layers.

    Returns:
        The graph, with the input `assembly.branches` besides those of the given graph: the branches of the
        encoder, then those of the decoder.
    """
    model = ir.load(any_ratio)
    graph = model.graph
    held: dict[str, ir.TensorProtocol] = dict(detach_weights(graph))
    spans = [span for stack in (encoder, decoder) if stack is not None for span in stack.spans]
    switches = ir.Value(
        name=BRANCHES_INPUT, shape=ir.Shape([len(spans)]), type=ir.TensorType(ir.DataType.BOOL)
    )
    graph.inputs.append(switches)
    if encoder is not None:
        held |= _switch_layers(graph, encoder, _Switches(switches, 0, held), hidden_size)
    if decoder is not None:
        first = len(spans) - len(decoder.spans)
        held |= _switch_projections(graph, decoder, _Switches(switches, first, held))
    attach_weights(graph, held)
    set_defaults(graph, {BRANCHES_INPUT: np.array([span.granularity == 1 for span in spans])})
    name_nodes(model)
    graph.name = "any-assembly"
    return model


@dataclass(frozen=True)
class _Switches:
    """The input that switches branches, the place of a stack's first branch in it, and weights by name."""

    value: ir.Value
    first: int
    weights: Mapping[str, ir.TensorProtocol]

    def choose(
        self, stack: StackBranches, branch: int, run: ir.Graph, otherwise: ir.Graph
    ) -> tuple[list[ir.Node], ir.Node]:
        """The nodes that run a branch if it is on, or else another graph; and the last of them."""
        place = ir.tensor([self.first + branch], dtype=ir.DataType.INT64)
        which = ir.node("Constant", [], {"value": place})
        switch = ir.node("Gather", [self.value, which.outputs[0]], {"axis": 0})
        choice = ir.node(
            "If",
            [switch.outputs[0]],
            {"then_branch": run, "else_branch": otherwise},
            num_outputs=len(run.outputs),
        )
        choice.metadata_props[MODULE_KEY] = f"{stack.path}.{stack.spans[branch]}"
        return [which, switch, choice], choice


def _switch_layers(
    graph: ir.Graph, stack: StackBranches, switches: _Switches, hidden_size: int
) -> dict[str, ir.TensorProtocol]:
    """Let the encoder's layers and modules follow each other as branches; returns the modules' weights."""
    nodes = nodes_by_layer(graph, stack.path)
    states = layer_states(nodes, hidden_size)
    layers = {
        index: _hoist(graph, nodes[index], [states[index + 1]], {states[index]: states[0]})
        for index in sorted(nodes)
    }
    held: dict[str, ir.TensorProtocol] = {}
    after = nodes[len(nodes) - 1][-1]
    made: list[ir.Node] = []
    state = states[0]
    for place, branch in enumerate(stack.branches):
        given = {states[branch.index]: state}
        results = [states[branch.index + 1]]
        prefix = f"branch{place}/"
        run, outside, own = _branch(
            graph, layers[branch.index], branch, stack.path, given, results, switches, prefix
        )
        held |= own
        nodes_of_choice, choice = switches.choose(stack, place, run, _pass_on(state, place))
        state = choice.outputs[0]
        state.shape, state.type, state.name = states[0].shape, states[0].type, f"{BRANCHES_INPUT}.{place}"
        made += [*outside, *nodes_of_choice]
    graph.insert_after(after, made)
    states[len(nodes)].replace_all_uses_with(state)
    _remove(graph, nodes)
    return held


def _switch_projections(
    graph: ir.Graph, stack: StackBranches, switches: _Switches
) -> dict[str, ir.TensorProtocol]:
    """Let the projections of a decoder's layers and modules be branches; returns the modules' weights."""
    nodes = nodes_by_layer(graph, stack.path)
    named = {str(value.name): value for value in graph.outputs}
    results = {
        index: [named[present_name(index, "encoder", kind)] for kind in KINDS] for index in sorted(nodes)
    }
    for index, pair in results.items():
        nodes[index] += _between(nodes[index], pair)
    layers = {index: _hoist(graph, nodes[index], results[index], {}) for index in sorted(nodes)}
    kept = [value for value in graph.outputs if value not in {v for pair in results.values() for v in pair}]
    held: dict[str, ir.TensorProtocol] = {}
    made: list[ir.Node] = []
    outputs: list[ir.Value] = []
    for place, branch in enumerate(stack.branches):
        given = results[branch.index]
        prefix = f"projections{place}/"
        run, outside, own = _branch(
            graph, layers[branch.index], branch, stack.path, {}, given, switches, prefix
        )
        held |= own
        nodes_of_choice, choice = switches.choose(stack, place, run, _empty(given, place))
        for output, value, kind in zip(choice.outputs, given, KINDS, strict=True):
            output.shape, output.type = value.shape, value.type
            output.name = present_name(stack.spans[place], "encoder", kind)
        made += [*outside, *nodes_of_choice]
        outputs += choice.outputs
    graph.extend(made)
    graph.outputs.clear()
    graph.outputs.extend([*kept, *outputs])
    _remove(graph, nodes)
    return held


def _between(nodes: Sequence[ir.Node], results: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes between a layer and the graph's outputs, which cut off padding."""
    inside, found = set(nodes), []
    for result in results:
        node = result.producer()
        while node is not None and node not in inside:
            found.append(node)
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return found[::-1]


def _remove(graph: ir.Graph, nodes: Mapping[int, Sequence[ir.Node]]) -> None:
    for index in sorted(nodes, reverse=True):
        for node in reversed(nodes[index]):
            graph.remove(node, safe=True)


def _hoist(
    graph: ir.Graph, nodes: list[ir.Node], results: Sequence[ir.Value], given: Mapping[ir.Value, ir.Value]
) -> list[ir.Node]:
    """Compute outside of a layer what is read elsewhere besides its results, such as the mask.

    Args:
        graph: The graph.
        nodes: The layer's nodes.
        results: The layer's results.
        given: What is read outside instead. It may ask for the shape of the vectors before the layer, which
            all vectors have.

    Returns:
        The nodes that make the results.
    """
    inside = set(nodes)
    outer_uses = {
        output: [use for use in output.uses() if use.node not in inside]
        for node in nodes
        for output in node.outputs
        if output not in results
    }
    shared = _leading_to({output for output, uses in outer_uses.items() if uses}, nodes)
    if shared:
        copies, values = _copied(shared, given, "shared/")
        for copy in copies:  # no results of the layer's modules
            copy.metadata_props.pop(MODULE_KEY, None)
        graph.insert_before(nodes[0], copies)
        for output, uses in outer_uses.items():
            for use in uses:
                use.node.replace_input_with(use.idx, values[output])
    return _leading_to(results, nodes)


def _leading_to(values: Collection[ir.Value], nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes of a layer that some of its values are computed by, in order."""
    needed = {value.producer() for value in values}
    for node in reversed(nodes):
        if node in needed:
            needed |= {value.producer() for value in node.inputs if value is not None}
    return [node for node in nodes if node in needed]


def _copied(
    nodes: Sequence[ir.Node], given: Mapping[ir.Value, ir.Value], prefix: str
) -> tuple[list[ir.Node], dict[ir.Value | None, ir.Value | None]]:
    """Copies of nodes.

    Args:
        nodes: The nodes, in order.
        given: Values that the copies read instead of those that the nodes read.
        prefix: Prefix of the names of copies and of their results.

    Returns:
        The copies, and the values that stand for those of the nodes.
    """
    values: dict[ir.Value | None, ir.Value | None] = dict(given.items())
    copies = []
    for node in nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [values.get(value, value) for value in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{prefix}{node.name}",
            metadata_props=dict(node.metadata_props),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.shape, new.type = f"{prefix}{old.name}", old.shape, old.type
            values[old] = new
        copies.append(copy)
    return copies, values


def _branch(
    graph: ir.Graph,
    nodes: Sequence[ir.Node],
    layer: KeptLayer,
    path: str,
    given: Mapping[ir.Value, ir.Value],
    results: Sequence[ir.Value],
    switches: _Switches,
    prefix: str,
) -> tuple[ir.Graph, list[ir.Node], dict[str, ir.TensorProtocol]]:
    """A copy of a layer as a branch, with the weights of a module.

    Args:
        graph: The graph.
        nodes: The layer's nodes.
        layer: The layer or module.
        path: Path of the stack.
        given: Values that the copy reads instead of those that the nodes read.
        results: The layer's results.
        switches: Knows the weights.
        prefix: Prefix of the names in the copy.

    Returns:
        The branch; the nodes that depend on weights alone; and the module's weights by name. Those nodes stay
        outside, because ONNX Runtime computes them there once, when it opens the graph, and frees the
        weights: inside, it would keep both.
    """
    read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    weights, own = module_values(graph, read, f"{path}.{layer.index}", layer.weights or {})
    copies, values = _copied(nodes, {**weights, **given}, prefix)
    fixed = {value for value in graph.inputs if value.name in switches.weights or value.name in own}
    outside = []
    for copy in copies:
        inputs = [value for value in copy.inputs if value is not None]
        if inputs and all(value in fixed for value in inputs):
            fixed |= set(copy.outputs)
            outside.append(copy)
    inside = [copy for copy in copies if copy not in set(outside)]
    made = [value for result in results if (value := values[result]) is not None]
    return ir.Graph([], made, nodes=inside, name=prefix), outside, own


def _empty(results: Sequence[ir.Value], place: int) -> ir.Graph:
    """The branch of projections that are off."""
    nodes = []
    for kind, result in zip(KINDS, results, strict=True):
        assert result.shape is not None
        assert result.dtype is not None
        shape = [size if isinstance(size, int) else 0 for size in result.shape]
        node = ir.node("Constant", [], {"value": ir.tensor(np.zeros(shape, result.dtype.numpy()))})
        node.outputs[0].name = f"empty{place}.{kind}"
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), result.type
        nodes.append(node)
    return ir.Graph([], [node.outputs[0] for node in nodes], nodes=nodes, name=f"empty{place}")


def _pass_on(state: ir.Value, place: int) -> ir.Graph:
    """The branch that changes nothing."""
    same = ir.node("Identity", [state])
    same.outputs[0].shape, same.outputs[0].type = state.shape, state.type
    same.outputs[0].name = f"passed{place}"
    return ir.Graph([], [same.outputs[0]], nodes=[same], name=f"pass{place}")
